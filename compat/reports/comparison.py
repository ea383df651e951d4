"""A comparison in the terminal: the verdict first, then breakages, behaviour, additions, notes.

Plain text with little colour and no library: two lock files are compared and shown in a third of a second.
"""

from __future__ import annotations

import os
import sys

from compat.findings import Finding, Rule
from compat.reports.text import one_line, printable
from compat.rules import VERDICTS, Comparison, catalogue

HEADINGS = {"breaking": "Breaking", "behaviour": "Behaviour", "additive": "Additive"}
COLOURS = {"identical": "32", "additive": "32", "behaviour": "33", "breaking": "31"}
FOLLOWING = 4  # patterns of what follows from a finding; --json has them all


def show(comparison: Comparison, stream=None) -> None:
    stream = stream or sys.stdout
    paint = _painter(stream)
    where = f"{comparison.combo} ({comparison.scale})"
    head = f"{comparison.verdict.upper()}: {_counts(comparison)}"
    sides = one_line(f"{comparison.a} -> {comparison.b} | {where}", 400)
    print(paint(head, "1;" + COLOURS[comparison.verdict]) + f" | {sides}", file=stream)
    for surface, verdict in comparison.verdicts.items():
        print(f"  {surface:16} {paint(verdict, COLOURS[verdict])}", file=stream)
    for severity in reversed(VERDICTS[1:]):
        found = [finding for finding in comparison.findings if finding.severity == severity]
        if found:
            print(f"\n{paint(HEADINGS[severity], '1')}", file=stream)
            _show_findings(found, paint, stream)
    if comparison.notes:
        print(f"\n{paint('Notes (no findings)', '1')}", file=stream)
        for note in comparison.notes:
            print(f"  {one_line(note)}", file=stream)


def _show_findings(findings: list[Finding], paint, stream) -> None:
    """Findings of one rule stand together, its fix once below them."""
    for rule in dict.fromkeys(finding.rule for finding in findings):
        for finding in findings:
            if finding.rule == rule:
                for line in lines(finding):
                    print(f"  {line}", file=stream)
        print(paint(f"    fix: {catalogue()[rule].fix}", "2"), file=stream)


def lines(finding: Finding) -> list[str]:
    text = f"{finding.rule} {one_line(finding.path, 400)}: {one_line(finding.old, 160)} -> {one_line(finding.new, 160)}"
    if finding.members:
        text += f" (the farthest off of {finding.count})"
    found = [text]
    found += [f"  {printable(line)}" for line in finding.proof.splitlines()]
    if finding.where:
        found.append(f"  first differs: {one_line(finding.where)}")
    if finding.also:
        more = len(finding.also) - FOLLOWING
        rest = f" and {more} more" if more > 0 else ""
        found.append(f"  with it: {one_line(', '.join(finding.also[:FOLLOWING]), 500)}{rest}")
    return found


def explain(rule: Rule) -> str:
    surface = "of whichever surface the fact belongs to" if rule.surface == "any" else f"for {rule.surface}"
    return "\n".join([
        f"{rule.id}: {rule.severity} {surface}",
        f"  {rule.what}",
        f"  why   {rule.why}",
        f"  bad   {rule.bad}",
        f"  good  {rule.good}",
        f"  fix   {rule.fix}",
    ])  # fmt: skip


def listing() -> str:
    return "\n".join(f"{rule.id:30} {rule.severity:10} {rule.what}" for rule in catalogue().values())


def _counts(comparison: Comparison) -> str:
    counts = [
        f"{sum(finding.severity == severity for finding in comparison.findings)} {severity}"
        for severity in reversed(VERDICTS[1:])
        if any(finding.severity == severity for finding in comparison.findings)
    ]
    return ", ".join(counts) or "nothing that matters changed"


def _painter(stream):
    coloured = stream.isatty() and "NO_COLOR" not in os.environ
    return (lambda text, code: f"\033[{code}m{text}\033[0m") if coloured else (lambda text, code: text)
