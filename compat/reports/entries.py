"""A log read back: its entries as people and `compat` wrote them, with line numbers; and an entry as a Run.

Unusual: a log is written by hand too, merged by union and garbled by editors, so the reader takes what it
recognises and never refuses a file. Only what stands in an entry's own form counts as one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePath

from compat.reports.history import UNKNOWN
from compat.reports.marks import STATUS, leading_mark
from compat.result import ERROR, FAILED, PASSED, Result, Run

RUN = re.compile(r"### Integration Test Run - (\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)( UTC)?\s*$")
PENDING = re.compile(r"### Test Run #(\d+) - (.+?) \((\d{4}-\d\d-\d\d)\)\s*$")
FIELD = re.compile(r"- \*\*([^*]+)\*\*:\s*(.*)$")
ITEM = re.compile(r"(\s*)- (.*)$")
GROUP = re.compile(r"\*\*Test Results\*\*(?: \(([^)]*)\))?:\s*$")
END = re.compile(r"(?:#{1,3} |---\s*$)")
RUN_ID = re.compile(r"(\d{8}T\d{6}Z-[0-9a-f]{6})\.json")
DETAIL = re.compile(r"(Error|Harness error|Skipped):\s*(.*)$", re.DOTALL)
OPENED = re.compile(r"\s+- (?:Error|Harness error|Skipped): `")
MOST_ERROR_LINES = 100
ENVIRONMENT = {"Device": "device", "PyTorch": "torch", "Python": "python", "Transformers": "transformers", "GPU": "gpu"}
WHY = {FAILED: "failed; the log says no more", ERROR: "not judged; the log says no more"}


@dataclass
class Entry:
    """A run as its log tells it. line: of the heading, from 1. checks: (combo, title, status, text)."""

    line: int
    title: str
    started: str  # ISO 8601
    zoned: bool  # the log names the time zone; else it is taken for UTC
    timed: bool  # the log names the time of day
    fields: dict[str, str] = field(default_factory=dict)
    checks: list[tuple[str, str, str, str]] = field(default_factory=list)
    status: str = ""  # the Status line, its mark put right
    text: str = ""

    @property
    def id(self) -> str | None:
        """Of the run's record, where the entry names it."""
        match = RUN_ID.search(self.fields.get("Run", ""))
        return match[1] if match else None


def parse(text: str) -> list[Entry]:
    """Every entry of a log, in the order they stand there."""
    lines = text.split("\n")
    found, at = [], 0
    while at < len(lines):
        entry = heading(lines[at].rstrip("\r"), at + 1)
        at += 1
        if entry:
            end = at
            while end < len(lines) and not END.match(lines[end]):
                end = after_span(lines, end) + 1
            body = [line.rstrip("\r") for line in lines[at:end]]
            read_body(entry, body)
            entry.text = "\n".join([lines[at - 1].rstrip("\r"), *body]).rstrip()
            found.append(entry)
            at = end
    return found


def after_span(lines: list[str], at: int) -> int:
    """The line on which an error's code span that begins on line `at` ends; `at` itself for any other line."""
    if OPENED.match(lines[at]) and lines[at].count("`") == 1:
        for end in range(at + 1, min(len(lines), at + MOST_ERROR_LINES)):
            if RUN.match(lines[end]) or ITEM.match(lines[end]):
                break
            if "`" in lines[end]:
                return end
    return at


def heading(line: str, number: int) -> Entry | None:
    try:
        if match := RUN.match(line):
            started = datetime.fromisoformat(f"{match[1]}T{match[2]}+00:00")
            return Entry(number, line[4:].strip(), started.isoformat(), bool(match[3]), True)
        if match := PENDING.match(line):
            started = datetime.fromisoformat(f"{match[3]}T00:00:00+00:00")
            return Entry(number, line[4:].strip(), started.isoformat(), False, False)
    except ValueError:  # a month 13: no date, so no entry
        pass
    return None


