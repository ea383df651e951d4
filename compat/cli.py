"""The command line: parse, call, print, exit code. Results on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

from compat.actions import commands_stopped, say
from compat.combo import UnknownCombo
from compat.commands import SHAPE, Usage, complain
from compat.parallel import terminable
from compat.result import INCOMPLETE, USAGE
from compat.suites import UnknownSuite

# a module of compat.commands each
COMMANDS = (
    "run", "gate", "compare", "lock", "explain", "bisect", "migrate", "mutate", "log", "report", "list", "doctor",
)  # fmt: skip
EXIT_CODES = """\
exit codes:
  0  nothing speaks against the target
  1  a check failed or something broke: the target's doing
  2  wrong usage
  3  could not complete: nothing could be asked, interrupted, or an error of ours
"""


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        "compat",
        description="Judge a nanoVLM-style model in a process of its own.",
        epilog=EXIT_CODES,
        formatter_class=SHAPE,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"compat.commands.{name}").add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (each command's help has them). argparse itself exits with 2."""
    options = parser().parse_args(argv)
    options.told = []  # workflow commands for GitHub Actions, which the target cannot add to
    data = "-" in [value for value in vars(options).values() if isinstance(value, str)]
    with commands_stopped(data):
        code = _run(options)
    say(options.told, data)
    return code


def _run(options: argparse.Namespace) -> int:
    try:
        with terminable():
            code = options.run(options)
        sys.stdout.flush()  # a full disk or a closed pipe behind stdout shows here, not after the exit code is set
        return code
    except (UnknownCombo, UnknownSuite, Usage) as error:
        return complain(str(error), USAGE)
    except KeyboardInterrupt:
        return complain("interrupted before anything was answered", INCOMPLETE)
    except BrokenPipeError:  # the reader had enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INCOMPLETE
    except Exception as error:  # Python would exit with 1, which says that the target failed
        traceback.print_exc()
        return complain(f"an error of ours, no verdict on the target: {type(error).__name__}: {error}", INCOMPLETE)
