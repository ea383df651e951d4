"""The page: one file that needs no network, no script to be read, and stays small however many runs there are.

Unusual: what it may load is named by hash in its own policy, so nothing that a target says could run even if it got
past the escaping. The page is made to fit: outputs are cut first, then the oldest runs' details, and it says so.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

from compat.reports import charts
from compat.reports.history import (
    BAD,
    METRICS,
    UNKNOWN,
    Delta,
    History,
    Row,
    Summary,
    change,
    figures,
    not_run,
    rows_of,
    shown,
    verdict,
)
from compat.reports.log import commit_of, spelled, status_line
from compat.reports.templating import Templates
from compat.reports.text import one_line, printable
from compat.result import FAILED, PASSED, SKIPPED, Run

LIMIT_BYTES = 500_000
DETAILED = 200  # runs with their environment and output in the page; all are in the charts
TAIL_CHARS = 1024
ENVIRONMENT = ("python", "torch", "transformers", "device", "gpu")
GLYPH = {PASSED: "✓", FAILED: "✗", "error": "!", SKIPPED: "–"}
SAID = {PASSED: "passed", FAILED: "failed", "error": "not judged", SKIPPED: "skipped"}
WORDS = {"passed": "Passed", "failed": "Failed", "incomplete": "Incomplete", "pending": "Pending"}
MOST_FAILURES, MOST_FINDINGS, MOST_REASONS = 5, 200, 60


@dataclass(frozen=True)
class Cell:
    """A place in the matrix; status None where the row was never asked the check."""

    status: str | None
    run: str = ""
    title: str = ""


def page(history: History, templates: Templates | None = None, folder: str = ".compat/runs") -> str:
    """The page for these runs. Raises TemplateBroken, ValueError without runs."""
    if not history.runs:
        raise ValueError("there are no runs to show")
    templates = templates or Templates()
    view = View(history, folder)
    for detailed, tail in ((DETAILED, TAIL_CHARS), (DETAILED, 512), (DETAILED, 160), (100, 160), (40, 80), (10, 0)):
        text = render(view, templates, detailed, tail)
        if len(text.encode("utf-8")) < LIMIT_BYTES:
            break
    return text


def render(view: View, templates: Templates, detailed: int, tail: int) -> str:
    style, script = (templates.render(name).strip() for name in ("page.css.j2", "page.js.j2"))
    return templates.render(
        "page.html.j2",
        view=view,
        runs=[view.run(run, tail) for run in view.newest[:detailed]],
        left_out=len(view.newest) - detailed,
        linked={run.id for run in view.newest[:detailed]},
        combos=sorted({combo for run in view.newest for combo in run.combos}),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        GLYPH=GLYPH,
        SAID=SAID,
        WORDS=WORDS,
        MOST_FINDINGS=MOST_FINDINGS,
    )


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def told_rows(history: History, told: set[Row]) -> list[Row]:
    """The rows that still say something, in the history's order."""
    return [row for row in history.rows if row in told]


