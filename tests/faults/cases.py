"""The tables of faults and refactors, read from cases/*.toml: one change of our model's source each.

``old`` must stand in ``file`` exactly once and becomes ``new``; several such pairs are given as ``edit``. ``combo``
is where the change shows, the default one unless said.

Of a fault: ``caught`` are the rules meant for it, all of which have to fire. ``where`` says at what: the beginning of
the module that differs first, for NUMERIC.logits, or of the finding's path.
Of a refactor: ``moved`` is a module whose code goes to another file and whose old import keeps working.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from tests.house.tree import ROOT

TABLES = Path(__file__).with_name("cases")
GROUPS = ("vision", "projector", "splice", "language", "generation", "loss", "data", "config", "checkpoint", "cost")


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    name: str
    file: str = ""
    old: str = ""
    new: str = ""
    edit: list[dict[str, str]] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    combo: str = "siglip2-smollm2"
    caught: tuple[str, ...] = ()
    where: str = ""

    def files(self) -> dict[str, str]:
        """{file: its text after the change}; an edit that fits nowhere, or twice, is an error of the table."""
        changed = {}
        if self.file:
            text = (ROOT / self.file).read_text(encoding="utf-8")
            for pair in self.edit or [{"old": self.old, "new": self.new}]:
                found = text.count(pair["old"])
                assert found == 1, f"{self.name}: {self.file} holds {found} times {pair['old']!r}"
                text = text.replace(pair["old"], pair["new"])
            changed[self.file] = text
        if self.moved:
            code = (ROOT / self.moved["from"]).read_text(encoding="utf-8")
            names = sorted(set(re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE)))
            module = self.moved["to"].removesuffix(".py").replace("/", ".")
            changed[self.moved["to"]] = code
            changed[self.moved["from"]] = f"from {module} import {', '.join(names)}  # noqa: F401\n"
        return changed


def read(table: str) -> list[Case]:
    rows = tomllib.loads((TABLES / f"{table}.toml").read_text(encoding="utf-8"))
    return [Case(**row) for row in rows.get("fault", rows.get("refactor", []))]


FAULTS = {f"{group}: {case.name}": case for group in GROUPS for case in read(group)}
BENIGN = {case.name: case for case in read("benign")}
