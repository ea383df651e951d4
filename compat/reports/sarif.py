"""SARIF 2.1.0, for code scanning: every rule of the judge, a result a finding, the same fingerprint as a waiver.

Unusual: a result needs a file, and a change of behaviour has none; it is shown at the model's file, with the fact
itself as a logical location. A waived finding is there, suppressed with its reason.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

from compat.reports.machine import ABOUT, INCOMPLETE, LEVELS, OURS, Item, place
from compat.reports.text import one_line
from compat.result import Run
from compat.rules import catalogue
from compat.suites import catalogue as suites

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
TEXT = 2000


def dumps(items: list[Item], run: Run | None, root: Path, command: str, complete: bool) -> bytes:
    """The document. command: "run" or "gate", which keeps the two apart. complete: everything was asked."""
    rules = _rules()
    number = {rule["id"]: place for place, rule in enumerate(rules)}
    notices = [item for item in items if item.rule in (INCOMPLETE, OURS)]
    found = [_result(item, number, run, root) for item in items if item not in notices]
    invocation: dict = {"executionSuccessful": complete}
    if notices:
        told = [{"level": "error", "message": {"text": one_line(item.text, TEXT)}} for item in notices]
        invocation["toolExecutionNotifications"] = told
    combos = ", ".join(run.combos) if run else ""
    document = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "compat", "version": _version(), "rules": rules}},
                "automationDetails": {"id": f"compat-{command}/{combos}/"},
                "invocations": [invocation],
                "columnKind": "unicodeCodePoints",
                "results": found,
            }
        ],
    }
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def _version() -> str:
    try:
        return metadata.version("nanovlm")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "0"


def _rules() -> list[dict]:
    told = [(r.id, r.what, r.why, f"{r.fix}\n\nBad: {r.bad}\nGood: {r.good}", r.severity) for r in catalogue().values()]
    told += [(f"SUITE.{s.name}", s.about, f"A test of the check {s.title} fails.", "", "breaking") for s in suites()]
    told += [(id, about, about, "", "breaking") for id, about in ABOUT.items()]
    rules = []
    for id, what, why, help_, severity in told:
        rule = {
            "id": id,
            "shortDescription": {"text": what},
            "fullDescription": {"text": why},
            "defaultConfiguration": {"level": LEVELS[severity]},
            "properties": {"tags": [id.partition(".")[0]]},
        }
        rules.append(rule | ({"help": {"text": help_}} if help_ else {}))
    return rules


def _result(item: Item, number: dict[str, int], run: Run | None, root: Path) -> dict:
    file, line = place(item, run, root)
    subject = f"{item.path}: " if item.path else ""
    combos = f" [{', '.join(item.combos)}]" if item.combos else ""
    location: dict = {}
    if file:
        where = {"uri": quote(file), "uriBaseId": "%SRCROOT%"}
        location["physicalLocation"] = {"artifactLocation": where, "region": {"startLine": line}}
    if item.path:
        location["logicalLocations"] = [{"fullyQualifiedName": one_line(item.path, 400)}]
    result: dict = {
        "ruleId": item.rule,
        "level": item.level,
        "message": {"text": one_line(f"{subject}{item.text}{combos}", TEXT)},
        "locations": [location] if location else [],
    }
    if item.rule in number:
        result["ruleIndex"] = number[item.rule]
    if item.fingerprint:
        result["partialFingerprints"] = {"compatFinding/v1": item.fingerprint}
    if item.waived:
        told = {"kind": "external", "status": "accepted", "justification": one_line(item.waived, TEXT)}
        result["suppressions"] = [told]
    return result
