"""docs/rules.md, written from rules.toml: `python -m compat.reports.rules_page` writes it anew."""

from __future__ import annotations

import sys
from pathlib import Path

from compat.findings import Rule
from compat.rules import TIERS, catalogue

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
TIER_WORDS = {
    "LOAD": "does what was saved load",
    "NUMERIC": "are the numbers the same",
    "API": "do calls, configs and command lines still work",
    "DATA": "does the model see the same",
    "TRAIN": "does training go the same way",
    "COST": "what does it cost",
}
HEAD = """\
# Rules

What `compat compare` may find, {count} rules. *Additive* hurts nobody, *behaviour* answers differently,
*breaking* fails. `compat explain RULE` says the same in the terminal. This page is written from
`compat/rules.toml` by `python -m compat.reports.rules_page`.
"""


def page() -> str:
    parts = [HEAD.format(count=len(catalogue()))]
    for tier in TIERS:
        parts.append(f"## {tier}: {TIER_WORDS[tier]}\n")
        parts += [entry(rule) for rule in catalogue().values() if rule.tier == tier]
    return "\n".join(parts)


def entry(rule: Rule) -> str:
    surface = "whichever surface the fact belongs to" if rule.surface == "any" else f"surface `{rule.surface}`"
    return (
        f"### {rule.id}\n\n*{rule.severity}*, {surface}. {rule.what}\n\n{rule.why}\n\n"
        f"- bad: `{rule.bad}`\n- good: `{rule.good}`\n- fix: {rule.fix}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(catalogue())} rules", file=sys.stderr)