def read_body(entry: Entry, body: list[str]) -> None:
    """Fields, then the checks below `**Test Results**` or a `Results` field, each with the text under it."""
    combo, listing, at = "", False, 0
    while at < len(body):
        line = body[at]
        at += 1
        if match := GROUP.match(line):
            combo, listing = match[1] or "", True
        elif line.startswith("**"):
            listing = False
        elif match := FIELD.match(line):
            entry.fields[match[1].strip()] = match[2].strip()
            listing = match[1].strip() == "Results"
        elif listing and (match := ITEM.match(line)):
            check = item(match[2])
            if check:
                said, at = detail(body, at)
                entry.checks.append((combo, check[0], check[1], said or check[2]))
    mark = leading_mark(entry.fields.get("Status", ""))
    entry.status = f"{mark[0]} {mark[2]}" if mark else entry.fields.get("Status", "")


def item(text: str) -> tuple[str, str, str] | None:
    """(title, status, words) of `✅ Title` or of `Title: ⏳ words`."""
    if mark := leading_mark(text):
        return mark[2].strip(), STATUS[mark[0]], ""
    title, colon, rest = text.partition(":")
    mark = leading_mark(rest.strip()) if colon else None
    return (title.strip(), STATUS[mark[0]], mark[2].strip()) if mark else None


def detail(body: list[str], at: int) -> tuple[str, int]:
    """The text of `Error: ...` under a check, over as many lines as its code span has, and where it ends."""
    if at >= len(body) or not (match := ITEM.match(body[at])) or not match[1]:
        return "", at
    match = DETAIL.match(match[2])
    if not match:
        return "", at
    said, at = match[2], at + 1
    if said.startswith("`"):
        while said.count("`") < 2 and at < len(body) and not re.match(r"- |\*\*", body[at]):
            said, at = f"{said}\n{body[at]}", at + 1
    return said.strip().strip("`").strip(), at


def as_run(entry: Entry, label: str, source: str = "its log") -> Run:
    """The entry as a run's record. Its id is made from what it says, so the same entry, repaired, is the same run."""
    moment = datetime.fromisoformat(entry.started).astimezone(UTC)
    told = repr((entry.title, entry.checks, entry.fields.get("Device"), entry.fields.get("PyTorch")))
    digest = hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:6]
    run = Run(
        entry.id or f"{moment:%Y%m%dT%H%M%SZ}-{digest}",
        moment.isoformat(timespec="seconds"),
        {"label": unspan(entry.fields.get("Target", "")) or label, **commit_of(entry)},
        *scale_and_combos(entry),
    )
    run.environment = {
        key: plain(entry.fields[name]) for name, key in ENVIRONMENT.items() if plain(entry.fields.get(name, ""))
    }
    alone = run.combos[0] if len(run.combos) == 1 else UNKNOWN
    for combo, title, status, said in entry.checks:
        if status != PASSED and not said.strip():
            said = WHY.get(status, "pending")
        run.results.append(Result(title, entry.title, status, said if status != PASSED else "", combo=combo or alone))
    run.incomplete = unspan(entry.fields.get("Incomplete", ""))
    run.source = source
    if not entry.timed:
        run.notes.append("the log names the day alone, not the time")
    elif not entry.zoned:
        run.notes.append("the log names no time zone; the time is taken for UTC")
    return run


def scale_and_combos(entry: Entry) -> tuple[str, list[str]]:
    match = re.fullmatch(r"(.+) \((\w+)\)", entry.fields.get("Combo", ""))
    return (match[2], match[1].split(", ")) if match else (UNKNOWN, [UNKNOWN])


def commit_of(entry: Entry) -> dict:
    match = re.match(r"`?([0-9a-f]{7,40})`?( \(dirty\))?$", entry.fields.get("Git Commit", ""))
    return {"commit": match[1], "dirty": bool(match[2])} if match else {"commit": None, "dirty": None}


def plain(text: str) -> str:
    return "" if text in ("unknown", "none", "(To be filled)") else text


def unspan(text: str) -> str:
    return text.strip().strip("`").strip()


def source_of(name: str, line: int) -> str:
    return f"{PurePath(name).name}:{line}"
