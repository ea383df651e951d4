"""The first commit at which something shows: a rule's finding, a failing suite, or any change that the gate would stop.

Unusual: the search is git's own over the whole graph (rev-list --bisect-all), each commit asked once and its answer
kept. A commit that cannot be imported is skipped and named. Bisection takes for granted that what appeared stays;
a few more commits are asked afterwards to see whether it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from compat.asking import How, Question, Unanswered, answer, cross
from compat.checkout import between, history, is_ancestor, merge_base, resolve_commit, subject
from compat.combo import Combo
from compat.lock import LockFailed
from compat.result import FAILED, Run
from compat.rules import VERDICTS, compare
from compat.suites import Suite
from compat.target import Target, at_commit

SHOWS, CLEAN, SKIPPED = "shows it", "does not show it", "skipped"


class NotBisectable(ValueError):
    """The two ends do not fit together; the message says what they do. ``exit_code`` is 2 or 3."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Asked:
    """commit: its full hash. why: the findings or failures, or why it was skipped."""

    commit: str
    state: str
    why: tuple[str, ...] = ()


@dataclass
class Found:
    """first: the culprit, None when ``suspects`` (skips hide which) are all that can be said.

    contradictions: commits that say otherwise than they should if what appeared had stayed, a sentence each.
    """

    first: Asked | None
    suspects: list[str]
    asked: list[Asked]
    contradictions: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # commit -> short hash, date, author, subject
    starts: int = 0

    @property
    def skipped(self) -> list[Asked]:
        return [one for one in self.asked if one.state == SKIPPED]


class Bisection:
    """What is looked for, and what the commits asked so far said."""

    def __init__(
        self,
        target: Target,
        combo: Combo,
        how: How,
        rule: str | None = None,
        suite: Suite | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.target, self.combo, self.how, self.rule, self.suite = target, combo, how, rule, suite
        self.folder: Path = target.source or target.folder
        self.say, self.starts = say, 0
        self.asked: dict[str, Asked] = {}
        self.good = ""
        self.base: dict | None = None  # the good commit's lock, where locks are compared

    def search(self, good: str, bad: str) -> Found:
        """The first commit after ``good``, up to ``bad``.

        Raises NotBisectable, CheckoutError, TargetError, and LockFailed when we err.
        """
        good, bad = resolve_commit(self.folder, good), resolve_commit(self.folder, bad)
        self.good = good
        self._check_ends(good, bad)
        goods, end = [good], bad
        while True:
            order = between(self.folder, goods, end)
            open_ = [commit for commit in order if commit != end and commit not in self.asked]
            if not open_:
                break
            skips = sum(commit in self.asked for commit in order if commit != end)
            commit = open_[min(len(open_) - 1, skips * skips)]  # broken commits come in runs: step over them
            state = self.ask(commit).state
            if state == SHOWS:
                end = commit
            elif state == CLEAN:
                goods.append(commit)
        hidden = [commit for commit in order if commit != end]
        found = Found(None if hidden else self.asked[end], [] if not hidden else [*hidden, end], [])
        found.contradictions = self._contradictions(good, bad, end)
        found.asked, found.starts = list(self.asked.values()), self.starts
        found.names = {commit: subject(self.folder, commit) for commit in {*self.asked, *found.suspects}}
        return found

    def _check_ends(self, good: str, bad: str) -> None:
        if not is_ancestor(self.folder, good, bad):
            fork = merge_base(self.folder, good, bad)
            hint = f"; they part at {fork[:10]}, which may be given as --good" if fork else ""
            raise NotBisectable(f"{good[:10]} (--good) is no ancestor of {bad[:10]} (--bad){hint}")
        if good == bad:
            raise NotBisectable(f"--good and --bad are the same commit, {good[:10]}")
        questions = [self._question(commit) for commit in (good, bad)]
        answers = self._answers(questions)
        if isinstance(answers[0], dict):
            self.base = answers[0]
        ends = [self._judge(commit, reply) for commit, reply in zip((good, bad), answers, strict=True)]
        for name, end, wrong in (("--good", ends[0], SHOWS), ("--bad", ends[1], CLEAN)):
            self.asked[end.commit] = end
            if end.state == SKIPPED:
                raise NotBisectable(f"{end.commit[:10]} ({name}) cannot be judged: {end.why[0]}", 3)
            if end.state == wrong:
                shown = f": {end.why[0]}" if end.why else ""
                raise NotBisectable(f"{end.commit[:10]} ({name}) {wrong}{shown}")

    def ask(self, commit: str) -> Asked:
        if commit not in self.asked:
            [reply] = self._answers([self._question(commit)])
            self.asked[commit] = self._judge(commit, reply)
            self.say(f"{commit[:10]} {self.asked[commit].state}")
        return self.asked[commit]

    def _question(self, commit: str) -> Question:
        return Question(at_commit(self.target, commit), self.combo, (self.suite,) if self.suite else ())

    def _answers(self, questions: list[Question]) -> list:
        told = answer(questions, self.how)
        self.starts += told.starts
        return told.answers

    def _judge(self, commit: str, reply: dict | Run | Unanswered) -> Asked:
        if isinstance(reply, Unanswered):
            return Asked(commit, SKIPPED, (reply.why,))
        if isinstance(reply, Run):
            failed = tuple(f"{r.check}: {r.test}: {r.message}" for r in reply.results if r.status == FAILED)
            if not failed and reply.incomplete:
                return Asked(commit, SKIPPED, (reply.incomplete,))
            return Asked(commit, SHOWS if failed else CLEAN, failed)
        if self.base is None:
            raise LockFailed("the good commit gave no lock to compare with")
        crossing = self._crossing(commit, self.base, reply)
        if isinstance(crossing, Unanswered):
            return Asked(commit, SKIPPED, (crossing.why,))
        findings = compare(self.base, reply, crossing=crossing).findings
        if self.rule:
            shown = tuple(str(finding) for finding in findings if finding.rule == self.rule)
        else:
            shown = tuple(str(finding) for finding in findings if finding.severity in VERDICTS[2:])
        broken = reply["facts"].get("state")  # stands there only when no model could be built
        if isinstance(broken, dict) and not (shown and self.rule):
            return Asked(commit, SKIPPED, (broken.get("message") or broken.get("unsupported") or "no model is built",))
        return Asked(commit, SHOWS if shown else CLEAN, shown)

    def _crossing(self, commit: str, base: dict, reply: dict):
        """What came of loading the good commit's checkpoint in this one; None where no fact differs."""
        if base["facts"] == reply["facts"]:
            return None
        [crossing], starts = cross([(self._question(self.good), self._question(commit), (base, reply))], self.how)
        self.starts += starts
        return crossing

    def _contradictions(self, good: str, bad: str, end: str) -> list[str]:
        """Ask a few more commits, as many as the search may take, whether what appeared at ``end`` stays."""
        every = history(self.folder, good, bad)
        rest = [commit for commit in every if commit not in self.asked]
        some = min(len(rest), max(2, math.ceil(math.log2(len(every) + 1))))
        for place in range(some):
            self.ask(rest[place * len(rest) // some])
        told = []
        for commit, one in self.asked.items():
            after = is_ancestor(self.folder, end, commit)
            if after and one.state == CLEAN:
                told.append(f"{commit[:10]} comes after {end[:10]} and does not show it")
            if not after and one.state == SHOWS:
                told.append(f"{commit[:10]} does not come after {end[:10]} and shows it")
        return told
