"""Locks and suite runs of several trees and combos at once: from the cache where they are known, else asked.

Unusual: a child that locks one combo answers for the next as a fresh one would, so each worker starts one child a
side and imports once. Answers that a crash or a time limit has a part in are given, and not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compat import cache, lock, process
from compat.combo import Combo
from compat.crossing import Crossing
from compat.parallel import places, together
from compat.process import CouldNotAsk
from compat.result import ERROR, Run
from compat.suites import Suite
from compat.target import Target

COST = {"lock": 2, "suites": 1}  # of a question, roughly; importing torch and the model costs as much as a lock


@dataclass(frozen=True)
class How:
    """With what a target is asked: as on the command line."""

    scale: str = "tiny"
    python: str | None = None
    timeout_s: float = 60.0
    device: str = "cpu"
    quiet: bool = False


@dataclass
class Question:
    """A lock of ``target`` in one combo, or, with ``suites``, a run of them."""

    target: Target
    combo: Combo
    suites: tuple[Suite, ...] = ()

    @property
    def kind(self) -> str:
        return "suites" if self.suites else "lock"


@dataclass
class Unanswered:
    """Why there is no answer, in one sentence."""

    why: str


@dataclass
class Answers:
    """A lock, a Run or Unanswered for each question. starts: how many processes were started for them."""

    answers: list[dict | Run | Unanswered] = field(default_factory=list)
    starts: int = 0


def answer(questions: list[Question], how: How, watcher=None) -> Answers:
    """Every question's answer. What a target raises or lacks is in it; Raises LockFailed when we err."""
    trees = {folder: cache.tree_hash(folder) for folder in {question.target.folder for question in questions}}
    keys = [_key(question, trees[question.target.folder], how) for question in questions]
    answers: list = [_known(question, key) for question, key in zip(questions, keys, strict=True)]
    first: dict[str, int] = {}  # two trees may be one, as head and base are before anything changed
    same = [first.setdefault(json.dumps(key, sort_keys=True), number) for number, key in enumerate(keys)]
    missing = [number for number, known in enumerate(answers) if known is None and same[number] == number]
    starts = 0
    if missing:
        made, starts = _ask({number: questions[number] for number in missing}, how, watcher)
        for number, (reply, sound) in made.items():
            answers[number] = reply
            if sound and trees[questions[number].target.folder] == cache.tree_hash(questions[number].target.folder):
                cache.keep(keys[number], reply if isinstance(reply, dict) else reply.as_json())
    for number, other in enumerate(same):
        if answers[number] is None:
            answers[number] = _renamed(answers[other], questions[number].target)
    return Answers(answers, starts)


def cross(pairs: list[tuple[Question, Question, tuple[dict, dict]]], how: How) -> tuple[list, int]:
    """([Crossing or Unanswered], child starts): of each pair (base, head, their locks), base's checkpoint in head."""
    trees = {one.target.folder: cache.tree_hash(one.target.folder) for pair in pairs for one in pair[:2]}
    keys = []
    for base, head, _ in pairs:
        sides = [_key(one, trees[one.target.folder], how) for one in (base, head)]
        keys.append({"kind": "crossing", "sides": sides})
    found: list = [cache.kept(key, lambda payload: Crossing(**payload)) for key in keys]
    missing = [number for number, known in enumerate(found) if known is None]
    jobs = [_crossing_job([pairs[n] for n in part], how) for part in _dealt(missing, places(len(missing), how.scale))]
    starts = 0
    for part, (made, begun) in zip(_dealt(missing, len(jobs)), together(jobs) if jobs else [], strict=True):
        starts += begun
        for number, (reply, sound) in zip(part, made, strict=True):
            found[number] = reply
            if sound:
                cache.keep(keys[number], dataclasses.asdict(reply))
    return found, starts


def _dealt(numbers: list[int], hands: int) -> list[list[int]]:
    return [part for part in (numbers[hand::hands] for hand in range(hands)) if part]


def _crossing_job(pairs: list, how: How) -> Callable:
    def work(tell) -> tuple[list, int]:
        from compat.witness import cross as exchange

        made: list[tuple[Crossing | Unanswered, bool]] = []
        with contextlib.ExitStack() as stack:
            old, new = (_child(one.target, how, 2 * len(pairs)) for one in pairs[0][:2])
            for child in (old, new):
                stack.callback(child.close)
            for base, _, locks in pairs:
                before = old.starts + new.starts
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compat-crossing-")))
                try:
                    reply: Crossing | Unanswered = exchange(old, new, locks, base.combo, how.scale, folder)
                except (CouldNotAsk, lock.LockFailed) as error:
                    reply = Unanswered(str(error))
                crashed = old.starts + new.starts - before > 2 * (not made)
                made.append((reply, not crashed and not isinstance(reply, Unanswered)))
            return made, old.starts + new.starts

    return work


def described(target: Target) -> dict:
    """The target as a Run tells of it."""
    told = {"label": target.label, "folder": str(target.folder), "ref": target.ref}
    return told | {"commit": target.commit, "dirty": target.dirty}


