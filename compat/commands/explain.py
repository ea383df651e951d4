"""``compat explain``: what a rule means."""

from __future__ import annotations

import argparse

from compat.commands import complain
from compat.result import OK, USAGE


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("explain", help="what a rule means, and how to mend what it finds")
    command.add_argument("rule", nargs="?", metavar="RULE", help="such as LOAD.key_removed; without it, all of them")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from compat.reports.comparison import explain, listing
    from compat.rules import UnknownRule, find_rule

    try:
        print(explain(find_rule(options.rule)) if options.rule else listing())
    except UnknownRule as error:
        return complain(f"{error} (compat explain lists them all)", USAGE)
    return OK
