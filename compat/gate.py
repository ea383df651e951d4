"""The gate: suites on head, what changed since base, waivers, one verdict.

Unusual: head is judged by the rules, waivers and tolerances of base. A change of those is listed before anything
else and counts only once it is approved from outside the change. A check that fails on base too is no news.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from compat import base as bases
from compat import lock
from compat.asking import How, Question, Unanswered, answer, cross
from compat.base import Base, Change
from compat.combo import Combo
from compat.findings import Finding
from compat.result import ERROR, FAILED, INCOMPLETE, OK, REGRESSION, SKIPPED, Run, plain
from compat.rules import VERDICTS, Comparison, NotComparable, compare
from compat.suites import Suite
from compat.target import Target
from compat.waivers import FILE, Waiver, fingerprint, read

SCHEMA = 1
WORD = {OK: "passed", REGRESSION: "failed", INCOMPLETE: "incomplete"}


@dataclass
class Judged:
    """A finding under all the combos that show it alike. reason: of the waiver, or why else it is accepted."""

    finding: Finding
    fingerprint: str
    combos: list[str]
    reason: str = ""

    def as_json(self) -> dict:
        return {"fingerprint": self.fingerprint, "combos": self.combos, "reason": self.reason, **asdict(self.finding)}


@dataclass
class Gate:
    """new: what fails the gate. waived: accepted for a time. known: fails on base alike. additions: no harm.

    problems: of waivers.toml, a sentence each. incomplete: what could not be asked. starts: processes started.
    """

    head: str
    base: str
    combos: list[str]
    scale: str
    policy: list[Change] = field(default_factory=list)
    approved: bool = False
    new: list[Judged] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    waived: list[Judged] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    known: list[Judged] = field(default_factory=list)
    additions: list[Judged] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)  # surface -> the worst over all combos, waived or not
    locks: dict[str, dict] = field(default_factory=dict)  # combo -> what head does now
    run: Run | None = None
    starts: int = 0
    elapsed_s: float = 0.0

    @property
    def unapproved(self) -> list[Change]:
        return [] if self.approved else [change for change in self.policy if not change.narrows]

    @property
    def exit_code(self) -> int:
        """What is found stands whatever could not be asked; without it, anything unanswered is no success."""
        if self.new or self.problems or self.unapproved:
            return REGRESSION
        return INCOMPLETE if self.incomplete else OK

    @property
    def verdict(self) -> str:
        return WORD[self.exit_code]

    def as_json(self) -> dict:
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "head": self.head,
            "base": self.base,
            "combos": self.combos,
            "scale": self.scale,
            "policy": {"approved": self.approved, "changes": [asdict(change) for change in self.policy]},
            "new": [item.as_json() for item in self.new],
            "problems": self.problems,
            "waived": [item.as_json() for item in self.waived],
            "not_run": self.not_run,
            "known": [item.as_json() for item in self.known],
            "additions": [item.as_json() for item in self.additions],
            "notes": self.notes,
            "incomplete": self.incomplete,
            "verdicts": self.verdicts,
            "run": self.run.id if self.run else None,
            "started": self.starts,
            "elapsed_s": self.elapsed_s,
        }


def gate(
    head: Target,
    base: Base,
    combos: list[Combo],
    suites: list[Suite],
    how: How,
    approved: bool = False,
    today: date | None = None,
    watcher=None,
) -> Gate:
    """Judge ``head`` against ``base``. Raises what the judge itself errs at, nothing that a target does."""
    began = time.monotonic()
    found = Gate(head.label, base.about, [combo.name for combo in combos], how.scale, approved=approved)
    root = bases.root_of(head)
    found.policy = bases.policy_changes(base.root, root)
    inside, lawful = bases.judge_inside(root), root if approved else base.root
    rules, allowed = bases.rules_of(lawful, inside), bases.tolerances_of(lawful, inside)

    questions = [Question(head, combo, kind) for kind in ((), tuple(suites)) for combo in combos]
    if base.target:
        questions += [Question(base.target, combo) for combo in combos]
    answers = answer(questions, how, watcher)
    found.starts = answers.starts
    heads, runs = answers.answers[: len(combos)], answers.answers[len(combos) : 2 * len(combos)]
    olds = answers.answers[2 * len(combos) :] if base.target else [base.locks.get(combo.name) for combo in combos]

    shown: list[tuple[Finding, str, str, str]] = []  # finding, fingerprint, combo, why it is accepted
    crossings = _crossings(found, head, base, combos, olds, heads, how)
    for combo, old, new, crossing in zip(combos, olds, heads, crossings, strict=True):
        if isinstance(new, dict):
            found.locks[combo.name] = new
        if not (isinstance(old, dict) and isinstance(new, dict)):
            found.incomplete += _unanswered(combo, base, old, new)
            continue
        if isinstance(crossing, Unanswered):
            found.incomplete.append(f"{combo.name}: base's checkpoint could not be tried in head: {crossing.why}")
            crossing = None
        try:
            comparison = compare(old, new, rules, allowed, crossing)
        except NotComparable as error:
            found.incomplete.append(f"{combo.name}: {error}")
            continue
        _take(comparison, found)
        refreshed = approved and base.target and _refreshed(combo.name, base.root, root, new, rules, allowed)
        reason = f"the lock {refreshed} of this change says so" if refreshed else ""
        sides = crossing.sides(old["facts"], new["facts"]) if crossing else (old["facts"], new["facts"])
        for finding in comparison.findings:
            shown.append((finding, fingerprint(finding, *sides), combo.name, reason))
    shown += [(*failure, "") for failure in _suites(found, head, base, combos, suites, runs, how)]

    text = {where: _text(where / FILE) for where in (lawful, root)}
    _waive(found, shown, text[lawful], text[root], today or date.today())
    found.elapsed_s = round(time.monotonic() - began, 3)
    if found.run:
        found.run.findings = [row for item in found.new + found.waived for row in _rows(item, rules)]
    return found


def _crossings(found: Gate, head: Target, base: Base, combos, olds: list, heads: list, how: How) -> list:
    """What came of loading base's checkpoint in head, for each combo; None where nothing changed or base is a lock."""
    pairs = {}
    for number, (combo, old, new) in enumerate(zip(combos, olds, heads, strict=True)):
        if base.target and isinstance(old, dict) and isinstance(new, dict) and old["facts"] != new["facts"]:
            pairs[number] = Question(base.target, combo), Question(head, combo), (old, new)
    made, starts = cross(list(pairs.values()), how) if pairs else ([], 0)
    found.starts += starts
    replies = dict(zip(pairs, made, strict=True))
    return [replies.get(number) for number in range(len(combos))]


