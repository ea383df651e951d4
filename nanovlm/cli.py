"""The command line: parse, call, print, exit code. Answers go to stdout, everything else to stderr.

Exit codes: 0 done, 2 a mistake in what was given, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from nanovlm import __version__
from nanovlm.commands.generate import EXAMPLE
from nanovlm.errors import NanoVLMError

COMMANDS = ("generate", "train", "validate", "convert", "vram", "flops", "evaluate", "slim")  # of nanovlm.commands
USAGE = 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except NanoVLMError as error:
        print(f"nanovlm: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else the interpreter complains at exit
        return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="nanovlm", description="A small vision-language model.", epilog=EXAMPLE)
    top.add_argument("--version", action="version", version=f"nanovlm {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"nanovlm.commands.{name}").add(commands)
    return top
