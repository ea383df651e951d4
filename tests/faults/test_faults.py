"""Every single fault is told by the rule meant for it, and a refactor after which nothing differs is not told at all.

Unusual: the cases of one run are asked all at once, as many at a time as there are processors; each test then only
waits for its own answer. `make faults` runs them all, `make test` a sample.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from compat.rules import VERDICTS, catalogue
from tests.faults.cases import BENIGN, FAULTS, GROUPS
from tests.faults.judged import Judge
from tests.house.tree import ROOT

CASES = FAULTS | BENIGN
SAMPLE = {"language: rotary missing on keys", "data: labels not shifted", "checkpoint: buffer not saved",
          "attention written out", "projector moved, its import kept"}  # fmt: skip


def named(cases):
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in cases]


@pytest.fixture(scope="session")
def judged(request):
    """{name: Future of a Comparison} of the cases that were selected."""
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    items = [item for item in mine if "judged" in item.fixturenames]
    with Judge() as judge:
        yield {name: judge.ask(CASES[name]) for name in dict.fromkeys(item.callspec.params["name"] for item in items)}


@pytest.mark.parametrize("name", named(FAULTS))
def test_a_fault_is_told_by_the_rule_meant_for_it(judged, name):
    fault, found = FAULTS[name], judged[name].result()
    told = "\n".join(f"{finding} ({finding.where})" for finding in found.findings) or "nothing"
    for rule in fault.caught:
        findings = [finding for finding in found.findings if finding.rule == rule]
        assert findings, f"{rule} does not fire; told was:\n{told}"
        if rule == fault.caught[0]:
            inside = rule == "NUMERIC.logits"
            places = [p for one in findings for p in ([one.where] if inside else [one.path, *one.members])]
            assert any(place.startswith(fault.where) for place in places), f"not at {fault.where}:\n{told}"


@pytest.mark.parametrize("name", named(BENIGN))
def test_a_refactor_is_nothing_above_additive(judged, name):
    found = judged[name].result()
    assert VERDICTS.index(found.verdict) <= VERDICTS.index("additive"), "\n".join(map(str, found.findings))


def test_there_are_faults_of_every_group_and_refactors_enough():
    assert len(FAULTS) >= 80 and len(BENIGN) >= 40
    assert {name.partition(":")[0] for name in FAULTS} == set(GROUPS)
    assert {rule for fault in FAULTS.values() for rule in fault.caught} <= set(catalogue())
    assert all(fault.caught for fault in FAULTS.values()) and SAMPLE <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_change_is_a_change_of_python_that_can_be_read(name):
    for file, text in CASES[name].files().items():
        path = ROOT / file
        assert not path.exists() or text != path.read_text(encoding="utf-8")
        compile(text, file, "exec")
