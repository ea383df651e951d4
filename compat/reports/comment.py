"""A run or a gate as Markdown: the job summary, and the one comment of a pull request that is written anew each time.

Unusual: it is made from data alone, so a job that may write comments makes it without ever running a fork:
``python -m compat.reports.comment gate.json [run.json]``, standard library only. What a fork said stands in code
spans, where no tag, link, mention or marker begins.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from compat.reports.history import History, NotRun, Summary, change, shown, status_words
from compat.reports.text import code, one_line, printable, prose
from compat.result import USAGE, NotARun, Run
from compat.rules import catalogue

MARKER = "<!-- compat:{} -->"  # by its first line the comment is found again
LIMIT = 60_000  # characters; GitHub takes 65,536
MOST = 20  # of a section
PROOF = 4000  # characters of one
MARK = {"passed": "✅", "failed": "❌", "incomplete": "⚠️", "pending": "⏳"}


def of_run(summary: Summary) -> str:
    """A run beside those before it."""
    run = summary.run
    verdict, passed, asked, skipped = status_words(run)
    skips = f", {skipped} skipped" if skipped else ""
    head = f"{passed} of {asked} checks passed{skips}"
    sections = [_verdict("run", verdict, head, run.target.get("label"), run.combos, run.scale, run.elapsed_s)]
    sections.append(_section("New failures", summary.new, _state))
    sections.append(_section("Still failing", summary.still, _state))
    sections.append(_findings("New findings", summary.breakages, len(run.combos)))
    sections.append(_findings("Waived", summary.waived, len(run.combos)))
    return _whole(sections + _rest(summary))


def of_gate(gate: dict, summary: Summary | None = None) -> str:
    """A gate's JSON, and its run's figures if there was one. Raises what a malformed document raises."""
    new, waived = list(gate["new"]), list(gate["waived"])
    counts = [(len(new), "new"), (len(waived), "waived"), (len(gate["incomplete"]), "could not be asked")]
    told = ", ".join(f"{number} {what}" for number, what in counts if number) or "nothing new"
    head = f"{told}, against {code(str(gate['base']), 200)}"
    verdict = gate["verdict"] if gate["verdict"] in MARK else "incomplete"
    spent = float(gate["elapsed_s"])
    sections = [_verdict("gate", verdict, head, gate["head"], gate["combos"], gate["scale"], spent)]
    policy = "Policy changed" + (", approved" if gate["policy"]["approved"] else ": head is judged by that of base")
    changes = gate["policy"]["changes"]
    sections.append(_section(policy, changes, lambda change: f"{code(change['path'])}: {code(change['what'])}"))
    sections.append(_section("Waivers that do not hold", gate["problems"], lambda text: code(str(text), 500)))
    sections.append(_section("Could not be asked", gate["incomplete"], lambda text: code(str(text), 500)))
    sections.append(_findings("New findings", new, len(gate["combos"])))
    sections.append(_findings("Waived", waived, len(gate["combos"])))
    if summary is None:
        return _whole([*sections, _section("Not run", gate["not_run"], lambda text: code(str(text), 300), folded=True)])
    return _whole(sections + _rest(summary))


def _rest(summary: Summary) -> list[str]:
    trend = [delta for delta in summary.trend if delta.old is not None and delta.new != delta.old]
    return [
        _section("Not run", summary.not_run, _not_run, folded=True),
        _section("Trend", trend, lambda d: f"{d.metric.title} of {code(d.row.combo, 80)}: "
                 f"{shown(d.metric, d.old)} -> {shown(d.metric, d.new)} ({change(d)})"),
    ]  # fmt: skip


def _verdict(kind: str, verdict: str, head: str, label, combos: Iterable[str], scale: str, spent: float) -> str:
    combo = code(", ".join(map(str, combos)), 300)
    where = f"{code(str(label), 120)} | {combo} ({code(str(scale), 20)}) | {spent:.1f} s"
    return f"### {MARK[verdict]} compat {kind}: {verdict}\n\n{head}\n\n{where}"


def _section(heading: str, items: Iterable, line: Callable, folded: bool = False) -> str:
    items = list(items)
    if not items:
        return ""
    told = [f"- {line(item)}" for item in items[:MOST]]
    if len(items) > MOST:
        told.append(f"- and {len(items) - MOST} more")
    body = "\n".join(told)
    if folded:
        return f"<details><summary>{heading} ({len(items)})</summary>\n\n{body}\n\n</details>"
    return f"#### {heading} ({len(items)})\n\n{body}"


def _state(state) -> str:
    return f"{code(state.check, 80)} of {code(state.row.combo, 80)}: {code(state.answer.message, 400)}"


def _findings(heading: str, rows: Iterable[dict], of: int) -> str:
    """Rows of a run's record or of a gate's JSON; those of one rule stand together, its fix once. of: combos."""
    rows = list(rows)
    if not rows:
        return ""
    told = [f"#### {heading} ({len(rows)})\n"]
    for rule in dict.fromkeys(str(row["rule"]) for row in rows[:MOST]):
        known = catalogue().get(rule)
        new = known and any(str(row["rule"]) == rule and not _reason(row) for row in rows)
        told.append(f"- {code(rule, 80)}" + (f" fix: {prose(known.fix)}" if known and new else ""))
        told += [f"  - {_row(row, of)}" for row in rows[:MOST] if str(row["rule"]) == rule]
    if len(rows) > MOST:
        told.append(f"- and {len(rows) - MOST} more")
    return "\n".join(told + [_proof(row) for row in rows[:MOST] if row.get("proof")])


def _proof(row: dict) -> str:
    """What loading the old checkpoint showed, to be copied: a fence that nothing inside can end."""
    text = printable(str(row["proof"])[:PROOF]).strip()
    fence = "`" * (2 + max(map(len, re.findall("`+", text)), default=1))
    head = f"<details><summary>{text.count(chr(10)) + 1} lines of proof</summary>"
    return f"\n{code(str(row['rule']), 80)}: {head}\n\n{fence}\n{text}\n{fence}\n\n</details>"


def _row(row: dict, of: int) -> str:
    told = f"{code(str(row['path']), 300)}: {code(str(row['old']), 160)} -> {code(str(row['new']), 160)}"
    combos = row.get("combos") or [row.get("combo", "")]
    if of > 1:
        told += f" {code(', '.join(map(str, combos)), 200)}"
    if row.get("where"):
        told += f"; {code(str(row['where']), 400)}"
    if row.get("proof"):
        told += f"; {code(str(row['proof']).strip().partition(chr(10))[0], 300)}"
    return told + (f"; waived: {code(_reason(row), 300)}" if _reason(row) else "")


def _reason(row: dict) -> str:
    return str(row.get("reason") or row.get("waived") or "")


def _not_run(item: NotRun) -> str:
    of = f"{code(item.check, 80)}, " if item.check else ""
    return f"{of}{code(item.what, 120)} {code(item.combo, 80) if item.combo else ''}: {code(item.why, 300)}"


def _whole(sections: list[str]) -> str:
    """Sections as long as they fit, and a word on those that do not."""
    told, left = "", 0
    for section in sections:
        if section and len(told) + len(section) > LIMIT:
            left += 1
        elif section:
            told += section + "\n\n"
    return told + (f"{left} sections were too long to show here; the job's files have them.\n" if left else "")


def sticky(kind: str, markdown: str) -> str:
    """With the marker by which the next run finds this comment. kind: "gate" or "run"."""
    return f"{MARKER.format(kind)}\n{markdown.rstrip()}\n"


def main(arguments: list[str]) -> int:
    """Print the comment for GATE.json and, if given, RUN.json."""
    try:
        if not 1 <= len(arguments) <= 2:
            raise ValueError("usage: python -m compat.reports.comment gate.json [run.json]")
        gate, *runs = (json.loads(Path(name).read_bytes()) for name in arguments)
        summary = None
        if runs:
            run = Run.from_json(runs[0])
            summary = History([run]).summary(run)
        text = sticky("gate", of_gate(gate, summary))
    except (OSError, NotARun, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = one_line(f"{type(error).__name__}: {error}")
        print(f"compat.reports.comment: no comment was made: {why}", file=sys.stderr)
        return USAGE
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
