"""The commands of ``compat``, a file each: ``add`` describes the arguments, ``run`` does the work.

Unusual: a command imports pytest, rich, numpy and the rest inside ``run``, so that ``--help`` and commands
that only read answer at once. What several commands share stands here.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from compat import store
from compat.combo import SCALES
from compat.result import Run

SHAPE = argparse.RawDescriptionHelpFormatter


class Usage(ValueError):
    """The arguments contradict each other or the rules; the message says how."""


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:  # NaN fails this too
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def add_asking(command: argparse.ArgumentParser, scale: str | None = "tiny", sides: int = 1) -> None:
    """Options of every command that asks a target: its scale (None: the lock's), interpreter, limit, device.

    sides: 2 where --python may be given twice, for A and for B.
    """
    add = command.add_argument
    implied = "tiny: same shape, small sizes (default)" if scale else "tiny or full (default: the lock's, or tiny)"
    add("--scale", choices=SCALES, default=scale, help=f"{implied}; full: real sizes" if scale else implied)
    if sides == 1:
        add("--python", metavar="PATH", help="the interpreter the target runs in (default: this one)")
    else:
        add("--python", metavar="PATH", action="append", help="the interpreter of both; given twice, of A, then of B")
    add("--timeout", type=seconds, default=60.0, metavar="S", help="seconds a question may take (default: 60)")
    add("--device", choices=("cpu", "cuda"), default="cpu")


def complain(message: str, code: int) -> int:
    print(f"compat: {message}", file=sys.stderr)
    return code


def unwritable(where: str | None, flag: str = "--json") -> str:
    """Why ``flag`` FILE cannot be written, in one sentence; "" where it can. Asked before a target is."""
    if not where or where == "-":
        return ""
    path = Path(where)
    if path.is_dir():
        why = "it is a folder"
    elif not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "it may not be written to"
    else:
        return ""
    return f"{flag} {where} cannot be written: {why}; nothing was asked"


def save(run: Run) -> bool:
    try:
        store.save(run)
    except OSError as error:
        complain(f"the run was not saved in {store.RUNS}: {error.strerror or error}", run.exit_code)
        return False
    return True


def keep(run: Run, log: Path | None, templates=None, more: str = "") -> bool:
    """Save the run and write it into the log; whether it was saved. What cannot be written is said.

    more: markdown that the entry ends with.
    """
    saved = save(run)  # before the log names it
    if log:
        from compat.reports.log import LogNotWritten, record

        try:
            for warning in record(log, run, templates, more=more):
                complain(f"{log}: {warning}", run.exit_code)
        except LogNotWritten as error:
            complain(str(error), run.exit_code)
    return saved


def add_template(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--template", metavar="DIR", help="a folder of Jinja templates that replace those of the same name"
    )


def templates_of(options: argparse.Namespace):
    """The templates of --template, read before anything long is begun. Raises Usage."""
    from compat.reports.templating import TemplateBroken, Templates

    try:
        found = Templates(options.template)
        found.check()
    except TemplateBroken as error:
        raise Usage(str(error)) from None
    return found


def write_json(run: Run, where: str) -> bool:
    """Whether it could be written; otherwise that is said."""
    if where == "-":
        sys.stdout.write(store.dumps(run).decode("utf-8"))
        return True
    try:
        store.write_atomic(Path(where), store.dumps(run))
    except OSError as error:
        complain(f"{where} was not written: {error.strerror or error}", run.exit_code)
        return False
    return True
