"""A gate's answer in the terminal and in the log: verdict, changed policy, new breakages, waived, not run, the rest."""

from __future__ import annotations

import sys

from compat.gate import Gate, Judged
from compat.reports.comparison import _painter, lines
from compat.reports.text import code, one_line
from compat.rules import VERDICTS, catalogue

COLOURS = {0: "32", 1: "31", 3: "35"}
ALIKE = 4  # skipped tests shown of one reason; --json has them all


def show(found: Gate, stream=None, quiet: bool = False) -> None:
    stream = stream or sys.stdout
    paint = _painter(stream)
    print(paint(headline(found), "1;" + COLOURS[found.exit_code]), file=stream)
    if found.policy:
        print(f"\n{paint(_policy_heading(found), '1')}", file=stream)
        for change in found.policy:
            print(f"  {one_line(str(change), 400)}", file=stream)
    _section("Waivers that do not hold", [one_line(text, 600) for text in found.problems], paint, stream)
    _section("Could not be asked", [one_line(text, 600) for text in found.incomplete], paint, stream)
    _findings("New", found.new, found, paint, stream, fix=True)
    _findings("Waived", found.waived, found, paint, stream)
    if quiet:
        return
    _section("Not run", _not_run(found.not_run), paint, stream)
    _findings("Fails on base too, so no news", found.known, found, paint, stream)
    _findings("Additions", found.additions, found, paint, stream)
    _section("Notes (no findings)", [one_line(note) for note in found.notes], paint, stream)


def headline(found: Gate) -> str:
    """PASSED: nothing new | . against the merge-base with main, 1a2b3c4d5e | siglip2-smollm2 (tiny) | 8.1 s"""
    counts = [
        (len(found.unapproved), "change of policy to approve", "changes of policy to approve"),
        (len(found.new), "new finding", "new findings"),
        (len(found.problems), "waiver that does not hold", "waivers that do not hold"),
        (len(found.waived), "waived", "waived"),
        (len(found.incomplete), "could not be asked", "could not be asked"),
    ]
    told = ", ".join(f"{number} {one if number == 1 else more}" for number, one, more in counts if number)
    spent = f"{found.elapsed_s:.1f} s" + ("" if found.starts else ", all of it known")
    where = f"{found.head} against {found.base} | {', '.join(found.combos)} ({found.scale}) | {spent}"
    return one_line(f"{found.verdict.upper()}: {told or 'nothing new'} | {where}", 600)


def _policy_heading(found: Gate) -> str:
    if found.approved:
        return "Policy changed, and the change is approved: head is judged by its own"
    return "Policy changed: head is judged by that of base" + (
        "; have the change approved in the pull request" if found.unapproved else ""
    )


def _section(heading: str, texts: list[str], paint, stream) -> None:
    if texts:
        print(f"\n{paint(heading, '1')}", file=stream)
        for text in texts:
            print(f"  {text}", file=stream)


def _findings(heading: str, items: list[Judged], found: Gate, paint, stream, fix: bool = False) -> None:
    if not items:
        return
    print(f"\n{paint(heading, '1')}", file=stream)
    for item in sorted(items, key=lambda item: -VERDICTS.index(item.finding.severity)):
        first, *more = lines(item.finding)
        where = f" [{', '.join(item.combos)}]" if len(found.combos) > 1 else ""
        print(f"  {first}{where}", file=stream)
        for line in more:
            print(f"  {line}", file=stream)
        if item.reason:
            print(f"    waived: {one_line(item.reason)}", file=stream)
        rule = catalogue().get(item.finding.rule)
        if fix and rule:
            print(paint(f"    fix: {rule.fix}", "2"), file=stream)


def _not_run(texts: list[str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for text in texts:
        test, _, reason = text.rpartition(": ")
        reasons.setdefault(reason, []).append(test)
    told = []
    for reason, tests in reasons.items():
        more = f" and {len(tests) - ALIKE} more" if len(tests) > ALIKE else ""
        told.append(one_line(f"{reason}: {', '.join(tests[:ALIKE])}{more}", 400))
    return told


def entry(found: Gate) -> str:
    """What the log's entry of the run gets beside checks and findings: markdown."""
    told = [f"\n**Gate**: {code(headline(found), 600)}"]
    told += [f"- Policy: {code(str(change))}" for change in found.policy]
    told += [f"- Waiver: {code(text)}" for text in found.problems]
    return "\n".join(told) + "\n"
