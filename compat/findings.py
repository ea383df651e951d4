"""From what the matchers say to what is told: a cause once, a run of layers as one pattern, nothing summed up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from compat.matchers.change import ABSENT, Change, Hit
from compat.matchers.pair import section_of
from compat.ranges import expand, group

SURFACES = {  # first word of a path -> who depends on it; the model where none is named
    "config": "config",
    "train_config": "train_config",
    "script": "scripts",
    "state": "checkpoint",
    "saved": "checkpoint",
    "saved_alias": "checkpoint",
    "tokenizer": "data",
    "processor": "data",
    "data": "data",
    "packed": "data",
    "backbones": "backbone_loading",
    "backbone_weights": "backbone_loading",
    "backbone_weights_resized": "backbone_loading",
}


@dataclass(frozen=True)
class Rule:
    """id: "LOAD.key_removed". surface: whom it concerns, "any" where the fact decides. The rest is for people."""

    id: str
    severity: str
    surface: str
    what: str
    why: str
    bad: str
    good: str
    fix: str

    @property
    def tier(self) -> str:
        return self.id.partition(".")[0]


@dataclass(frozen=True)
class Finding:
    """path: a fact, or several as a pattern (compat.ranges). old, new: as text to show.

    where: the first module that differs. also: patterns of facts that changed for the same reason.
    proof: what loading or calling it showed, in lines to paste.
    members: of measured values, every path with its old and new one; path is then the one farthest off.
    """

    rule: str
    severity: str
    surface: str
    path: str
    old: str
    new: str
    count: int = 1
    where: str = ""
    also: tuple[str, ...] = ()
    members: dict[str, list] = field(default_factory=dict)
    proof: str = ""

    def __str__(self) -> str:
        return f"{self.rule} {self.path}: {self.old} -> {self.new}"


def surface_of(path: str) -> str:
    return SURFACES.get(path.partition(".")[0], "model")


class Found:
    """What the matchers said: {rule: {path: Hit}}, and the changes that follow from another."""

    def __init__(self) -> None:
        self.hits: dict[str, dict[str, Hit]] = {}
        self.following: dict[str, list[Change]] = {}
        self.notes: list[str] = []
        self.proofs: dict[str, str] = {}  # of a rule

    def add(self, rule: str, path: str, hit: Hit) -> None:
        self.hits.setdefault(rule, {}).setdefault(path, hit)

    def follow(self, rule: str, change: Change) -> None:
        self.following.setdefault(rule, []).append(change)

    def promote(self) -> None:
        """A cause that no fact showed is told at the first of its consequences: nothing is dropped."""
        for rule, changes in self.following.items():
            if rule not in self.hits:
                self.add(rule, changes[0].path, Hit(changes[0].old, changes[0].new))

    def findings(self, catalogue: dict[str, Rule], where: str) -> list[Finding]:
        """where: the first module that differs, for the rules about numbers."""
        found, proofs = [], dict(self.proofs)
        for id, hits in self.hits.items():
            rule = catalogue[id]
            also = tuple(group(c.path for c in self.following.get(id, []) if c.path not in hits))
            for path, old, new, members in _grouped(hits):
                found.append(
                    Finding(
                        rule=id,
                        severity=rule.severity,
                        surface=surface_of(path) if rule.surface == "any" else rule.surface,
                        path=path,
                        old=old,
                        new=new,
                        count=len(members) or len(expand(path)),
                        where=where if rule.tier == "NUMERIC" else "",
                        also=also,
                        members=members,
                        proof=proofs.pop(id, ""),
                    )
                )
                also = ()  # told once a rule, as its proof is
        return found


def _grouped(hits: dict[str, Hit]) -> Iterator[tuple[str, str, str, dict]]:
    """(pattern, old, new, members): measured values together, stated ones where old and new read alike."""
    measured = {path: hit for path, hit in hits.items() if hit.size is not None}
    if measured:
        worst = max(measured, key=lambda path: measured[path].size or 0.0)
        members = {path: [plain(hit.old), plain(hit.new)] for path, hit in measured.items()}
        yield worst, shown(hits[worst].old), shown(hits[worst].new), members if len(members) > 1 else {}
    alike: dict[tuple[str, str], list[str]] = {}
    for path, hit in hits.items():
        if hit.size is None:
            alike.setdefault(_key(path, hit), []).append(path)
    for paths in alike.values():
        first = hits[paths[0]]
        for pattern in group(paths):
            if _names_a_key(paths[0], first):  # a rename: both names run over the same layers
                news = group(str(hits[path].new) for path in expand(pattern))
                yield pattern, pattern[len(section_of(paths[0])[0]) + 1 :], ", ".join(news), {}
            else:
                yield pattern, shown(first.old), shown(first.new), {}


def _names_a_key(path: str, hit: Hit) -> bool:
    return isinstance(hit.old, str) and isinstance(hit.new, str) and path.endswith("." + hit.old)


def _key(path: str, hit: Hit) -> tuple[str, str]:
    if _names_a_key(path, hit):
        old, new = (re.sub(r"(?<![^.])\d+(?![^.])", "#", text) for text in (path, hit.new))
        return old, new
    return shown(hit.old), shown(hit.new)


def plain(value: Any) -> Any:
    return repr(value) if value is ABSENT else value


def shown(value: Any) -> str:
    """A value as a finding shows it; text stands as it is."""
    return value if isinstance(value, str) else repr(value)
