"""What other programs are told of a run or of a gate: one Item a finding, failing test, bad waiver or stop.

Unusual: a gate comes as the JSON that ``compat gate --json`` writes, so that a job with more rights than the one
that ran the fork can tell of it later, from data alone. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from compat.findings import Finding
from compat.result import ERROR, FAILED, Result, Run
from compat.rules import catalogue
from compat.suites import catalogue as suites
from compat.waivers import fingerprint

LEVELS = {"breaking": "error", "behaviour": "warning", "additive": "note"}
POLICY, WAIVER, INCOMPLETE, OURS = "GATE.policy", "GATE.waiver", "COMPAT.incomplete", "COMPAT.error"
ABOUT = {
    POLICY: "Rules, waivers, committed locks or tolerances were changed, and nobody approved it.",
    WAIVER: "An entry of waivers.toml does not hold.",
    INCOMPLETE: "Not everything could be asked.",
    OURS: "An error of the judge, which says nothing of the target.",
}
PLACE = re.compile(r"\(([\w./-]+\.py):(\d+)\)\s*$", re.ASCII)


@dataclass(frozen=True)
class Item:
    """rule: LOAD.key_renamed, SUITE.save_load or one of ABOUT. level: error, warning or note.

    path: the fact, or the test. file, line: in the target, where it is known. waived: the reason, or "".
    """

    rule: str
    level: str
    text: str
    path: str = ""
    check: str = ""
    fix: str = ""
    combos: tuple[str, ...] = ()
    fingerprint: str = ""
    waived: str = ""
    file: str = ""
    line: int = 0


def of_run(run: Run) -> list[Item]:
    """Failing tests, errors of ours, and why not everything was asked; a test that fails alike in combos is one."""
    found: dict[tuple, Item] = {}
    for result in run.results:
        if result.status in (FAILED, ERROR):
            item = _of_test(result)
            same = (item.rule, item.check, item.path, item.text)
            known = found.get(same, item)
            found[same] = replace(known, combos=tuple(dict.fromkeys([*known.combos, result.combo])))
    items = list(found.values())
    return items + [Item(INCOMPLETE, "warning", run.incomplete)] * bool(run.incomplete)


def _of_test(result: Result) -> Item:
    if result.status == ERROR:
        return Item(OURS, "warning", result.message, result.test, result.check, combos=(result.combo,))
    name = next((suite.name for suite in suites() if suite.title == result.check), "suites")
    # The very finding that a gate makes of the test, so that both have one fingerprint.
    finding = Finding(f"SUITE.{name}", "breaking", "model", result.test, "passes", "fails")
    print_ = fingerprint(finding, {}, {})
    item = Item(finding.rule, "error", result.message, result.test, result.check, "", (result.combo,), print_)
    return _placed(item, result.message)


def of_gate(gate: dict) -> list[Item]:
    """What fails the gate, what is waived, and what could not be asked. Raises what a malformed document raises."""
    items = []
    if not gate["policy"]["approved"]:
        for change in gate["policy"]["changes"]:
            if not change["narrows"]:
                items.append(Item(POLICY, "error", str(change["what"]), file=str(change["path"])))
    items += [Item(WAIVER, "error", str(text), file="waivers.toml") for text in gate["problems"]]
    items += [_of_finding(row) for row in [*gate["new"], *gate["waived"]]]
    return items + [Item(INCOMPLETE, "warning", str(text)) for text in gate["incomplete"]]


def _of_finding(row: dict) -> Item:
    rule = catalogue().get(row["rule"])
    test = row["rule"].startswith("SUITE.")
    titles = {f"SUITE.{suite.name}": suite.title for suite in suites()} if test else {}
    item = Item(
        str(row["rule"]),
        LEVELS[row["severity"]],
        str(row["where"]) if test else f"{row['old']} -> {row['new']}",
        str(row["path"]),
        titles.get(row["rule"], ""),
        rule.fix if rule else "",
        tuple(map(str, row["combos"])),
        str(row["fingerprint"]),
        str(row["reason"]),
    )
    return _placed(item, item.text) if test else item


def accepted(gate: dict) -> dict[tuple[str, str, str], str]:
    """{(combo, check, test): why} of the failing tests that do not fail the gate."""
    titles = {f"SUITE.{suite.name}": suite.title for suite in suites()}
    found = {}
    for row in [*gate["known"], *gate["waived"]]:
        for combo in row["combos"]:
            if row["rule"] in titles:
                why = f"waived: {row['reason']}" if row["reason"] else "fails on base too, so no news"
                found[combo, titles[row["rule"]], row["path"]] = why
    return found


def _placed(item: Item, message: str) -> Item:
    """With the file and line of the target that its exception came from."""
    match = PLACE.search(message)
    return replace(item, file=match[1], line=int(match[2])) if match else item


def model_file(run: Run) -> str:
    """The file of the model, from the target's folder; "" where the run does not say, or it is not there."""
    module = str(run.environment.get("model_class", "")).partition(":")[0]
    if not re.fullmatch(r"[\w.]+", module, re.ASCII):
        return ""
    folder, wanted = Path(str(run.target.get("folder", "."))), module.replace(".", "/")
    for name in (f"{wanted}.py", f"{wanted}/__init__.py"):
        if (folder / name).is_file():
            return name
        nested = next(iter(sorted(path for path in folder.glob(f"*/{name}") if path.is_file())), None)
        if nested:  # a project that keeps its code in src/, say
            return nested.relative_to(folder).as_posix()
    return ""


def place(item: Item, run: Run | None, root: Path) -> tuple[str, int]:
    """(file from ``root``, line from 1) to show the item at; ("", 0) where nothing of the target can be named.

    A finding about behaviour has no line of its own: it is shown where the model's class begins.
    """
    folder = Path(str(run.target.get("folder", "."))) if run else root
    ours = item.rule in (POLICY, WAIVER)  # their files are named from the top of the repository
    name = item.file or (model_file(run) if run else "")
    if not name:
        return "", 0
    if ours:
        return (name, 1) if (root / name).is_file() else ("", 0)
    try:
        path = (folder / name).resolve().relative_to(root.resolve())
    except ValueError:  # a target outside the repository that is checked out
        return "", 0
    if not (root / path).is_file():
        return "", 0
    return path.as_posix(), item.line or _line_of_class(root / path, run)


def _line_of_class(path: Path, run: Run | None) -> int:
    """Where the model's class begins in its file; 1 where that is not to be seen."""
    name = str(run.environment.get("model_class", "")).rpartition(":")[2] if run else ""
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.search(rf"^class {re.escape(name)}\b", text, re.MULTILINE) if name else None
    return text.count("\n", 0, match.start()) + 1 if match else 1
