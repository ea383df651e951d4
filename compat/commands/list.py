"""``compat list``: what there is to choose from."""

from __future__ import annotations

import argparse

from compat.combo import load
from compat.result import OK
from compat.suites import catalogue


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("list", help="what there is to choose from: combos and checks")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    print("combos (--combo)")
    for combo in load().values():
        print(f"  {combo.name:18} {combo.vision} + {combo.language}{'  (default)' if combo.default else ''}")
    print("\nchecks (--suite)")
    for suite in catalogue():
        print(f"  {suite.name:14} {suite.title:28} {suite.about}")
    return OK