def _unanswered(combo: Combo, base: Base, old, new) -> list[str]:
    wrong = [f"{combo.name}: head could not be asked: {new.why}"] if isinstance(new, Unanswered) else []
    if isinstance(old, Unanswered):
        wrong.append(f"{combo.name}: base ({base.about}) could not be asked: {old.why}")
    elif old is None:
        wrong.append(f"{combo.name}: base ({base.about}) holds no lock of it")
    return wrong


def _take(comparison: Comparison, found: Gate) -> None:
    for surface, verdict in comparison.verdicts.items():
        found.verdicts[surface] = max(found.verdicts.get(surface, VERDICTS[0]), verdict, key=VERDICTS.index)
    label = f"{comparison.combo}: " if len(found.combos) > 1 else ""
    found.notes += [label + note for note in comparison.notes]


def _refreshed(combo: str, base: Path, head: Path, new: dict, rules: dict, allowed: dict) -> str:
    """The committed lock of this combo, if head changed it and it says what head does; else ""."""
    for folder in bases.LOCKS:
        for path in sorted((head / folder).glob("*.json")):
            try:
                held = lock.read(path)
                before = base / path.relative_to(head)
                if held["combo"] != combo or (before.exists() and before.read_bytes() == path.read_bytes()):
                    continue
                if compare(held, new, rules, allowed).exit_code == OK:
                    return str(path.relative_to(head))
            except (OSError, lock.NotALock, NotComparable):
                continue
    return ""


# -- suites -----------------------------------------------------------------------------------------------------


def _suites(found: Gate, head, base: Base, combos, suites, runs: list, how: How) -> list[tuple[Finding, str, str]]:
    """(finding, fingerprint, combo) of each test that fails on head and not on base; the rest goes to ``found``."""
    failing = []
    done = []
    for combo, run in zip(combos, runs, strict=True):
        if isinstance(run, Unanswered):
            found.incomplete.append(f"{combo.name}: the checks could not be asked: {run.why}")
            continue
        done.append(run)
        if run.incomplete:
            found.incomplete.append(f"{combo.name}: {run.incomplete}")
        label = f"{combo.name}: " if len(combos) > 1 else ""
        for result in run.results:
            if result.status == ERROR:
                found.incomplete.append(f"{label}{result.check}: {result.test}: {result.message}")
            elif result.status == SKIPPED:
                found.not_run.append(f"{label}{result.check}: {result.test}: {result.message}")
        if run.count(FAILED):
            failing.append((combo, run))
    if done:
        found.run = _joined(head, done, combos, how)
    before = _failures_of_base(found, base, failing, suites, how)
    fresh = []
    for combo, run in failing:
        for result in run.results:
            if result.status == FAILED:
                finding = _as_finding(result, suites)
                mark = fingerprint(finding, {}, {})
                if (combo.name, result.check, result.test) in before:
                    _add(found.known, finding, mark, combo.name)
                else:
                    fresh.append((finding, mark, combo.name))
    return fresh


