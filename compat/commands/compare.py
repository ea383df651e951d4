"""``compat compare``: what changed between two models, and for whom."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from compat import store
from compat.combo import Combo
from compat.combo import choose as choose_combos
from compat.commands import SHAPE, Usage, add_asking, complain
from compat.result import INCOMPLETE, USAGE

EXIT_CODES = """\
exit codes:
  0  identical, or only additions
  1  behaviour changed, or something breaks
  2  wrong usage
  3  could not complete: a side could not be asked, or an error of ours
"""
EXAMPLES = """\
examples:
  compat compare .@main .                       what the working tree changed
  compat compare ../nanoVLM ../my-fork          a fork against where it came from
  compat compare then.json now.json             two locks (compat lock): answers at once
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "compare",
        help="say what changed between two models, and for whom",
        formatter_class=SHAPE,
        description="Compare A with B: lock files, or targets as in compat run, which are locked first.",
        epilog=EXAMPLES + "\n" + EXIT_CODES,
    )
    command.add_argument("a", metavar="A", help="the old side: a lock file or a target")
    command.add_argument("b", metavar="B", help="the new side")
    command.add_argument("--combo", metavar="NAME", help="which backbones (default: the lock's, or the first)")
    add_asking(command, scale=None)
    command.add_argument("--json", metavar="FILE", help="also write the findings here; - prints them, not the table")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read or make two locks, compare them, show what changed."""
    from compat import lock
    from compat.process import CouldNotAsk
    from compat.reports.comparison import show
    from compat.rules import NotComparable, compare
    from compat.target import TargetError

    try:
        sides = [lock.read(Path(text)) if is_lock_file(text) else None for text in (options.a, options.b)]
        held = next((side for side in sides if side), {"combo": None, "scale": "tiny"})
        for name in ("combo", "scale"):
            wanted = getattr(options, name) or held[name]
            for side in sides:
                if side and side[name] != wanted:
                    raise Usage(f"a lock is of {name} {side[name]}, but {wanted} is wanted: both must be of one")
        if options.combo or None in sides:
            name = options.combo or held["combo"]
            combo, scale = choose_combos([name] if name else None)[0], options.scale or held["scale"]
            texts = (options.a, options.b)
            sides = [side or made_lock(text, combo, scale, options) for side, text in zip(sides, texts, strict=True)]
        found = compare(*sides)
    except (lock.NotALock, NotComparable) as error:
        return complain(str(error), USAGE)
    except TargetError as error:
        return complain(str(error), error.exit_code)
    except (CouldNotAsk, lock.LockFailed, OSError) as error:
        return complain(str(error), INCOMPLETE)
    if options.json:
        text = json.dumps(found.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
            return found.exit_code
        try:
            store.write_atomic(Path(options.json), text.encode("utf-8"))
        except OSError as error:
            complain(f"{options.json} was not written: {error.strerror or error}", found.exit_code)
    try:
        show(found)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return found.exit_code


def is_lock_file(text: str) -> bool:
    """A file, but not file.py:Class, which does not exist under that name."""
    return Path(text).is_file() or text.endswith(".json")


def made_lock(text: str, combo: Combo, scale: str, options: argparse.Namespace) -> dict:
    """The lock of a target, through a child of its own. Raises TargetError, CouldNotAsk, LockFailed."""
    from compat import lock
    from compat.process import Child
    from compat.target import resolve

    target = resolve(text)
    print(f"compat: asking {target.label}", file=sys.stderr)
    told = {"python": options.python, "timeout_s": options.timeout, "device": options.device, "scale": scale}
    with Child(target, run_timeout_s=lock.limit_s(options.timeout, options.scale), **told) as child:
        return lock.make(child, combo, scale)
