"""Two locks in, findings and a verdict out: pure functions over facts, standard library alone.

Unusual: a change that no rule claims is itself a finding, and a change that a rule elsewhere explains is
listed with that rule's finding instead of being told twice. What fails alike on both sides is the
environment's doing and a note. A rule is one entry in rules.toml and one matcher in compat/matchers.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from compat.crossing import Crossing
from compat.findings import SURFACES, Finding, Found, Rule, surface_of
from compat.matchers import FOLLOWS, RULES
from compat.matchers.change import ABSENT, Change, Hit, same
from compat.matchers.pair import Pair, section_of
from compat.result import OK, REGRESSION

TABLE = Path(__file__).with_name("rules.toml")
SCHEMA = 1
VERDICTS = ("identical", "additive", "behaviour", "breaking")  # from best to worst
TIERS = ("LOAD", "NUMERIC", "API", "DATA", "TRAIN", "COST")
RAISES = ("numbers", "greedy", "returns", "data", "packed", "processor", "loss_curve", "gradient", "cost", "init")


class UnknownRule(ValueError):
    """A rule id that rules.toml does not hold; the message names near ones."""


class NotComparable(ValueError):
    """Two locks that answer different questions: another combo, scale or schema, or no facts."""


@dataclass(frozen=True)
class Comparison:
    """verdicts: surface -> verdict, for the surfaces that either lock says anything of. notes: no findings."""

    a: str
    b: str
    combo: str
    scale: str
    verdicts: dict[str, str]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        return max(self.verdicts.values(), key=VERDICTS.index)

    @property
    def exit_code(self) -> int:
        return OK if self.verdict in VERDICTS[:2] else REGRESSION

    def as_json(self) -> dict:
        return {"schema": SCHEMA, "verdict": self.verdict, **asdict(self)}


@cache
def catalogue() -> dict[str, Rule]:
    """Every rule by id, in the file's order. Raises ValueError naming the rule that is wrong."""
    return read_rules(TABLE)


def read_rules(path: Path) -> dict[str, Rule]:
    with open(path, "rb") as file:
        tiers = tomllib.load(file)
    rules = {}
    for tier, entries in tiers.items():
        for name, entry in entries.items():
            try:
                rule = Rule(id=f"{tier}.{name}", **entry)
            except TypeError as error:
                raise ValueError(f"{TABLE.name}: {tier}.{name}: {error}") from None
            if tier not in TIERS or rule.severity not in VERDICTS[1:]:
                raise ValueError(f"{TABLE.name}: {rule.id}: no tier {tier} or no severity {rule.severity!r}")
            rules[rule.id] = rule
    return rules


def find_rule(text: str) -> Rule:
    """The rule of an id, whatever its case, or of a name without its tier when only one rule has it."""
    wanted = text.lower()
    found = [rule for rule in catalogue().values() if wanted in (rule.id.lower(), rule.id.partition(".")[2].lower())]
    if len(found) == 1:
        return found[0]
    near = [rule.id for rule in found] or [name for name in catalogue() if wanted.rpartition(".")[2] in name.lower()]
    raise UnknownRule(f"no rule named {text!r}" + (f"; near: {', '.join(near[:6])}" if wanted and near else ""))


def compare(
    lock_a: dict,
    lock_b: dict,
    rules: dict[str, Rule] | None = None,
    allowed: dict | None = None,
    crossing: Crossing | None = None,
) -> Comparison:
    """What changed from A to B, by ``rules`` and tolerances (``allowed``) other than ours if given.

    crossing: what came of loading A's checkpoint in B (compat.witness); without it the locks alone are judged.
    Raises NotComparable.
    """
    _same_question(lock_a, lock_b)
    a, b = lock_a["facts"], lock_b["facts"]
    found = Found()
    devices = _device(lock_a), _device(lock_b)
    own = Pair(a, b, devices, allowed)
    if crossing:
        a, b = crossing.sides(a, b)
    a, b = _without_failures(a, b, found)
    pair = Pair(a, b, devices, allowed)
    if crossing:
        pair.crossed, pair.promised = crossing.measured is not None, crossing.promised
    for change in _changes(pair):
        _judge(change, found)
    found.promote()
    if crossing:
        crossing.settle(found, own)
        found.notes += crossing.notes
    surfaces = {surface_of(path) for path in (*lock_a["facts"], *lock_b["facts"])}
    findings = sorted(
        found.findings(rules or catalogue(), "" if pair.redrawn else pair.first_difference),
        key=lambda f: (-VERDICTS.index(f.severity), *_place(f.rule)),
    )
    surfaces |= {finding.surface for finding in findings}
    order = dict.fromkeys([*SURFACES.values(), "model"])
    worst = {
        surface: max((f.severity for f in findings if f.surface == surface), key=VERDICTS.index, default="identical")
        for surface in order
        if surface in surfaces
    }
    return Comparison(
        str(lock_a.get("target", "A")),
        str(lock_b.get("target", "B")),
        str(lock_a.get("combo", "")),
        str(lock_a.get("scale", "")),
        worst,
        tuple(findings),
        tuple(_notes(lock_a, lock_b, pair, found)),
    )


def _same_question(lock_a: dict, lock_b: dict) -> None:
    for name in ("schema", "combo", "scale"):
        if lock_a.get(name) != lock_b.get(name):
            raise NotComparable(
                f"{name} is {lock_a.get(name)!r} in A and {lock_b.get(name)!r} in B: lock both with the same one"
            )
    if not lock_a.get("facts") or not lock_b.get("facts"):
        raise NotComparable(f"{'A' if not lock_a.get('facts') else 'B'} holds no facts")


