"""What the saved runs say together: the current state of every check, what broke, what it cost over time.

The one place that turns runs into what an output shows; the log, the page and every other report read this and
nothing else. Standard library only. A row is one (target, combo, scale), and is followed through time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from compat import store
from compat.result import ERROR, FAILED, PASSED, SKIPPED, Check, NotARun, Run

UNKNOWN = "unknown"  # the combo of a run that was read from a log which names none
MOST_RUNS = 500  # of the newest; older files are counted and left unread
BAD = (FAILED, ERROR)
BREAKING = ("breaking", "behaviour")  # verdicts of a finding that speak against a change
TIERS = ("LOAD", "NUMERIC", "API", "DATA", "TRAIN", "COST")


class Row(NamedTuple):
    """Whose history it is."""

    target: str
    combo: str
    scale: str


class Metric(NamedTuple):
    """name: the key in Run.cost. better: "less" or "more". exact: the same on every machine, so any change tells."""

    name: str
    title: str
    unit: str
    better: str
    exact: bool


METRICS = (
    Metric("flops_forward", "FLOPs, forward", "FLOP", "less", True),
    Metric("flops_backward", "FLOPs, backward", "FLOP", "less", True),
    Metric("peak_forward_bytes", "Peak memory, forward", "B", "less", True),
    Metric("peak_train_bytes", "Peak memory, training step", "B", "less", True),
    Metric("parameters", "Parameters", "", "less", True),
    Metric("tokens_per_s", "Generated tokens", "/s", "more", False),
    Metric("elapsed_s", "Run time", "s", "less", False),
)


@dataclass(frozen=True)
class Answer:
    """What one run said of one check in one row."""

    run: Run
    status: str
    message: str


@dataclass(frozen=True)
class State:
    """A check now. since: the run from which on it has had this status. before: its status until then, or None."""

    row: Row
    check: str
    answer: Answer
    since: Run
    before: str | None

    @property
    def status(self) -> str:
        return self.answer.status

    @property
    def new(self) -> bool:
        """It fails, and did not the last time it was asked before this run."""
        return self.status in BAD and self.since is self.answer.run


@dataclass(frozen=True)
class Delta:
    """A figure of a run beside the one of the run before it in the row; ``old`` is None for the first."""

    row: Row
    metric: Metric
    old: float | None
    new: float

    @property
    def ratio(self) -> float | None:
        return self.new / self.old - 1 if self.old else None

    @property
    def worse(self) -> bool:
        if self.old is None:
            return False
        return self.new > self.old if self.metric.better == "less" else self.new < self.old


@dataclass(frozen=True)
class NotRun:
    """Something a run did not ask or measure, and why. check: "" for what belongs to none."""

    combo: str
    check: str
    what: str
    why: str


@dataclass
class Summary:
    """One run in the order every output has: verdict, new breakages, waived, not run, trend."""

    run: Run
    verdict: str  # passed, failed, incomplete or pending
    new: list[State] = field(default_factory=list)  # fail now, did not before
    still: list[State] = field(default_factory=list)
    breakages: list[dict] = field(default_factory=list)  # findings that speak against it, by tier
    harmless: list[dict] = field(default_factory=list)  # additive ones
    waived: list[dict] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    trend: list[Delta] = field(default_factory=list)
    previous: Run | None = None  # of the same row, the one the trend is against


def verdict(run: Run) -> str:
    """A word for the run as a whole. Pending: nothing was asked yet."""
    if run.results and not run.incomplete and run.count(SKIPPED) == len(run.checks()):
        return "pending"
    if any(f.get("verdict") in BREAKING and not f.get("waived") for f in run.findings) and run.exit_code == 0:
        return "failed"
    return {0: "passed", 1: "failed"}.get(run.exit_code, "incomplete")


def status_words(run: Run) -> tuple[str, int, int, int]:
    """(verdict, checks passed, checks asked, checks skipped whole)."""
    skipped = run.count(SKIPPED)
    return verdict(run), run.count(PASSED), len(run.checks()) - skipped, skipped


def rows_of(run: Run) -> list[Row]:
    return [Row(str(run.target.get("label", "")), combo, run.scale) for combo in run.combos]


def figures(run: Run, combo: str) -> dict[str, float]:
    """What was measured of one combo. Run time counts only where the run had no other combo."""
    found = {name: value for name, value in (run.cost.get(combo) or {}).items() if isinstance(value, int | float)}
    if run.elapsed_s and len(run.combos) == 1:
        found["elapsed_s"] = run.elapsed_s
    return found


def not_run(run: Run) -> list[NotRun]:
    """Tests that were skipped, figures that were not measured, and why; whole checks as one."""
    found = []
    for check in run.checks():
        skipped = [result for result in check.results if result.status == SKIPPED]
        reasons = {result.message for result in skipped}
        if skipped and check.status == SKIPPED and len(reasons) == 1:
            found.append(NotRun(check.combo, check.title, "all of it", skipped[0].message))
        else:
            found += [NotRun(check.combo, check.title, result.test, result.message) for result in skipped]
    for combo, facts in run.facts.items():
        missing = facts.get("not_measured") if isinstance(facts, dict) else None
        for what, why in (missing or {}).items():
            found.append(NotRun(combo, "", what.replace("_", " "), str(why)))
    if run.incomplete:
        found.append(NotRun("", "", "the rest of the run", run.incomplete))
    return found


def by_tier(findings: Iterable[dict]) -> dict[str, list[dict]]:
    """{tier: findings}, tiers in the catalogue's order, others after them."""
    groups: dict[str, list[dict]] = {}
    for finding in findings:
        tier = str(finding.get("tier") or str(finding.get("rule", "")).partition(".")[0])
        groups.setdefault(tier, []).append(finding)
    return dict(sorted(groups.items(), key=lambda item: TIERS.index(item[0]) if item[0] in TIERS else len(TIERS)))


