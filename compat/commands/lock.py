"""``compat lock``: everything one model does in one combo, one fact a line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compat.combo import choose as choose_combos
from compat.commands import SHAPE, Usage, add_asking, complain
from compat.result import INCOMPLETE, OK

EXIT_CODES = """\
exit codes:
  0  the lock is written, whatever it says of the target
  2  wrong usage
  3  could not complete: nothing could be asked, the file cannot be written, or an error of ours
"""
EXAMPLES = """\
examples:
  compat lock . -o now.json                     the model in this folder, default combo
  compat lock ../my-fork@v0.2 > then.json       a git ref, on stdout
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "lock",
        help="write down everything a model does, one fact a line",
        formatter_class=SHAPE,
        description="Ask TARGET everything in one combo and write the answers as a lock: on stdout, or to FILE.\n"
        "What the target does not have, or fails at, is a fact of it too.",
        epilog=EXAMPLES + "\n" + EXIT_CODES,
    )
    command.add_argument("target", nargs="?", default=".", metavar="TARGET", help="as in compat run (default: .)")
    command.add_argument("--combo", metavar="NAME", help="which backbones (default: the first default of compat list)")
    add_asking(command)
    command.add_argument("-o", "--output", metavar="FILE", help="write the lock here and say how much it holds")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask everything in one combo; print the lock, or write it and say how much it holds."""
    from compat import lock
    from compat.process import Child, CouldNotAsk
    from compat.target import TargetError, resolve

    combo = choose_combos([options.combo] if options.combo else None)[0]
    if options.output and not Path(options.output).resolve().parent.is_dir():
        raise Usage(f"-o {options.output}: there is no folder {Path(options.output).parent}")
    try:
        target = resolve(options.target)
    except TargetError as error:
        return complain(str(error), error.exit_code)
    limit_s = lock.limit_s(options.timeout, options.scale)
    told = {"python": options.python, "timeout_s": options.timeout, "device": options.device, "scale": options.scale}
    try:
        with Child(target, run_timeout_s=limit_s, **told) as child:
            made = lock.make(child, combo, options.scale)
    except (CouldNotAsk, lock.LockFailed) as error:
        return complain(str(error), INCOMPLETE)
    if not options.output:
        sys.stdout.write(lock.dumps(made))
        return OK
    try:
        lock.write(Path(options.output), made)
    except OSError as error:
        return complain(f"{options.output} was not written: {error.strerror or error}", INCOMPLETE)
    print(f"{options.output}: {lock.summary(made)}")
    return OK
