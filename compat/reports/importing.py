"""An existing log into run records, and what a log says against them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from compat import store
from compat.reports import entries, sections
from compat.reports.entries import Entry
from compat.reports.history import History
from compat.reports.log import OWN, entry
from compat.reports.templating import TemplateBroken, Templates
from compat.result import Run

CONFLICT = re.compile(r"^(<<<<<<<|=======|>>>>>>>)( |$)", re.MULTILINE)


@dataclass
class Imported:
    """new: records that were written. known: entries whose record was there. pending: of the new, those not run."""

    new: list[Run] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return sum(not any(result.status != "skipped" for result in run.results) for run in self.new)


def read(path: Path) -> str:
    """A log's text; bytes that are no UTF-8 stay recognisable. Raises OSError."""
    return Path(path).read_bytes().decode("utf-8", "surrogateescape")


def import_log(path: Path, label: str = OWN, folder: Path = store.RUNS) -> Imported:
    """Write a record for every entry of a log that has none. Raises OSError."""
    found = Imported()
    there = {file.stem for file in store.all_runs(folder)}
    for told in entries.parse(read(path)):
        run = entries.as_run(told, label, entries.source_of(str(path), told.line))
        if run.id in there:
            found.known.append(run.id)
            continue
        store.save(run, folder)
        there.add(run.id)
        found.new.append(run)
    return found


# -- check ----------------------------------------------------------------------------------------------------


@dataclass
class Audit:
    """wrong: (line, what contradicts the records); line 0 for the log as a whole. unknown: entries without a record."""

    entries: int = 0
    wrong: list[tuple[int, str]] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)


def check(path: Path, templates: Templates | None = None, folder: Path = store.RUNS) -> Audit:
    """What in a log contradicts the run records. Raises OSError."""
    text, history = read(path), History.read(folder)
    records = {run.id: run for run in history.runs}
    told = entries.parse(text)
    found = Audit(len(told))
    seen: dict[str, int] = {}
    for one in told:
        id = entries.as_run(one, OWN).id
        if id in seen:
            found.wrong.append((one.line, f"run {id} stands here again; it is in line {seen[id]} already"))
            continue
        seen[id] = one.line
        if id not in records:
            found.unknown.append(one.line)
            continue
        found.wrong += [(one.line, words) for words in contradictions(one, records[id])]
    for match in CONFLICT.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if not any(a <= match.start() < b for a, b in sections.fenced(text)):
            found.wrong.append((line, f"a merge left {match[1]} behind"))
    for run in history.runs:
        if run.log and Path(run.log["path"]).resolve() == Path(path).resolve() and run.id not in seen:
            if not run.log["entry"] or run.log["entry"].strip() not in text.replace("\r\n", "\n"):
                found.wrong.append((0, f"run {run.id} was to be logged here and is not: compat log sync adds it"))
    if not found.unknown:  # else sections may rest on runs that are kept elsewhere
        found.wrong += stale_sections(text, history, templates or Templates())
    return found


def contradictions(told: Entry, run: Run) -> list[str]:
    """What an entry says otherwise than its record, both values in each sentence."""
    said = entries.as_run(told, OWN)
    # What the record would say in a log: the same bounds and the same cleaning on both sides.
    meant = said if run.source else entries.as_run(entries.parse(entry(run, os.devnull))[0], OWN)
    found = []
    pairs = [
        ("time", said.started, run.started),
        ("target", str(said.target["label"]), str(meant.target["label"])),
        ("commit", said.target["commit"], meant.target["commit"]),
        *((name, said.environment.get(name), meant.environment.get(name)) for name in ("device", "torch", "gpu")),
    ]
    for name, here, there in pairs:
        if here != there:
            found.append(f"{name} is {here} in the log, {there} in run {run.id}")
    record = run if run.source else meant
    here = {(r.combo, r.check): (r.status, r.message) for r in said.results}
    there = {(r.combo, r.check): (r.status, r.message) for r in record.results}
    for key in [*there, *(key for key in here if key not in there)]:
        name = f"{key[1]} ({key[0]})"
        if key not in here or key not in there:
            where = "the log" if key in here else f"run {run.id}"
            found.append(f"{name} is in {where} alone")
        elif here[key][0] != there[key][0]:
            found.append(f"{name} {here[key][0]} in the log, {there[key][0]} in run {run.id}")
        elif here[key][1] != there[key][1]:
            found.append(f"{name} says {here[key][1]!r} in the log, {there[key][1]!r} in run {run.id}")
    if told.status and counts(told) and counts(told) != told_counts(told):
        found.append(f"the status says {told.status}, the list below it {'/'.join(map(str, counts(told)))} passed")
    return found


def counts(told: Entry) -> tuple[int, int]:
    """(passed, asked) in the list of an entry."""
    asked = [status for _, _, status, _ in told.checks if status != "skipped"]
    return sum(status == "passed" for status in asked), len(asked)


def told_counts(told: Entry) -> tuple[int, int]:
    """(passed, asked) as the status line says; All Passed is all of the list."""
    match = re.search(r"(\d+)/(\d+) Passed", told.status)
    if match:
        return int(match[1]), int(match[2])
    passed, asked = counts(told)
    return (asked, asked) if "All Passed" in told.status else (passed, asked)


def stale_sections(text: str, history: History, templates: Templates) -> list[tuple[int, str]]:
    """Sections that say something else than the runs do."""
    history = history.with_runs(entries.as_run(found, OWN) for found in entries.parse(text))
    labels = [row.target for row in history.rows]
    target = OWN if OWN in labels or not labels else labels[-1]
    try:
        wanted = sections.rendered(history, templates, target)
        places = sections.places(text)
    except sections.MarkersBroken as error:
        return [(0, f"markers do not pair up: {error}")]
    except TemplateBroken as error:
        return [(0, str(error))]
    return [
        (text.count("\n", 0, start) + 1, f"the section {name} is not what the runs say; the next run writes it anew")
        for name, start, end in places
        if text[start:end].replace("\r\n", "\n").strip() not in (wanted[name].strip(), "")
    ]