def _key(question: Question, tree: str, how: How) -> dict:
    target = question.target
    return {
        "tree": tree,
        "target": [target.module, target.cls, str(target.file.relative_to(target.folder)) if target.file else None],
        "missing": list(target.missing),
        "combo": question.combo.as_dict(how.scale),
        "kind": question.kind,
        "suites": [suite.name for suite in question.suites],
        "device": how.device,
        "timeout_s": how.timeout_s,
        "harness": cache.harness_hash(),
        "around": list(cache.surroundings(how.python)),
    }


def _known(question: Question, key: dict) -> dict | Run | None:
    read = _whole_run if question.suites else lambda payload: lock.checked(payload, "the cache")
    return _renamed(cache.kept(key, read), question.target)


def _renamed(reply: dict | Run | Unanswered | None, target: Target):
    """Who was asked is not part of what a tree answers: it is told anew."""
    if isinstance(reply, Run):
        return dataclasses.replace(reply, target=described(target))
    if isinstance(reply, dict):
        return reply | {"target": target.label, "commit": target.commit, "dirty": target.dirty}
    return reply


def _whole_run(payload) -> Run:
    run = Run.from_json(payload)
    if run.incomplete or not run.results:
        raise ValueError("a run that was not finished")
    return run


def _ask(questions: dict[int, Question], how: How, watcher) -> tuple[dict[int, tuple], int]:
    """({number: (answer, whether it may be kept)}, child starts)."""
    from compat.several import Told

    parts = shared_out(questions, places(len(questions), how.scale, how.device))
    told = Told(watcher) if watcher else None

    def tell(number: int, event: tuple) -> None:
        if event[0] == "say":
            if not how.quiet:
                print(f"compat: {event[1]}", file=sys.stderr, flush=True)
        elif told:
            told(number, event)

    sessions = sum(bool(question.suites) for question in questions.values())
    made: dict[int, tuple] = {}
    starts = 0
    for answers, begun in together([_part(questions, part, how, sessions) for part in parts], tell):
        made |= answers
        starts += begun
    if told:
        told.finish()
    return made, starts


def shared_out(questions: dict[int, Question], at_once: int) -> list[list[int]]:
    """The numbers of the questions in up to ``at_once`` parts of like cost, those of one target side by side."""
    folders = list(dict.fromkeys(question.target.folder for question in questions.values()))
    order = sorted(questions, key=lambda n: (folders.index(questions[n].target.folder), n))
    whole = sum(COST[questions[n].kind] for n in order)
    parts: list[list[int]] = [[] for _ in range(at_once)]
    done = 0.0
    for number in order:
        cost = COST[questions[number].kind]
        parts[min(at_once - 1, int((done + cost / 2) * at_once / whole))].append(number)
        done += cost
    return [part for part in parts if part]


def _part(questions: dict[int, Question], part: list[int], how: How, sessions: int) -> Callable:
    def work(tell) -> tuple[dict[int, tuple], int]:
        made: dict[int, tuple] = {}
        starts = 0
        sides: dict = {}
        for number in part:
            sides.setdefault(questions[number].target.folder, []).append(number)
        for numbers in sides.values():
            child = _child(questions[numbers[0]].target, how, len(numbers))
            try:
                for number in sorted(numbers, key=lambda n: questions[n].kind):  # locks first, of a fresh process
                    before = child.starts
                    reply = _reply(child, questions[number], how, tell, sessions)
                    crashed = child.starts - before > (before == 0)
                    made[number] = reply, not crashed and _sound(reply)
            finally:
                starts += child.starts
                child.close()
        return made, starts

    return work


def _child(target: Target, how: How, questions: int):
    limit_s = lock.limit_s(how.timeout_s, how.scale) * questions
    told: dict[str, Any] = {"python": how.python, "timeout_s": how.timeout_s, "device": how.device, "scale": how.scale}
    return process.Child(target, run_timeout_s=limit_s, **told)


def _reply(child, question: Question, how: How, tell, sessions: int) -> dict | Run | Unanswered:
    tell(("say", f"asking {question.target.label} ({question.combo.name}): {question.kind}"))
    if question.suites:
        from compat.plugin import run_limit_s
        from compat.several import Teller, judged

        run = Run.begin(described(question.target), how.scale, [question.combo.name])
        watcher = Teller(tell, 1 / sessions)
        judged(run, child, [question.combo], list(question.suites), run_limit_s(how.timeout_s), watcher)
        if run.incomplete.startswith("interrupted"):
            raise KeyboardInterrupt
        return run if run.results else Unanswered(run.incomplete)
    try:
        return lock.make(child, question.combo, how.scale)
    except (CouldNotAsk, lock.LockFailed) as error:
        return Unanswered(str(error))


def _sound(reply: dict | Run | Unanswered) -> bool:
    if isinstance(reply, Run):
        return bool(reply.results) and not reply.incomplete and not reply.count(ERROR)
    return isinstance(reply, dict)
