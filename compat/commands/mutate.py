"""``compat mutate``: what a comparison would overlook."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from compat import store
from compat.combo import choose as choose_combos
from compat.combo import load
from compat.commands import SHAPE, Usage, complain, seconds, unwritable
from compat.result import INCOMPLETE, OK

EXAMPLES = """\
examples:
  compat mutate . --count 300 --seed 0 --paths nanovlm/language nanovlm/projector.py
  compat mutate ../my-fork --combo siglip2-smollm2 --json mutants.json

exit codes:
  0  the mutants were tried, however many survived
  2  wrong usage, or nothing to mutate
  3  could not complete: the target cannot be locked, or an error of ours
"""


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of mutants from 1 up")
    return value


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "mutate",
        help="change the model's code a little, many times: which change goes unnoticed?",
        formatter_class=SHAPE,
        description="Draw small wrong changes of TARGET's own code (operators, constants, arguments, statements),\n"
        "make a tiny lock of each in a process of its own, and compare it with the unchanged one. Survivors are\n"
        "lines that a lock does not watch, or changes that change nothing. TARGET itself is not touched.",
        epilog=EXAMPLES,
    )
    command.add_argument("target", nargs="?", default=".", metavar="TARGET", help="as in compat run (default: .)")
    command.add_argument("--count", type=count, default=100, metavar="N", help="mutants to draw (default: 100)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawing (default: 0)")
    command.add_argument("--paths", nargs="+", default=[], metavar="PATH", help="only these files and folders")
    command.add_argument("--combo", action="append", metavar="NAME", help="which backbones; may be repeated "
                         "(default: all that the target has)")  # fmt: skip
    command.add_argument("--python", metavar="PATH", help="the interpreter the target runs in (default: this one)")
    command.add_argument("--timeout", type=seconds, default=600.0, metavar="S", help="seconds a lock may take")
    command.add_argument("--json", metavar="FILE", help="also write the outcomes here; - prints them, not the text")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draw, try, tell."""
    from compat.lock import LockFailed
    from compat.mutate import NothingToMutate, mutate, text
    from compat.process import CouldNotAsk
    from compat.target import TargetError, resolve

    combos = choose_combos(options.combo) if options.combo else list(load().values())
    if why := unwritable(options.json):
        raise Usage(why)
    try:
        target = resolve(options.target)
        report = mutate(
            target,
            combos,
            options.seed,
            options.count,
            options.paths,
            tell=lambda line: print(f"compat: {line}", file=sys.stderr),
            python=options.python,
            limit_s=options.timeout,
        )
    except TargetError as error:
        return complain(str(error), error.exit_code)
    except NothingToMutate as error:
        raise Usage(str(error)) from None
    except (CouldNotAsk, LockFailed) as error:
        return complain(str(error), INCOMPLETE)
    if options.json:
        written = json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n"
        if options.json == "-":
            sys.stdout.write(written)
            return OK
        try:
            store.write_atomic(Path(options.json), written.encode("utf-8"))
        except OSError as error:
            return complain(f"{options.json} was not written: {error.strerror or error}", INCOMPLETE)
    print(text(report))
    return OK