def _device(lock: dict) -> str:
    return str((lock.get("environment") or {}).get("device") or "cpu")


def _place(rule: str) -> tuple[int, int]:
    return TIERS.index(rule.partition(".")[0]), list(catalogue()).index(rule)


def _changes(pair: Pair) -> list[Change]:
    found = []
    for path in dict.fromkeys([*pair.a, *pair.b]):
        old, new = pair.a.get(path, ABSENT), pair.b.get(path, ABSENT)
        if not same(old, new):
            section, name = section_of(path)
            found.append(Change(path, section, name, old, new, pair))
    return found


def _judge(change: Change, found: Found) -> None:
    follows = FOLLOWS.get(change.section)
    cause = follows(change) if follows else None
    if cause == "":
        return
    if cause:
        found.follow(cause, change)
        return
    hits = [(rule, matcher(change)) for rule, matcher in RULES.get(change.section, {}).items()]
    for rule, hit in hits:
        if hit:
            found.add(rule, hit.path or change.path, hit)
    if not any(hit for _, hit in hits):
        found.add("API.unnamed_fact", change.path, Hit(change.old, change.new))


# -- what is not supported, and what fails ---------------------------------------------------------------------


def _failures(facts: dict) -> dict[str, tuple[str, str]]:
    """{path: ("error", type) or ("unsupported", reason)}."""
    found = {}
    for path, value in facts.items():
        if isinstance(value, dict):
            for kind in ("error", "unsupported"):
                if isinstance(value.get(kind), str):
                    found[path] = (kind, _type(value[kind]) if kind == "error" else value[kind])
        elif path.endswith(".error") and isinstance(value, str) and path.partition(".")[0] in RAISES:
            found[path.removesuffix(".error")] = ("error", _type(value))
    return found


def _type(text: str) -> str:
    """TypeError of "TypeError: __init__() got an unexpected ..." and of "builtins.TypeError"."""
    return re.split(r"[:\s(]", text.strip(), maxsplit=1)[0].rpartition(".")[2]


def _above(path: str, among) -> str | None:
    """The outermost of `among` that is `path` or holds it."""
    parts = path.split(".")
    return next((head for end in range(1, len(parts) + 1) if (head := ".".join(parts[:end])) in among), None)


def _without_failures(a: dict, b: dict, found: Found) -> tuple[dict, dict]:
    """The facts outside whatever failed on a side; the failures themselves are judged here."""
    failures = _failures(a), _failures(b)
    every = {*failures[0], *failures[1]}
    outer = [path for path in sorted(every) if _above(path, every) == path]
    kept, inside = [], []
    for facts, failed in zip((a, b), failures, strict=True):
        owner = {path: _above(path, every) for path in facts}
        kept.append({path: value for path, value in facts.items() if owner[path] is None})
        inside.append({head for path, head in owner.items() if head and _above(path, failed) is None})
    for path in outer:
        old = ("works", "works") if path in inside[0] else _any_failure(path, failures[0])
        new = ("works", "works") if path in inside[1] else _any_failure(path, failures[1])
        _judge_failure(path, old, new, found)
    return kept[0], kept[1]


def _any_failure(path: str, failed: dict) -> tuple[str, str] | None:
    return next((how for at, how in sorted(failed.items()) if at == path or at.startswith(path + ".")), None)


def _judge_failure(path: str, old: tuple[str, str] | None, new: tuple[str, str] | None, found: Found) -> None:
    if old is None or new is None:
        held = old or new
        if held:
            found.notes.append(f"{path}: {held[1]} in {'A' if old else 'B'}, and the other lock says nothing of it")
        return
    rule = {
        ("works", "error"): "API.error_appeared",
        ("error", "works"): "API.error_gone",
        ("works", "unsupported"): "API.support_lost",
        ("unsupported", "works"): "API.support_gained",
        ("error", "unsupported"): "API.support_lost",
        ("unsupported", "error"): "API.error_appeared",
    }.get((old[0], new[0]))
    if rule is None and old[0] == "error" and old[1] != new[1]:
        rule = "API.error_type"
    if rule:
        found.add(rule, path, Hit(old[1], new[1]))
    elif old[0] == "error":
        found.notes.append(f"{path}: {old[1]} on both sides, so no difference between them")


def _notes(lock_a: dict, lock_b: dict, pair: Pair, found: Found) -> list[str]:
    notes = list(found.notes)
    old, new = pair.a.get("cost.operators"), pair.b.get("cost.operators")
    if isinstance(old, int) and isinstance(new, int) and old != new:
        notes.append(f"operators in a forward pass: {old} -> {new}")
    inside = pair.first_difference
    if inside and not pair.redrawn and not any(rule.startswith("NUMERIC.") for rule in found.hits):
        notes.append(f"values inside differ from {inside} on, and every output is the same")
    environments = lock_a.get("environment") or {}, lock_b.get("environment") or {}
    apart = [
        name
        for name in sorted({*environments[0], *environments[1]})
        if environments[0].get(name) != environments[1].get(name)
    ]
    for name in apart:
        notes.append(f"environment: {name} {environments[0].get(name)} -> {environments[1].get(name)}")
    return notes
