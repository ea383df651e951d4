"""``compat gate``: may this be merged? Suites, what changed since base, waivers: one verdict."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from compat import store
from compat.combo import choose as choose_combos
from compat.commands import SHAPE, add_asking, add_template, complain, keep, outputs, templates_of
from compat.commands.run import log_path
from compat.result import INCOMPLETE
from compat.suites import choose as choose_suites

APPROVED = "COMPAT_POLICY_APPROVED"
EXIT_CODES = """\
exit codes:
  0  nothing new, or every finding is waived
  1  a new finding, a waiver that does not hold, or a change of policy that nobody approved
  2  wrong usage
  3  could not complete: a side or the base is missing, interrupted, or an error of ours
"""
EXAMPLES = """\
examples:
  compat gate                                   this folder against the merge-base with main
  compat gate ../my-fork --base v0.2            a fork against a tag of its own
  compat gate --base compat/baselines           against the committed locks, which needs no git history
  compat gate --propose                         also write waivers to fill in, and the locks as they are now
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "gate",
        help="may this be merged: checks, comparison with base, waivers",
        formatter_class=SHAPE,
        description="Run the checks on TARGET, compare it with its base, and say whether anything new is in it.\n"
        "Rules, waivers, committed locks and tolerances are those of the base.",
        epilog=EXAMPLES + "\n" + EXIT_CODES,
    )
    command.add_argument("target", nargs="?", default=".", metavar="TARGET", help="as in compat run (default: .)")
    command.add_argument(
        "--base", metavar="REF|LOCK", help="a ref, a lock, or a folder of locks (default: the merge-base with main)"
    )
    command.add_argument("--combo", action="append", metavar="NAME", help="which backbones; may be given again")
    add_asking(command)
    command.add_argument(
        "--approve-policy-change",
        action="store_true",
        help=f"changed rules, waivers, locks and tolerances are agreed to (or set {APPROVED}=1)",
    )
    command.add_argument(
        "--propose", action="store_true", help="write what is new into waivers.toml, and head's locks, for review"
    )
    command.add_argument("--json", metavar="FILE", help="also write the answer here; - prints it instead")
    log = command.add_mutually_exclusive_group()
    log.add_argument("--log", metavar="FILE", help="append the entry here (default: as compat run)")
    log.add_argument("--no-log", action="store_true", help="write no log entry")
    outputs.add_arguments(command)
    add_template(command)
    command.add_argument("-q", "--quiet", action="store_true", help="verdict and findings only")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Choose the base, judge, keep, show."""
    from compat.asking import How
    from compat.base import NoBase, choose
    from compat.combo import load
    from compat.gate import dumps, gate
    from compat.lock import LockFailed
    from compat.reports.gate import show
    from compat.target import TargetError, resolve

    combos, suites = choose_combos(options.combo), choose_suites(None)
    if why := outputs.why_not(options):
        return complain(why, INCOMPLETE)
    try:
        head = resolve(options.target)
        base = choose(head, options.base)
    except (TargetError, NoBase) as error:
        return complain(str(error), error.exit_code)
    if base.locks and not options.combo:
        combos = choose_combos([name for name in load() if name in base.locks] + sorted(set(base.locks) - set(load())))
    log, templates = log_path(options, head.folder), templates_of(options)
    how = How(options.scale, options.python, options.timeout, options.device, options.quiet or options.json == "-")
    approved = options.approve_policy_change or os.environ.get(APPROVED, "").lower() not in ("", "0", "false")
    try:
        found = gate(head, base, combos, suites, how, approved)
    except LockFailed as error:
        return complain(str(error), INCOMPLETE)
    if found.run and found.starts:  # what was known already is kept and logged already
        _keep(found, log, templates)
    if options.propose:
        _propose(found, head, options)
    wrote = outputs.write(options, found.run, found.as_json())
    if options.json == "-":
        sys.stdout.write(dumps(found))
        return found.exit_code if wrote else found.exit_code or INCOMPLETE
    if options.json:
        try:
            store.write_atomic(Path(options.json), dumps(found).encode("utf-8"))
        except OSError as error:
            wrote = False
            complain(f"{options.json} was not written: {error.strerror or error}", INCOMPLETE)
    try:
        show(found, quiet=options.quiet)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return found.exit_code if wrote else found.exit_code or INCOMPLETE


def _keep(found, log: Path | None, templates) -> None:
    """Save the run of the checks with the findings, and log it; what cannot be written is said."""
    from compat.reports.gate import entry

    keep(found.run, log, templates, more=entry(found))


def _propose(found, head, options: argparse.Namespace) -> None:
    """Write entries for what is new into waivers.toml of the judged repository, and head's locks under .compat."""
    from datetime import date

    from compat import lock
    from compat.base import root_of
    from compat.waivers import FILE, HEADER, proposal

    waivers = Path(FILE) if head.source else root_of(head) / FILE
    text = proposal([(item.finding, item.fingerprint, item.combos) for item in found.new], date.today())
    try:
        if text:
            before = waivers.read_text(encoding="utf-8") if waivers.exists() else HEADER
            store.write_atomic(waivers, (before.rstrip("\n") + "\n" + text).encode("utf-8"))
            count = len(found.new)
            print(f"compat: {waivers}: {count} entr{'y' * (count == 1) or 'ies'} to fill in", file=sys.stderr)
        folder = store.RUNS.parent / "proposed"
        store.hide(folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
        for combo, made in found.locks.items():
            lock.write(folder / f"{combo}.json", made)
            print(f"compat: {folder / f'{combo}.json'}: the lock as it is now, for review", file=sys.stderr)
    except OSError as error:
        complain(f"the proposal was not written: {error.strerror or error}", INCOMPLETE)
