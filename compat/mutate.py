"""Mutants of a target's own code, drawn by seed: which of them does a comparison of locks notice?

Unusual: the judge is what users get, lock and rules alike; a mutant counts as noticed when somebody who changed
the code that way would be told of worse than additive. One that no longer ends is noticed by its time.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from compat.combo import Combo
from compat.forks import Bench, NotJudged
from compat.mutants import Mutant, mutants
from compat.rules import VERDICTS
from compat.target import Target

SLOWER = 10.0  # times what the unchanged code takes: from there on a mutant does not end
LEAST_S = 60.0


class NothingToMutate(ValueError):
    """No file of the target is both asked for and used; the message says which there are."""


@dataclass(frozen=True)
class Outcome:
    """how: "killed", "timeout", "survived". by: the rule, or what was raised. combos: those it was asked in."""

    mutant: Mutant
    how: str
    by: str
    combos: tuple[str, ...]

    def as_json(self) -> dict:
        told = {name: value for name, value in asdict(self.mutant).items() if name != "source"}
        return {**told, "how": self.how, "by": self.by, "combos": list(self.combos)}


@dataclass(frozen=True)
class Report:
    """possible: how many mutants there are, of which the outcomes are a sample."""

    target: str
    seed: int
    possible: int
    outcomes: tuple[Outcome, ...]
    elapsed_s: float

    @property
    def survivors(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.how == "survived"]

    @property
    def kill_rate(self) -> float:
        return 1 - len(self.survivors) / len(self.outcomes)

    @property
    def unnoticed_lines(self) -> list[str]:
        """Lines of which no mutant was noticed."""
        noticed = {outcome.mutant.where for outcome in self.outcomes if outcome.how != "survived"}
        return sorted({outcome.mutant.where for outcome in self.survivors} - noticed)

    def as_json(self) -> dict:
        return {
            "schema": 1,
            "target": self.target,
            "seed": self.seed,
            "possible": self.possible,
            "count": len(self.outcomes),
            "kill_rate": round(self.kill_rate, 4),
            "by": dict(Counter(outcome.by for outcome in self.outcomes).most_common()),
            "unnoticed_lines": self.unnoticed_lines,
            "mutants": [outcome.as_json() for outcome in self.outcomes],
        }


def mutate(
    target: Target,
    combos: Iterable[Combo],
    seed: int = 0,
    count: int = 100,
    paths: Iterable[str] = (),
    tell: Callable[[str], None] = lambda line: None,
    **options,
) -> Report:
    """Try ``count`` mutants of the files that making a lock uses; paths: only those files, or below those folders.

    Raises NothingToMutate, CouldNotAsk, LockFailed.
    """
    began = time.monotonic()
    with Bench(target, **options) as bench:
        using: dict[str, list[Combo]] = {}  # file -> combos in which it is imported
        for combo in combos:
            for file in bench.files(combo):
                using.setdefault(file, []).append(combo)
        chosen = sorted(file for file in using if wanted(file, paths))
        if not chosen:
            raise NothingToMutate(f"no file of the model's matches; there are: {', '.join(sorted(using)) or 'none'}")
        every = [one for file in chosen for one in mutants(file, (bench.folder / file).read_text(encoding="utf-8"))]
        drawn = random.Random(seed).sample(every, min(count, len(every)))
        tell(f"{len(drawn)} of {len(every)} mutants of {len(chosen)} files, asked as compat lock asks")
        tried = [bench.pool.submit(judge, bench, mutant, using[mutant.file]) for mutant in drawn]
        outcomes = []
        for number, future in enumerate(tried, start=1):
            outcomes.append(future.result())
            if outcomes[-1].how == "survived":
                tell(f"{number}/{len(tried)} survived: {outcomes[-1].mutant.where} {outcomes[-1].mutant.new.strip()}")
    outcomes.sort(key=lambda outcome: (outcome.mutant.file, outcome.mutant.line, outcome.mutant.new))
    return Report(target.label, seed, len(every), tuple(outcomes), time.monotonic() - began)


def wanted(file: str, paths: Iterable[str]) -> bool:
    paths = [PurePosixPath(path) for path in paths]
    return not paths or any(path == PurePosixPath(file) or path in PurePosixPath(file).parents for path in paths)


def judge(bench: Bench, mutant: Mutant, combos: list[Combo]) -> Outcome:
    """Ask one combo after the other until one notices."""
    asked, additive = [], ""
    for combo in combos:
        asked.append(combo.name)
        try:
            found = bench.compared({mutant.file: mutant.source}, combo, max(LEAST_S, SLOWER * bench.took_s(combo)))
        except NotJudged as error:
            return Outcome(mutant, "timeout" if error.late else "killed", str(error), tuple(asked))
        if VERDICTS.index(found.verdict) > VERDICTS.index("additive"):
            return Outcome(mutant, "killed", found.findings[0].rule, tuple(asked))
        if found.findings:
            additive = found.findings[0].rule
    return Outcome(mutant, "survived", additive, tuple(asked))


def text(report: Report) -> str:
    """The report as it is printed."""
    lines = []
    for outcome in report.survivors:
        note = f" (additive: {outcome.by})" if outcome.by else ""
        lines += [f"{outcome.mutant.where} {outcome.mutant.kind}{note}", *(f"  {x}" for x in outcome.mutant.diff())]
    how = Counter(outcome.how for outcome in report.outcomes)
    if report.unnoticed_lines:
        lines += ["", f"lines of which no mutant was noticed: {', '.join(report.unnoticed_lines)}", ""]
    killed = len(report.outcomes) - how["survived"]
    lines.append(
        f"{report.target}: {killed} of {len(report.outcomes)} mutants noticed ({report.kill_rate:.1%}), "
        f"{how['timeout']} of them by not ending; {how['survived']} survived; seed {report.seed}, "
        f"{report.possible} possible, {report.elapsed_s:.0f} s"
    )
    return "\n".join(lines)
