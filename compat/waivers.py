"""waivers.toml: findings that a repository accepts for a time, each with a reason and somebody to ask.

Unusual: an entry is bound to the facts it was written for, by a fingerprint over rule, path, and the old and the
new value; another change at the same place is another finding. An entry that is expired, out of bounds, unfilled
or unused fails the gate: a list of exceptions that nobody tends is no list.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from compat.findings import Finding
from compat.ranges import expand
from compat.reports.text import one_line

FILE = "waivers.toml"
MAX_DAYS = 180
PROPOSED_DAYS = 90
STEPS = 16  # a measured value is told to a sixteenth of the largest beside it: rounding differs by machine
TEXTS = ("fingerprint", "rule", "path", "old", "new", "reason", "owner")
HEADER = """\
# Findings of `compat gate` that are accepted for a time. An entry is bound by its fingerprint to one change;
# reason and owner are for you to fill in, and `expires` lies at most 180 days ahead.
"""


@dataclass(frozen=True)
class Waiver:
    """combos: those it is for; all of them when empty."""

    fingerprint: str
    rule: str
    path: str
    reason: str
    owner: str
    expires: date
    combos: tuple[str, ...] = ()

    def covers(self, finding: Finding, fingerprint: str, combo: str) -> bool:
        """Whether it was written for this finding; its rule and path must not tell of another one."""
        named = (self.fingerprint, self.rule, self.path) == (fingerprint, finding.rule, one_line(finding.path, 400))
        return named and (not self.combos or combo in self.combos)


def fingerprint(finding: Finding, a: dict, b: dict) -> str:
    """16 hex digits over the rule, every path, and the facts of both locks there; no text made for display counts.

    a, b: facts of the two sides. A path that neither holds (a check that fails, say) counts with its old and new.
    """
    paths = sorted({*(finding.members or expand(finding.path))})
    facts = [[path, _plain(a.get(path), finding), _plain(b.get(path), finding)] for path in paths]
    stated = [] if any(path in a or path in b for path in paths) else [finding.old, finding.new]
    text = json.dumps([finding.rule, facts, stated], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any, finding: Finding) -> Any:
    """A fact, measured numbers in it told coarsely."""
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        scale = max(map(abs, value))
        if not 0 < scale < math.inf:
            return value
        return [_coarse(scale), [round(item / scale * STEPS) for item in value]]
    if isinstance(value, list):
        return [_plain(item, finding) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, finding) for name, item in value.items()}
    measured = isinstance(value, float) or (finding.path.startswith("cost.peak.") and isinstance(value, int))
    return _coarse(value) if measured else value


def _coarse(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else str(value)


def read(text: str, today: date) -> tuple[list[Waiver], list[str]]:
    """(entries that hold, what is wrong with the file or with others, a sentence each)."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return [], [f"{FILE} cannot be read: {error}"]
    entries = document.pop("waiver", [])
    if document or not isinstance(entries, list):
        return [], [f"{FILE} holds {', '.join(document) or 'no [[waiver]] entries'}; entries begin with [[waiver]]"]
    found: list[Waiver] = []
    wrong: list[str] = []
    for number, entry in enumerate(entries, 1):
        why = _wrong(entry, today)
        name = f"{FILE}: entry {number}"
        if isinstance(entry, dict) and isinstance(entry.get("rule"), str):
            name += f" ({one_line(entry['rule'], 60)} {one_line(str(entry.get('path', '')), 120)})".replace(" )", ")")
        if not why:
            combos = tuple(entry.get("combos", ()))
            held = {name: entry[name] for name in ("fingerprint", "rule", "path", "reason", "owner", "expires")}
            made = Waiver(**held, combos=combos)
            if any(other.fingerprint == made.fingerprint and _meet(other, made) for other in found):
                why = "says the same as an entry above; remove one"
            else:
                found.append(made)
        if why:
            wrong.append(f"{name} {why}")
    return found, wrong


def _meet(one: Waiver, other: Waiver) -> bool:
    return not one.combos or not other.combos or bool(set(one.combos) & set(other.combos))


def _wrong(entry: Any, today: date) -> str:
    if not isinstance(entry, dict):
        return "is no table; entries begin with [[waiver]]"
    unknown = set(entry) - {*TEXTS, "expires", "combos"}
    missing = {*TEXTS, "expires"} - {"old", "new"} - set(entry)
    if unknown:
        return f"has {', '.join(sorted(unknown))}, which mean nothing here"
    if missing:
        return f"lacks {', '.join(sorted(missing))}"
    wrong = [name for name in TEXTS if not isinstance(entry.get(name, ""), str)]
    if wrong:
        return f"has {', '.join(wrong)} that is no text"
    combos = entry.get("combos", [])
    if not isinstance(combos, list) or not all(isinstance(name, str) for name in combos):
        return "has combos that are no list of names"
    if not re.fullmatch(r"[0-9a-f]{16}", entry["fingerprint"]):
        return "has a fingerprint that is not 16 hex digits; compat gate --propose writes it"
    empty = [name for name in ("reason", "owner") if not entry[name].strip()]
    if empty:
        return f"has no {' and no '.join(empty)} yet: fill in why this is accepted, and who answers for it"
    expires = entry["expires"]
    if type(expires) is not date:
        return f"expires {expires!r}, which is no date; write expires = {today + timedelta(days=PROPOSED_DAYS)}"
    if expires < today:
        return f"expired on {expires}: mend what it waives, or have it agreed anew"
    if expires > today + timedelta(days=MAX_DAYS):
        latest = today + timedelta(days=MAX_DAYS)
        return f"expires on {expires}, more than {MAX_DAYS} days ahead; {latest} is the latest"
    return ""


def proposal(findings: Iterable[tuple[Finding, str, list[str]]], today: date) -> str:
    """Entries for (finding, fingerprint, combos), reason and owner left to be filled in."""
    made = []
    for finding, print_, combos in findings:
        shown = {"path": one_line(finding.path, 400)}
        shown |= {"old": one_line(finding.old, 200), "new": one_line(finding.new, 200)}
        lines = [f'fingerprint = "{print_}"', f"rule = {_toml(finding.rule)}"]
        lines += [f"{name} = {_toml(text)}" for name, text in shown.items()]
        lines += [f"combos = [{', '.join(map(_toml, combos))}]", 'reason = ""', 'owner = ""']
        lines.append(f"expires = {today + timedelta(days=PROPOSED_DAYS)}")
        made.append("\n[[waiver]]\n" + "\n".join(lines) + "\n")
    return "".join(made)


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
