"""``compat bisect``: the first commit at which something appears."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from compat import store
from compat.combo import choose as choose_combos
from compat.commands import SHAPE, add_asking, complain, unwritable
from compat.reports.text import one_line
from compat.result import INCOMPLETE, OK, USAGE
from compat.suites import choose as choose_suites

EXIT_CODES = """\
exit codes:
  0  the first commit is found
  2  wrong usage: the ends do not fit together
  3  could not complete: commits that cannot be judged hide it, it comes and goes, or an error of ours
"""
EXAMPLES = """\
examples:
  compat bisect --good v0.1 --bad main --rule LOAD.key_removed ../my-fork
  compat bisect --good v0.1 --bad HEAD --suite generate
  compat bisect --good v0.1 --bad HEAD          whatever the gate would stop
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "bisect",
        help="find the first commit at which something appears",
        formatter_class=SHAPE,
        description="Ask commits between GOOD and BAD of TARGET's repository, each once, until one is left.",
        epilog=EXAMPLES + "\n" + EXIT_CODES,
    )
    command.add_argument("target", nargs="?", default=".", metavar="TARGET", help="as in compat run (default: .)")
    command.add_argument("--good", required=True, metavar="REF", help="a commit that does not show it")
    command.add_argument("--bad", required=True, metavar="REF", help="a later one that does")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--rule", metavar="RULE", help="a finding of this rule against GOOD (see compat explain)")
    what.add_argument("--suite", metavar="NAME", help="a failure of this check (see compat list)")
    command.add_argument("--combo", metavar="NAME", help="which backbones (default: the first default of compat list)")
    add_asking(command)
    command.add_argument("--json", metavar="FILE", help="also write the answer here; - prints it instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from compat.asking import How
    from compat.bisect import Bisection, NotBisectable
    from compat.checkout import CheckoutError, repository
    from compat.lock import LockFailed
    from compat.rules import UnknownRule, find_rule
    from compat.target import TargetError, resolve

    combo = choose_combos([options.combo] if options.combo else None)[0]
    suite = choose_suites([options.suite])[0] if options.suite else None
    if why := unwritable(options.json):
        return complain(why, INCOMPLETE)
    how = How(options.scale, options.python, options.timeout, options.device, quiet=True)
    try:
        rule = find_rule(options.rule).id if options.rule else None
        target = resolve(options.target)
        if repository(target.source or target.folder) is None:
            return complain(f"{target.label} is in no git repository: there are no commits to ask", USAGE)
        said = lambda text: print(f"compat: {text}", file=sys.stderr, flush=True)  # noqa: E731
        found = Bisection(target, combo, how, rule, suite, said).search(options.good, options.bad)
    except UnknownRule as error:
        return complain(str(error), USAGE)
    except (TargetError, CheckoutError, NotBisectable) as error:
        return complain(str(error), error.exit_code)
    except LockFailed as error:
        return complain(str(error), INCOMPLETE)
    code = OK if found.first and not found.contradictions else INCOMPLETE
    text = json.dumps(asdict(found) | {"exit_code": code}, indent=1, ensure_ascii=False) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return code
    if options.json:
        try:
            store.write_atomic(Path(options.json), text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            code = complain(f"{options.json} was not written: {error.strerror or error}", INCOMPLETE)
    show(found)
    return code


def show(found) -> None:
    """The culprit or the suspects first, then what was skipped, then what speaks against it."""
    if found.first:
        print(f"FIRST: {one_line(found.names[found.first.commit])}")
        for text in found.first.why[:6]:
            print(f"  {one_line(text, 400)}")
        if len(found.first.why) > 6:
            print(f"  and {len(found.first.why) - 6} more")
    else:
        print(f"ONE OF {len(found.suspects)}: commits that cannot be judged hide which")
        for commit in found.suspects:
            print(f"  {one_line(found.names[commit])}")
    if found.skipped:
        print("\nSkipped: cannot be judged")
        for one in found.skipped:
            print(f"  {one_line(found.names[one.commit])}: {one_line(one.why[0], 200)}")
    if found.contradictions:
        print("\nIt does not stay once it appeared, so there is more than one first commit")
        for text in found.contradictions:
            print(f"  {one_line(text)}")
    print(f"\n{len(found.asked)} commits asked, {found.starts} processes started for them")
