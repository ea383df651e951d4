"""What a run found, as plain data: Result (one test), Check (its tests summed up), Run (the whole).

Standard library only, so that a saved run renders anywhere. Text comes from code under judgement and may
hold anything: it is bounded here, and lone surrogates are escaped, so that every Run is valid UTF-8 JSON.
"""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime

SCHEMA = 1
PASSED, FAILED, ERROR, SKIPPED = "passed", "failed", "error", "skipped"
MESSAGE_CHARS, DETAIL_CHARS, OUTPUT_CHARS = 600, 4096, 20_000
OK, REGRESSION, USAGE, INCOMPLETE = 0, 1, 2, 3  # exit codes
LATER = {"findings", "cost", "facts", "source"}  # fields that runs saved by older versions do not have


class NotARun(ValueError):
    """A JSON document that is no saved run, or one of a schema we do not read."""


def bounded(text: str, limit: int, tail: bool = False) -> str:
    """`text` as valid UTF-8 of at most `limit` characters, saying how many were left out.

    tail=True keeps the end instead of the beginning.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= limit:
        return text
    mark = f" [... {len(text) - limit:,} characters left out ...] "
    keep = max(0, limit - len(mark))
    return mark + text[len(text) - keep :] if tail else text[:keep] + mark


@dataclass(frozen=True)
class Result:
    """One test's answer: failed is the target's doing, error is ours.

    Whatever did not pass says why in `message`: one line. `detail` may have many.
    """

    check: str
    test: str
    status: str
    message: str = ""
    detail: str = ""
    elapsed_s: float = 0.0
    combo: str = ""

    def __post_init__(self):
        if self.status not in (PASSED, FAILED, ERROR, SKIPPED):
            raise ValueError(f"status {self.status!r} is none of passed, failed, error, skipped")
        if self.status != PASSED and not self.message.strip():
            raise ValueError(f"{self.check}, {self.test}: {self.status} without a message")
        object.__setattr__(self, "message", bounded(" ".join(self.message.split()), MESSAGE_CHARS))
        object.__setattr__(self, "detail", bounded(self.detail, DETAIL_CHARS))


@dataclass(frozen=True)
class Check:
    """The tests of one check under one combo. Its status is the worst of theirs; skipped only if all are."""

    title: str
    combo: str
    results: tuple[Result, ...]

    def count(self, status: str) -> int:
        return sum(result.status == status for result in self.results)

    @property
    def status(self) -> str:
        for status in (FAILED, ERROR, PASSED):
            if self.count(status):
                return status
        return SKIPPED

    @property
    def elapsed_s(self) -> float:
        return sum(result.elapsed_s for result in self.results)

    @property
    def first_message(self) -> str:
        """The message of the first test that has the check's status: the failure, or why it was skipped."""
        if self.status == PASSED:
            return ""
        return next(result.message for result in self.results if result.status == self.status)


def new_id(now: datetime) -> str:
    """Sorts by time and is unique among runs of one second: 20251121T030346Z-9f3c1a."""
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@dataclass
class Run:
    """One `compat run`. `incomplete` says why not every test was asked; empty when every one was."""

    id: str
    started: str  # ISO 8601, UTC
    target: dict
    scale: str
    combos: list[str]
    environment: dict = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    incomplete: str = ""
    output: str = ""
    notes: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0
    start_s: float = 0.0  # of elapsed_s, until the target's process gave its first answer
    log: dict = field(default_factory=dict)  # {"path", "entry", "error"} once it was written, or refused
    # combo, rule, tier, path, old, new, verdict (a severity of compat.rules), why, fix, waived ("" or the reason)
    findings: list[dict] = field(default_factory=list)
    cost: dict = field(default_factory=dict)  # combo -> {"flops_forward": 7004672, ...}, what compat.figures measured
    facts: dict = field(default_factory=dict)  # combo -> {"special_tokens", "loading_fields", "not_measured"}
    source: str = ""  # of a run that was read from a log somebody kept by hand: the file, and the heading's line
    schema: int = SCHEMA

    @classmethod
    def begin(cls, target: dict, scale: str, combos: list[str]) -> Run:
        now = datetime.fromtimestamp(time.time(), UTC)
        return cls(new_id(now), now.isoformat(timespec="seconds"), target, scale, list(combos))

    def checks(self, combo: str | None = None) -> list[Check]:
        """Results grouped by combo and check, in the order they were asked."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            if combo is None or result.combo == combo:
                groups.setdefault((result.combo, result.check), []).append(result)
        return [Check(title, name, tuple(results)) for (name, title), results in groups.items()]

    def count(self, status: str) -> int:
        """How many checks (not tests) have this status."""
        return sum(check.status == status for check in self.checks())

    @property
    def exit_code(self) -> int:
        """A failure is a finding whatever else went wrong; without one, anything unanswered is no success."""
        if self.incomplete.startswith("interrupted"):
            return INCOMPLETE
        if self.count(FAILED):
            return REGRESSION
        if self.incomplete or self.count(ERROR) or not self.count(PASSED):
            return INCOMPLETE
        return OK

    def as_json(self) -> dict:
        """Plain data for json.dump(allow_nan=False): NaN and infinities become strings."""
        return plain(asdict(self))

    @classmethod
    def from_json(cls, data: dict) -> Run:
        if not isinstance(data, dict) or "schema" not in data:
            raise NotARun("this is no saved run: it has no schema number")
        if data["schema"] != SCHEMA:
            raise NotARun(f"the run is of schema {data['schema']!r}; this version reads schema {SCHEMA}")
        known = {f.name for f in fields(cls)}
        wrong = sorted((set(data) - known) | (known - LATER - set(data)))
        if wrong:
            raise NotARun(f"the run's fields do not fit schema {SCHEMA}: {', '.join(wrong)}")
        try:
            return cls(**{**data, "results": [Result(**result) for result in data["results"]]})
        except (TypeError, ValueError) as error:
            raise NotARun(f"a result in the run is malformed: {error}") from None


def plain(value):
    """Values as JSON has them. Keys become text; what JSON does not know becomes its repr."""
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return plain(repr(value))
