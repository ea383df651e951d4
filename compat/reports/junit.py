"""JUnit XML: a suite a check and combo, a case a test, and a suite for what a gate found besides.

Unusual: characters that XML 1.0 cannot hold, not even as a reference, are dropped from what a target said.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as xml

from compat.reports.machine import INCOMPLETE, Item
from compat.reports.text import visible
from compat.result import ERROR, FAILED, SKIPPED, Run

ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
ELEMENT = {FAILED: "failure", ERROR: "error", SKIPPED: "skipped"}


def clean(text: str) -> str:
    """Without what XML 1.0 cannot hold, terminal sequences and marks that reorder text."""
    return ILLEGAL.sub("", visible(str(text)))


def dumps(run: Run | None, items: list[Item], accepted: dict[tuple[str, str, str], str] | None = None) -> bytes:
    """The document. items: of the gate, or of the run; tests among them are told by the run alone.

    accepted: {(combo, check, test): why} of failures that do not count, which are skipped cases.
    """
    accepted = accepted or {}
    top = xml.Element("testsuites", name="compat")
    for check in run.checks() if run else []:
        name = f"{check.title} [{check.combo}]" if check.combo else check.title
        suite = _suite(top, name, run.started if run else "")
        for result in check.results:
            case = _case(suite, f"compat.{check.combo}.{check.title}", result.test, result.elapsed_s)
            why = accepted.get((result.combo, result.check, result.test)) if result.status == FAILED else None
            if why:
                _outcome(case, "skipped", f"{why}: {result.message}", result.detail)
            elif result.status in ELEMENT:
                _outcome(case, ELEMENT[result.status], result.message, result.detail)
    others = [item for item in items if run is None or not (item.rule.startswith("SUITE.") or item.check)]
    if others or not len(top):
        suite = _suite(top, "Gate" if any(item.rule != INCOMPLETE for item in others) else "Run", "")
        for item in others:
            case = _case(suite, f"compat.{item.rule}", item.path or item.file or item.text[:80], 0.0)
            combos = f" [{', '.join(item.combos)}]" if item.combos else ""
            kind = "skipped" if item.waived else "error" if item.rule == INCOMPLETE else "failure"
            text = f"waived: {item.waived}" if item.waived else f"{item.text}{combos}"
            _outcome(case, kind, text, item.fix)
    for element in [*top, top]:
        cases = list(element.iter("testcase"))
        element.set("tests", str(len(cases)))
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            element.set(name, str(sum(case.find(tag) is not None for case in cases)))
        element.set("time", f"{sum(float(case.get('time', 0)) for case in cases):.3f}")
    return xml.tostring(top, encoding="utf-8", xml_declaration=True) + b"\n"


def _suite(top: xml.Element, name: str, started: str) -> xml.Element:
    suite = xml.SubElement(top, "testsuite", name=clean(name))
    if started:
        suite.set("timestamp", clean(started[:19]))
    return suite


def _case(suite: xml.Element, where: str, name: str, elapsed_s: float) -> xml.Element:
    return xml.SubElement(suite, "testcase", classname=clean(where), name=clean(name), time=f"{elapsed_s:.3f}")


def _outcome(case: xml.Element, tag: str, message: str, detail: str) -> None:
    element = xml.SubElement(case, tag, message=clean(message))
    if detail.strip():
        element.text = clean(detail)