class View:
    """What the template shows, ready made: strings, cells and charts."""

    def __init__(self, history: History, folder: str):
        self.history, self.folder = history, folder
        self.newest = history.runs[::-1]
        self.made = f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}"
        self.states = {(state.row, state.check): state for state in history.current()}
        self.failing = [state for state in self.states.values() if state.status in BAD]
        self.new = [state for state in self.failing if state.new]
        self.still = [state for state in self.failing if not state.new]
        told = {row for row, _ in self.states}
        self.targets = list(dict.fromkeys(row.target for row in told_rows(history, told)))
        self.rows = {
            target: [row for row in told_rows(history, told) if row.target == target] for target in self.targets
        }
        self.unread = [one_line(text) for text in history.unread]
        compared = history.last_comparison()
        self.compared = compared
        self.comparison: Summary | None = history.summary(compared) if compared else None
        self.last = {row: history.of(row)[-1] for row in history.rows}

    # -- verdict --------------------------------------------------------------------------------------------

    @property
    def verdict(self) -> str:
        """Of everything as it stands now."""
        against = self.comparison and self.comparison.breakages and self.compared in self.last.values()
        if against or any(state.status == FAILED for state in self.failing):
            return "failed"
        cut_short = any(verdict(run) == "incomplete" for row, run in self.last.items() if row.combo != UNKNOWN)
        return "incomplete" if self.failing or cut_short else "passed"

    @property
    def headline(self) -> str:
        checks = len(self.states)
        failing = len(self.failing)
        skipped = sum(state.status == SKIPPED for state in self.states.values())
        words = f"{checks - failing - skipped} of {checks} checks pass"
        words += f", {failing} {'fails' if failing == 1 else 'fail'}" if failing else ""
        words += f", {skipped} skipped" if skipped else ""
        rows = sum(len(rows) for rows in self.rows.values())
        return f"{words}, in {rows} combo{'s' * (rows != 1)}"

    def name(self, row: Row) -> str:
        return one_line(row.combo, 60) + ("" if row.scale in ("tiny", "unknown") else f" ({one_line(row.scale, 20)})")

    def checks(self, target: str) -> list[str]:
        return list(dict.fromkeys(check for row, check in self.states if row in self.rows[target]))

    def cell(self, row: Row, check: str) -> Cell:
        state = self.states.get((row, check))
        if state is None:
            return Cell(None)
        return Cell(state.status, state.answer.run.id, one_line(state.answer.message, 160))

    # -- not run --------------------------------------------------------------------------------------------

    def not_run(self) -> list[tuple[str, list[str]]]:
        """(reason, what was not run for it) of the newest run of each row, equal reasons once."""
        reasons: dict[str, dict[str, None]] = {}
        for row, run in self.last.items():
            for one in not_run(run):
                if one.combo in ("", row.combo):
                    what = ", ".join(filter(None, (one_line(one.check, 60), one_line(one.what, 120))))
                    where = f" ({self.name(row)})" if len(self.history.rows) > 1 else ""
                    reasons.setdefault(one_line(one.why, 300), {})[what + where] = None
        return [(why, list(what)) for why, what in reasons.items()][:MOST_REASONS]

    # -- trend ----------------------------------------------------------------------------------------------

    def costs(self, row: Row) -> list[dict]:
        found = []
        for metric in METRICS:
            series = self.history.series(row, metric.name)
            if series:
                values = [value for _, value in series]
                old = values[-2] if len(values) > 1 else None
                delta = Delta(row, metric, old, values[-1])
                low, high = shown(metric, min(values)), shown(metric, max(values))
                label = f"{metric.title}: {shown(metric, values[-1])}, from {low} to {high} in {len(values)} runs"
                found.append(
                    {
                        "metric": metric,
                        "value": shown(metric, values[-1]),
                        "change": change(delta),
                        "worse": delta.worse,
                        "low": low,
                        "high": high,
                        "count": len(values),
                        "chart": charts.line(values, label),
                    }
                )
        return found

    def strips(self, row: Row) -> list[tuple[str, str, str]]:
        """(check, since when, chart) of each check of a row."""
        runs = self.history.of(row)[-DETAILED:]
        states = {state.check: state for state in self.history.states() if state.row == row}
        found = []
        for check, answers in self.history.answers.get(row, {}).items():
            told = {answer.run.id: answer.status for answer in answers}
            state = states[check]
            since = f"{SAID[state.status]} since {state.since.started[:10]}"
            found.append((check, since, charts.strip([told.get(run.id) for run in runs], f"{check}: {since}")))
        return found

    # -- runs -----------------------------------------------------------------------------------------------

    def run(self, run: Run, tail: int) -> dict:
        bad = [result for result in run.results if result.status in BAD]
        environment = {name: run.environment.get(name) for name in ENVIRONMENT}
        costs = []
        for row in rows_of(run):
            have = figures(run, row.combo)
            costs += [f"{m.title}: {shown(m, have[m.name])}" for m in METRICS if m.name in have] if len(have) else []
        output = printable(run.output)[-tail:] if tail else ""
        return {
            "id": run.id,
            "verdict": verdict(run),
            "status": status_line(run),
            "started": spelled(run.started),
            "target": one_line(str(run.target.get("label", "")), 80),
            "combos": one_line(", ".join(run.combos), 200),
            "commit": commit_of(run).replace("`", ""),
            "environment": ", ".join(f"{name} {one_line(str(at), 60)}" for name, at in environment.items() if at),
            "costs": ", ".join(costs[: len(METRICS)]),
            "failures": [(one_line(f"{r.check}: {r.test}"), one_line(r.message, 240)) for r in bad[:MOST_FAILURES]],
            "more": len(bad) - MOST_FAILURES,
            "incomplete": one_line(run.incomplete, 200),
            "output": output.strip("\n"),
            "cut": len(run.output) > len(output),
            "source": one_line(run.source, 120),
        }
