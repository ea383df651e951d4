"""``compat compare``: what changed between two models, and for whom."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from compat import store
from compat.combo import Combo
from compat.combo import choose as choose_combos
from compat.commands import SHAPE, Usage, add_asking, complain, unwritable
from compat.result import INCOMPLETE, USAGE, plain

if TYPE_CHECKING:
    from compat.crossing import Crossing
    from compat.process import Child

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
  compat compare . . --python .venv/bin/python --python ../next/bin/python     an upgrade, the code unchanged
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
    add_asking(command, scale=None, sides=2)
    command.add_argument(
        "--both-ways", action="store_true", help="it was promised that B's checkpoints load in A: a breach is breaking"
    )
    command.add_argument(
        "--reproduce", metavar="DIR", help="leave a script for each NUMERIC finding, which runs without compat"
    )
    command.add_argument("--json", metavar="FILE", help="also write the findings here; - prints them, not the table")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read or make two locks, compare them, show what changed."""
    from compat import lock, reproduce
    from compat.process import CouldNotAsk
    from compat.reports.comparison import show
    from compat.rules import NotComparable, compare
    from compat.target import TargetError

    pythons = options.python or [None]
    if len(pythons) > 2:
        raise Usage("--python is given once, for both sides, or twice, for A and for B")
    files = [is_lock_file(text) for text in (options.a, options.b)]
    if any(files) and (options.reproduce or options.both_ways):
        flag = "--reproduce" if options.reproduce else "--both-ways"
        raise Usage(f"{flag} asks both sides: give two targets, no lock file")
    if why := unwritable(options.json):
        return complain(why, INCOMPLETE)
    try:
        texts = options.a, options.b
        sides = [lock.read(Path(text)) if file else None for text, file in zip(texts, files, strict=True)]
        held = next((side for side in sides if side), {"combo": None, "scale": "tiny"})
        for name in ("combo", "scale"):
            wanted = getattr(options, name) or held[name]
            for side in sides:
                if side and side[name] != wanted:
                    raise Usage(f"a lock is of {name} {side[name]}, but {wanted} is wanted: both must be of one")
        crossing, notes = None, []
        with contextlib.ExitStack() as stack:
            if options.combo or None in sides:
                name = options.combo or held["combo"]
                combo, scale = choose_combos([name] if name else None)[0], options.scale or held["scale"]
                both = zip(texts, (pythons[0], pythons[-1]), sides, strict=True)
                told = [None if side else (text, python) for text, python, side in both]
                children = [stack.enter_context(child_of(*one, scale, options)) if one else None for one in told]
                sides = locks_of(sides, children, combo, scale, options.device)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compat-crossing-")))
                crossing = witnessed(children, sides, combo, scale, folder, options.both_ways)
            found = compare(*sides, crossing=crossing)
            if options.reproduce:
                notes = reproduce.write(found, children, combo.as_dict(scale), folder, Path(options.reproduce))
    except (lock.NotALock, NotComparable) as error:
        return complain(str(error), USAGE)
    except TargetError as error:
        return complain(str(error), error.exit_code)
    except (CouldNotAsk, lock.LockFailed, OSError) as error:
        return complain(str(error), INCOMPLETE)
    if options.json:
        text = json.dumps(plain(found.as_json()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
            return found.exit_code
        try:
            store.write_atomic(Path(options.json), text.encode("utf-8"))
        except OSError as error:
            complain(f"{options.json} was not written: {error.strerror or error}", found.exit_code)
    for note in notes:
        print(f"compat: {note}", file=sys.stderr)
    try:
        show(found)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return found.exit_code


def is_lock_file(text: str) -> bool:
    """A file, but not file.py:Class, which does not exist under that name."""
    return Path(text).is_file() or text.endswith(".json")


def child_of(text: str, python: str | None, scale: str, options: argparse.Namespace) -> Child:
    """A process for a target, not started yet. Raises TargetError."""
    from compat import lock
    from compat.process import Child
    from compat.target import resolve

    told = {"python": python, "timeout_s": options.timeout, "device": options.device, "scale": scale}
    return Child(resolve(text), run_timeout_s=2 * lock.limit_s(options.timeout, scale), **told)


def locks_of(sides: list, children: list, combo: Combo, scale: str, device: str) -> list:
    """The sides, a lock made of each child, both at once where the machine has room. Raises CouldNotAsk, LockFailed."""
    from compat import lock
    from compat.parallel import places

    asked = [place for place, child in enumerate(children) if child]
    for place in asked:
        print(f"compat: asking {children[place].target.label}", file=sys.stderr)
    with ThreadPoolExecutor(max(1, places(len(asked), scale, device))) as pool:  # the work is the children's
        made = [pool.submit(lock.make, children[place], combo, scale) for place in asked]
        try:
            found = {place: future.result() for place, future in zip(asked, made, strict=True)}
        except BaseException:
            for place in asked:  # or leaving the pool would wait for the other side
                children[place].close()
            raise
    return [found.get(place, side) for place, side in enumerate(sides)]


def witnessed(children: list, sides: list, combo: Combo, scale: str, folder: Path, promised: bool) -> Crossing | None:
    """What came of loading A's checkpoint in B; None where a side is a lock file, which cannot be asked."""
    from compat.witness import cross

    if None in children:
        return None
    return cross(*children, tuple(sides), combo, scale, folder, promised)