def _failures_of_base(found: Gate, base: Base, failing: list, suites, how: How) -> set[tuple[str, str, str]]:
    """(combo, check, test) that fail on base; asked only where head fails."""
    if not failing or not base.target:
        return set()
    wanted = [
        Question(base.target, combo, tuple(suite for suite in suites if suite.title in _failed_checks(run)))
        for combo, run in failing
    ]
    answers = answer(wanted, how)
    found.starts += answers.starts
    known = set()
    for (combo, _), run in zip(failing, answers.answers, strict=True):
        if isinstance(run, Run):
            known |= {(combo.name, result.check, result.test) for result in run.results if result.status == FAILED}
    return known


def _failed_checks(run: Run) -> set[str]:
    return {result.check for result in run.results if result.status == FAILED}


def _as_finding(result, suites: list[Suite]) -> Finding:
    """A failing test as a finding, so that it is fingerprinted and waived like one; its message is no part of that."""
    name = next((suite.name for suite in suites if suite.title == result.check), "suites")
    return Finding(f"SUITE.{name}", "breaking", "model", result.test, "passes", "fails", where=result.message)


def _joined(head: Target, runs: list[Run], combos: list[Combo], how: How) -> Run:
    from compat.asking import described
    from compat.several import merge

    whole = Run.begin(described(head), how.scale, [combo.name for combo in combos])
    merge(whole, runs)
    whole.elapsed_s = round(sum(run.elapsed_s for run in runs), 3)
    return whole


# -- waivers ----------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _waive(found: Gate, shown: list[tuple[Finding, str, str, str]], lawful: str, proposed: str, today: date) -> None:
    """Sort findings into new, waived and additions. lawful: the waivers that count; proposed: those of head."""
    entries, found.problems = read(proposed, today)
    counting = [entry for entry in read(lawful, today)[0] if entry in entries]  # what head gave up counts no more
    used: set[Waiver] = set()
    for finding, mark, combo, accepted in shown:
        if finding.severity == VERDICTS[1]:
            _add(found.additions, finding, mark, combo)
            continue
        used |= {entry for entry in entries if entry.covers(finding, mark, combo)}
        waiver = next((entry for entry in counting if entry.covers(finding, mark, combo)), None)
        if waiver:
            accepted = f"{waiver.reason} ({waiver.owner}, until {waiver.expires})"
        _add(found.waived if accepted else found.new, finding, mark, combo, accepted)
    if found.incomplete:  # what was not asked may be what an entry is for
        return
    for entry in entries:
        asked = not entry.combos or set(entry.combos) & set(found.combos)
        if entry not in used and asked:
            found.problems.append(
                f"{FILE}: the entry for {entry.rule} {entry.path} is unused: nothing it waives is found against "
                f"{found.base}; remove it"
            )


def _add(items: list[Judged], finding: Finding, mark: str, combo: str, reason: str = "") -> None:
    for item in items:
        same = (item.fingerprint, item.reason, item.finding.path) == (mark, reason, finding.path)
        if same:
            if combo not in item.combos:
                item.combos.append(combo)
            return
    items.append(Judged(finding, mark, [combo], reason))


def _rows(item: Judged, rules: dict) -> list[dict]:
    """The finding as a Run keeps it, once a combo."""
    finding, rule = item.finding, rules.get(item.finding.rule)
    row = {
        "rule": finding.rule,
        "tier": finding.rule.partition(".")[0],
        "path": finding.path,
        "old": finding.old,
        "new": finding.new,
        "verdict": finding.severity,
        "why": rule.why if rule else finding.where,
        "fix": rule.fix if rule else "",
        "proof": finding.proof,
        "waived": item.reason,
    }
    return [{"combo": combo, **row} for combo in item.combos]


def dumps(found: Gate) -> str:
    return json.dumps(plain(found.as_json()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
