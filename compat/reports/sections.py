"""The standing sections of a log: what is true now, between markers, written anew by every run.

Unusual: outside the markers not a byte changes, whatever stands there. A log without any marker gets all sections
once, before its first entry; one that has some keeps those, so a section that somebody removed stays removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from compat.reports.history import METRICS, Delta, History, Row, figures, verdict
from compat.reports.templating import Templates
from compat.result import PASSED, SKIPPED, Run

NAMES = ("issues", "coverage", "metrics", "environment", "versions", "tokens", "config")
MARKER = re.compile(r"^[ \t]*<!-- (/?)compat:([a-z]+) -->[ \t]*\r?$", re.MULTILINE)
FENCE = re.compile(r"^[ ]{0,3}(```+|~~~+)", re.MULTILINE)
MOST_TOKENS, MOST_TAGS, MOST_ISSUES = 12, 30, 100

# What people tick in logs of this form -> the tests that answer it: (check, test), test None for all of a check.
COVERAGE: dict[str, dict[str, tuple[tuple[str, str | None], ...]]] = {
    "Core Functionality Tests": {
        "Model initialization from config": (
            ("Config Compatibility", "the built model has the size its config says"),
            ("State Dict Keys", "fresh weights are numbers"),
        ),
        "Model loading from Hub": (("Backbone Loading", None),),
        "Model loading from local path": (
            ("Save Load Methods", "loading finds every tensor"),
            ("Save Load Methods", "the loaded model gives the same logits"),
        ),
        "Forward pass with images": (
            ("Forward Pass Training", "loss is finite"),
            ("Forward Pass Training", "another picture changes the logits"),
        ),
        "Generation with various settings": (("Generate Method", None),),
        "Save/load cycle": (("Save Load Methods", None),),
        "State dict compatibility": (("State Dict Keys", None),),
        "Backward pass and training": (("Backward Pass", None),),
        "Data pipeline": (("Data Pipeline", None),),
    },
    "Edge Cases": {
        "Empty images handling": (
            ("Edge Cases", "a row without a picture gives numbers"),
            ("Edge Cases", "text only and pictured rows share a batch"),
        ),
        "Multiple images per sample": (
            ("Edge Cases", "several pictures keep their order"),
            ("Edge Cases", "every picture of a row counts"),
        ),
        "Image splitting for high-res": (
            ("Edge Cases", "a split picture has the tiles of its grid"),
            ("Edge Cases", "every picture has a token for every feature"),
        ),
        "Long sequence handling": (
            ("Edge Cases", "a row as long as the positions gives numbers"),
            ("Edge Cases", "a longest row still sees its beginning"),
        ),
        "EOS token processing": (
            ("Edge Cases", "after the end token nothing else follows"),
            ("Edge Cases", "a row that ends early leaves the others their length"),
        ),
        "Attention mask variations": (
            ("Edge Cases", "padding does not change a row (left)"),
            ("Edge Cases", "padding does not change a row (right)"),
            ("Edge Cases", "padding carries no labels"),
        ),
    },
}


@dataclass(frozen=True)
class Box:
    """done: every test that answers it passed in the last run of every row that asked; else `why` says."""

    title: str
    done: bool
    why: str


class MarkersBroken(ValueError):
    """Markers that do not pair up; the message names the line."""


# -- what they hold -------------------------------------------------------------------------------------------


def values(history: History, target: str | None = None) -> dict:
    """Everything the section templates show, from the runs of one target (default: of all)."""
    runs = [run for run in history.runs if target is None or run.target.get("label") == target]
    view = History(runs)
    latest = next((run for run in reversed(runs) if run.environment), None)
    tagged = next((run for run in reversed(runs) if run.target.get("tags")), None)
    issues = view.known_issues()
    return {
        "latest": latest,
        "platform": machine(str(latest.environment.get("platform") or "")) if latest else "",
        "issues": issues[:MOST_ISSUES],
        "more_issues": len(issues) - MOST_ISSUES,
        "verdict": verdict,
        "coverage": coverage(view),
        "metrics": metrics(view),
        "versions": versions(tagged, runs) if tagged else [],
        "tokens": [(row, *found) for row in newest_rows(view) if (found := view.latest_fact(row, "special_tokens"))],
        "config": [(row, *found) for row in newest_rows(view) if (found := view.latest_fact(row, "loading_fields"))],
        "MOST_TOKENS": MOST_TOKENS,
    }


def machine(platform: str) -> str:
    """`Linux x86_64` of `Linux-6.1.0-13-amd64-x86_64-with-glibc2.36`: a kernel's build is nobody's news."""
    kind = re.search(r"x86_64|AMD64|aarch64|arm64", platform)
    return f"{platform.partition('-')[0]} {kind[0] if kind else ''}".strip()


def newest_rows(view: History) -> list[Row]:
    return sorted(view.rows, key=lambda row: (row.target, row.combo, row.scale))


def coverage(view: History) -> dict[str, list[Box]]:
    """Every box of COVERAGE, from the last answer of each row that was asked the test.

    A run that only a log tells of names no tests, but a check that fails there fails here.
    """
    last: dict[tuple[str, str], dict[Row, tuple[str, str]]] = {}
    for state in view.known_issues():
        if state.answer.run.source:
            last[(state.check, "as the log says")] = {state.row: (state.status, state.answer.message)}
    for run in view.runs:
        for result in run.results if not run.source else ():
            row = Row(str(run.target.get("label", "")), result.combo, run.scale)
            last.setdefault((result.check, result.test), {})[row] = (result.status, result.message)
    return {group: [box(title, tests, last) for title, tests in boxes.items()] for group, boxes in COVERAGE.items()}


def box(title: str, tests: tuple[tuple[str, str | None], ...], last: dict) -> Box:
    asked = 0
    skipped = ""
    for check, test in tests:
        found = {key: rows for key, rows in last.items() if key[0] == check and test in (None, key[1])}
        if not found:
            return Box(title, False, f"not asked: {check}" + (f", {test}" if test else ""))
        for (_, name), rows in found.items():
            for row, (status, message) in rows.items():
                if status == SKIPPED:
                    skipped = skipped or f"skipped under {row.combo}: {message}"
                elif status != PASSED:
                    return Box(title, False, f"{status} under {row.combo}: {check}, {name}")
                else:
                    asked += 1
    return Box(title, asked > 0, "" if asked else skipped)


def metrics(view: History) -> list[tuple[Row, Run, list[Delta]]]:
    """The newest figures of each row, beside those of the measured run before."""
    found = []
    for row in newest_rows(view):
        measured = [run for run in view.of(row) if figures(run, row.combo)]
        if measured:
            now = figures(measured[-1], row.combo)
            old = figures(measured[-2], row.combo) if len(measured) > 1 else {}
            deltas = [Delta(row, m, old.get(m.name), now[m.name]) for m in METRICS if m.name in now]
            found.append((row, measured[-1], deltas))
    return found


def versions(tagged: Run, runs: list[Run]) -> list[dict]:
    """The tags that the newest run saw, each with the last run at its commit."""
    found = []
    for tag in tagged.target["tags"][:MOST_TAGS]:
        if isinstance(tag, dict) and tag.get("commit"):
            at = [run for run in runs if run.target.get("commit") == tag["commit"] and not run.target.get("dirty")]
            found.append({**tag, "run": at[-1] if at else None})
    return found


def newline_of(text: str) -> str:
    """The line ending that most of its lines have."""
    return "\r\n" if text.count("\r\n") * 2 > text.count("\n") else "\n"


# -- where they stand -----------------------------------------------------------------------------------------


def fenced(text: str) -> list[tuple[int, int]]:
    """Spans inside fenced code. A fence that nothing closes is text."""
    spans, open_at, kind = [], None, ""
    for match in FENCE.finditer(text):
        if open_at is None:
            open_at, kind = match.start(), match[1]
        elif match[1][0] == kind[0] and len(match[1]) >= len(kind):
            spans.append((open_at, match.end()))
            open_at = None
    return spans


def places(text: str, names: tuple[str, ...] = NAMES) -> list[tuple[str, int, int]]:
    """(name, start, end) of what stands between each pair of markers. Raises MarkersBroken."""
    spans = fenced(text)
    found, opened = [], None
    for match in MARKER.finditer(text):
        closing, name = bool(match[1]), match[2]
        if name not in names or any(start <= match.start() < end for start, end in spans):
            continue
        line = text.count("\n", 0, match.start()) + 1
        if closing:
            if opened is None or opened[0] != name:
                raise MarkersBroken(f"line {line}: <!-- /compat:{name} --> closes nothing")
            found.append((name, opened[1], match.start()))
            opened = None
        elif opened:
            raise MarkersBroken(f"line {line}: <!-- compat:{name} --> begins before compat:{opened[0]} has ended")
        else:
            opened = (name, min(match.end() + 1, len(text)), line)
    if opened:
        raise MarkersBroken(f"line {opened[2]}: <!-- compat:{opened[0]} --> is never closed")
    return found


def rendered(history: History, templates: Templates, target: str | None = None) -> dict[str, str]:
    """{name: text} of every section."""
    given = values(history, target)
    return {name: templates.render(f"section_{name}.md.j2", **given).strip("\n") + "\n" for name in NAMES}


def updated(text: str, sections: dict[str, str]) -> str:
    """`text` with the sections between its markers. Raises MarkersBroken, and then nothing is to be changed."""
    newline = newline_of(text)
    out, at = [], 0
    for name, start, end in places(text):
        out += [text[at:start], sections[name].replace("\n", newline)]
        at = end
    return "".join([*out, text[at:]])


def with_markers(text: str, block: str) -> str:
    """`text` with the sections' headings and markers put before its first entry, unless it has any marker."""
    if any(match[2] in NAMES for match in MARKER.finditer(text)):
        return text
    newline = newline_of(text)
    block = block.replace("\n", newline)
    first = re.search(r"^---[ \t]*\r?\n\s*### (?:Integration Test Run - |Modification #)\d", text, re.MULTILINE)
    at = first.start() if first else len(text)
    before, after = text[:at], text[at:]
    if before and not before.endswith("\n"):
        before += newline
    if before.strip() and not re.search(r"\n[ \t]*\r?\n$", before):
        before += newline
    return before + block + (newline if after else "") + after
