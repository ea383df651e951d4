"""The commands of ``compat``, a file each: ``add`` describes the arguments, ``run`` does the work.

Unusual: a command imports pytest, rich, numpy and the rest inside ``run``, so that ``--help`` and commands
that only read answer at once. What several commands share stands here.
"""

from __future__ import annotations

import argparse
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


def add_asking(command: argparse.ArgumentParser, scale: str | None = "tiny") -> None:
    """Options of every command that asks a target: its scale (None: the lock's), interpreter, limit, device."""
    add = command.add_argument
    implied = "tiny: same shape, small sizes (default)" if scale else "tiny or full (default: the lock's, or tiny)"
    add("--scale", choices=SCALES, default=scale, help=f"{implied}; full: real sizes" if scale else implied)
    add("--python", metavar="PATH", help="the interpreter the target runs in (default: this one)")
    add("--timeout", type=seconds, default=60.0, metavar="S", help="seconds a question may take (default: 60)")
    add("--device", choices=("cpu", "cuda"), default="cpu")


def complain(message: str, code: int) -> int:
    print(f"compat: {message}", file=sys.stderr)
    return code


def save(run: Run) -> bool:
    try:
        store.save(run)
    except OSError as error:
        complain(f"the run was not saved in {store.RUNS}: {error.strerror or error}", run.exit_code)
        return False
    return True


def write_json(run: Run, where: str) -> None:
    if where == "-":
        sys.stdout.write(store.dumps(run).decode("utf-8"))
        return
    try:
        store.write_atomic(Path(where), store.dumps(run))
    except OSError as error:
        complain(f"{where} was not written: {error.strerror or error}", run.exit_code)