class History:
    """Runs, oldest first. ``unread`` says of which files nothing is known, and why."""

    def __init__(self, runs: Iterable[Run], unread: Iterable[str] = ()):
        self.runs = sorted({run.id: run for run in runs}.values(), key=lambda run: (run.started, run.id))
        self.unread = list(unread)

    @classmethod
    def read(cls, folder: Path = store.RUNS) -> History:
        """The newest runs below `folder`. A file that is no run is named in ``unread`` and costs nothing else."""
        paths = store.all_runs(folder)
        runs, unread = [], []
        for path in paths[-MOST_RUNS:]:
            try:
                runs.append(store.load(path))
            except (OSError, NotARun) as error:
                unread.append(f"{path.name}: {error}")
        if len(paths) > MOST_RUNS:
            unread.append(f"{len(paths) - MOST_RUNS} older runs were left unread")
        return cls(runs, unread)

    def with_runs(self, runs: Iterable[Run]) -> History:
        """More runs; of one id, those already here stay: a saved run knows more than a log's entry."""
        known = {run.id for run in self.runs}
        return History([*self.runs, *(run for run in runs if run.id not in known)], self.unread)

    def until(self, run: Run) -> History:
        """As it was when `run` ended."""
        return History([*(r for r in self.runs if (r.started, r.id) < (run.started, run.id)), run], self.unread)

    # -- rows ---------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> list[Row]:
        return list(dict.fromkeys(row for run in self.runs for row in rows_of(run)))

    def of(self, row: Row) -> list[Run]:
        return [run for run in self.runs if row in rows_of(run)]

    @cached_property
    def answers(self) -> dict[Row, dict[str, list[Answer]]]:
        """{row: {check: what runs answered, oldest first}}, checks in the order they were first asked."""
        found: dict[Row, dict[str, list[Answer]]] = {}
        for run in self.runs:
            checks: dict[str, list[Check]] = {}
            for check in run.checks():
                checks.setdefault(check.combo, []).append(check)
            for row in rows_of(run):
                for check in checks.get(row.combo, []):
                    answer = Answer(run, check.status, check.first_message)
                    found.setdefault(row, {}).setdefault(check.title, []).append(answer)
        return found

    def states(self) -> Iterator[State]:
        """Every check of every row as its last answer left it."""
        for row, checks in self.answers.items():
            for check, answers in checks.items():
                first = len(answers) - 1
                while first and answers[first - 1].status == answers[-1].status:
                    first -= 1
                before = answers[first - 1].status if first else None
                yield State(row, check, answers[-1], answers[first].run, before)

    def current(self) -> list[State]:
        """The states that still say something. What a log without combos tells is over once a later run asked it."""
        states = list(self.states())
        asked: dict[tuple[str, str], str] = {}
        for state in states:
            if state.row.combo != UNKNOWN:
                place, when = (state.row.target, state.check), state.answer.run.started
                asked[place] = max(when, asked.get(place, ""))
        return [
            state
            for state in states
            if state.row.combo != UNKNOWN or asked.get((state.row.target, state.check), "") <= state.answer.run.started
        ]

    def known_issues(self) -> list[State]:
        """Checks that fail now."""
        return [state for state in self.current() if state.status in BAD]

    def series(self, row: Row, metric: str) -> list[tuple[Run, float]]:
        """A figure through time."""
        told = ((run, figures(run, row.combo).get(metric)) for run in self.of(row))
        return [(run, value) for run, value in told if value is not None]

    def latest_fact(self, row: Row, name: str) -> tuple[Run, dict] | None:
        """The newest answer to a fact (special_tokens, loading_fields), with the run that gave it."""
        for run in reversed(self.of(row)):
            value = (run.facts.get(row.combo) or {}).get(name)
            if value:
                return run, value
        return None

    def last_comparison(self) -> Run | None:
        """The newest run that a gate or a comparison left findings in."""
        return next((run for run in reversed(self.runs) if run.findings), None)

    # -- one run ------------------------------------------------------------------------------------------

    def summary(self, run: Run) -> Summary:
        """`run` beside what was known until then."""
        until = self.until(run)
        found = Summary(run, verdict(run), not_run=not_run(run))
        for state in until.states():
            if state.answer.run.id == run.id and state.status in BAD:
                (found.new if state.new else found.still).append(state)
        for finding in run.findings:
            kind = found.waived if finding.get("waived") else found.harmless
            if not finding.get("waived") and finding.get("verdict") in BREAKING:
                kind = found.breakages
            kind.append(finding)
        for row in rows_of(run):
            earlier = [r for r in until.of(row) if r is not run and figures(r, row.combo) and same_machine(r, run)]
            old = figures(earlier[-1], row.combo) if earlier else {}
            found.previous = earlier[-1] if earlier else found.previous
            new = figures(run, row.combo)
            found.trend += [Delta(row, m, old.get(m.name), new[m.name]) for m in METRICS if m.name in new]
        return found


def same_machine(a: Run, b: Run) -> bool:
    """Whether figures of two runs may stand beside each other: one device, one GPU."""
    return all(a.environment.get(name) == b.environment.get(name) for name in ("device", "gpu"))


# -- figures as text ------------------------------------------------------------------------------------------


def shown(metric: Metric, value: float) -> str:
    """`7.00 MFLOP`, `3.12 MB`, `549 /s`, `6.4 s`."""
    if metric.unit == "s":
        return f"{value:.1f} s"
    if metric.unit == "/s":
        return f"{value:,.0f} /s"
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}{metric.unit}".rstrip()
    return f"{value:,.0f} {metric.unit}".rstrip()


def change(delta: Delta) -> str:
    """`+3.1 %`, `unchanged`, or nothing for the first of its kind."""
    if delta.old is None or delta.ratio is None:
        return ""
    if delta.new == delta.old:
        return "unchanged"
    text = f"{100 * delta.ratio:+.1f} %"
    return text if text[1:] != "0.0 %" else f"{delta.new - delta.old:+,.6g}"
