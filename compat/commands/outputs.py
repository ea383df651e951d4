"""--junit, --sarif and --comment, and what GitHub Actions is told: the same for every command that judges."""

from __future__ import annotations

import argparse
from pathlib import Path

from compat import actions, store
from compat.commands import Usage, complain, unwritable
from compat.result import INCOMPLETE, Run

FILES = ("junit", "sarif", "comment")


def add_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("for other programs")
    group.add_argument("--junit", metavar="FILE", help="also write JUnit XML here")
    group.add_argument("--sarif", metavar="FILE", help="also write SARIF 2.1.0 here, for code scanning")
    group.add_argument("--comment", metavar="FILE", help="also write a pull-request comment (Markdown) here")


def asked(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(flag, file) of every output that is a file, --json among them. Raises Usage where two are one file."""
    files = [(f"--{name}", where) for name in ("json", *FILES) if (where := getattr(options, name)) and where != "-"]
    seen: dict[Path, str] = {}
    for flag, where in files:
        other = seen.setdefault(Path(where).resolve(), flag)
        if other != flag:
            raise Usage(f"{other} and {flag} both name {where}; give each a file of its own")
    if dash := [f"--{name}" for name in FILES if getattr(options, name) == "-"]:
        raise Usage(f"{dash[0]} - : only --json prints; name a file")
    return files


def why_not(options: argparse.Namespace) -> str:
    """Why an output cannot be written, "" where all can; asked before a target is."""
    return next((why for flag, where in asked(options) if (why := unwritable(where, flag))), "")


def write(options: argparse.Namespace, run: Run | None, gate: dict | None = None) -> bool:
    """Write what was asked for, and tell GitHub Actions; whether all could be written. What could not is said."""
    from compat.reports import annotations, comment, junit, machine, sarif
    from compat.reports.history import History

    items = machine.of_gate(gate) if gate else machine.of_run(run) if run else []
    kind = "gate" if gate else "run"
    complete = not gate["incomplete"] if gate else run is not None and not run.incomplete
    root, markdown = annotations.root(), ""
    if options.comment or actions.here():
        summary = History.read().with_runs([run]).summary(run) if run else None
        markdown = comment.of_gate(gate, summary) if gate else comment.of_run(summary) if summary else ""
    made = {
        "junit": lambda: junit.dumps(run, items, machine.accepted(gate) if gate else None),
        "sarif": lambda: sarif.dumps(items, run, root, kind, complete),
        "comment": lambda: comment.sticky(kind, markdown).encode("utf-8", "replace"),
    }
    wrote = True
    for name, dumps in made.items():
        where = getattr(options, name)
        try:
            if where:
                store.write_atomic(Path(where), dumps())
        except OSError as error:
            wrote = False
            complain(f"{where} was not written: {error.strerror or error}", INCOMPLETE)
    if actions.here():
        options.told = annotations.lines(items, run, root)
        try:
            annotations.append_summary(markdown)
        except OSError as error:
            complain(f"the job summary was not written: {error.strerror or error}", INCOMPLETE)
    return wrote
