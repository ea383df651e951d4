"""``compat log``: what a run cannot do for MODIFICATIONS_LOG.md by itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from compat.commands import SHAPE, Usage, add_template, complain, templates_of
from compat.result import INCOMPLETE, OK, REGRESSION

LOG = "MODIFICATIONS_LOG.md"
EXIT_CODES = """\
exit codes:
  0  done; of check: nothing contradicts the run records
  1  check: something does
  2  wrong usage
  3  could not complete: the log or a record cannot be read or written
"""
EXAMPLES = """\
examples:
  compat log modification --type "Model Addition" --files models/pooling.py --impact "none for old checkpoints"
  compat log sync                               add the entries that could not be written
  compat log import OLD_LOG.md                  an older log into run records
  compat log repair OLD_LOG.md                  put garbled status marks right
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "log",
        help="start a modification's entry, read, repair, check or complete a log",
        formatter_class=SHAPE,
        description="compat run writes the log. These do the rest.",
        epilog=EXAMPLES + "\n" + EXIT_CODES,
    )
    kinds = command.add_subparsers(dest="kind", required=True, metavar="WHAT")
    start = kinds.add_parser("modification", help="start the entry of a modification; the next run completes it")
    start.add_argument("--type", required=True, metavar="TEXT", help='such as "Model Addition"')
    start.add_argument("--files", required=True, nargs="+", metavar="FILE", help="the files that changed")
    start.add_argument("--impact", required=True, metavar="TEXT", help="what it means for compatibility")
    start.add_argument("--title", metavar="TEXT", help="of the entry (default: the type)")
    start.add_argument("--description", default="", metavar="TEXT")
    sync = kinds.add_parser("sync", help="add the entries of runs that could not be written, each once")
    for one in (start, sync):
        one.add_argument("--log", default=LOG, metavar="FILE", help=f"the log (default: {LOG})")
        add_template(one)
    read = kinds.add_parser("import", help="read an existing log into run records")
    read.add_argument("file", metavar="FILE")
    read.add_argument("--target", default=".", metavar="NAME", help="what its runs judged, where it does not say (.)")
    mend = kinds.add_parser("repair", help="put garbled status marks and heading emoji right, and nothing else")
    mend.add_argument("file", metavar="FILE")
    mend.add_argument("-n", "--dry-run", action="store_true", help="say what would change and write nothing")
    check = kinds.add_parser("check", help="say what in a log contradicts the run records")
    check.add_argument("file", nargs="?", default=LOG, metavar="FILE", help=f"default: {LOG}")
    add_template(check)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from compat.reports.log import LogNotWritten

    kind = {
        "modification": modification, "sync": sync, "import": import_, "repair": repair, "check": check,
    }[options.kind]  # fmt: skip
    try:
        return kind(options)
    except LogNotWritten as error:
        return complain(str(error), INCOMPLETE)
    except FileNotFoundError as error:
        raise Usage(f"there is no file {error.filename}") from None
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror or error}", INCOMPLETE)


def modification(options: argparse.Namespace) -> int:
    from compat.reports.log import start_modification

    for name in ("type", "impact"):
        if not getattr(options, name).strip():
            raise Usage(f"--{name} is empty: say it in a few words")
    told = {
        "type": options.type,
        "title": options.title or options.type,
        "files": options.files,
        "impact": options.impact,
        "description": options.description,
    }
    number = start_modification(Path(options.log), told, templates_of(options))
    print(f"{options.log}: modification #{number}; the next run fills in what was tested and the commit")
    return OK


def sync(options: argparse.Namespace) -> int:
    from compat.reports.log import sync

    added = sync(Path(options.log), templates_of(options))
    for id in added:
        print(f"added {id}")
    print(f"{options.log}: {len(added) or 'no'} {'entry' if len(added) == 1 else 'entries'} added")
    return OK


def import_(options: argparse.Namespace) -> int:
    from compat.reports.importing import import_log
    from compat.reports.log import status_line

    found = import_log(Path(options.file), options.target)
    for run in found.new:
        print(f"{run.id}  {status_line(run)}  ({run.source})")
    known = f", {len(found.known)} known already" if found.known else ""
    print(f"{options.file}: {len(found.new)} runs read, {found.pending} of them pending{known}")
    if not found.new and not found.known:
        why = "no line begins with ### Integration Test Run"
        return complain(f"{options.file} holds no entry of a run: {why}", INCOMPLETE)
    return OK


def repair(options: argparse.Namespace) -> int:
    from compat.reports.log import changing
    from compat.reports.repair import repair
    from compat.reports.text import one_line

    path = Path(options.file)
    data = path.read_bytes()
    if options.dry_run:
        found = repair(data)
    else:
        with changing(path) as log:
            found = repair(log.text.encode("utf-8", "surrogateescape"))
            log.text = found.data.decode("utf-8", "surrogateescape")
    for line, before, after, how in found.changes:
        print(f"line {line}: {one_line(before)} -> {after}  ({how})")
    for line, written, why in found.unproved:
        print(f"line {line}: {one_line(written)!r} stays: {one_line(why)}")
    would = "would change" if options.dry_run else "changed"
    print(f"{path}: {len(found.changes)} marks {would}, {len(found.unproved)} places not proved")
    return OK


def check(options: argparse.Namespace) -> int:
    from compat.reports.importing import check
    from compat.reports.text import one_line

    found = check(Path(options.file), templates_of(options))
    for line, words in sorted(found.wrong):
        print(f"{options.file}:{line}: {one_line(words, 600)}")
    if found.unknown:
        print(f"{len(found.unknown)} of {found.entries} entries have no record here (compat log import reads them)")
    print(f"{options.file}: {found.entries} entries, {len(found.wrong)} contradictions")
    return REGRESSION if found.wrong else OK
