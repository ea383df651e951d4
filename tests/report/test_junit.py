"""JUnit XML: counts that agree with the run, every kind of outcome, and any text without a broken document."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from dataclasses import replace

import pytest

from compat import gate as gates
from compat.reports import junit, machine
from compat.result import ERROR, FAILED, PASSED, SKIPPED, Result
from tests.report.machines import FAILING, gate
from tests.report.made import HOSTILE, made


def document(run, items=()) -> xml.Element:
    return xml.fromstring(junit.dumps(run, list(items)))


def test_a_suite_a_check_and_a_case_a_test_with_counts_that_agree():
    run = made(combos=("a", "b"), failed={"Backward Pass": "NaN in MP.proj"}, skipped={"VRAM": "no GPU"})
    run.results.append(Result("Edge Cases", "ours", ERROR, "KeyError: 'x'", "trace", combo="b"))
    top = document(run, machine.of_run(run))
    assert [suite.get("name") for suite in top][:2] == ["Config Compatibility [a]", "Forward Signature [a]"]
    assert len(top) == len(run.checks())
    for name, status in (("failures", FAILED), ("errors", ERROR), ("skipped", SKIPPED)):
        count = sum(result.status == status for result in run.results)
        assert int(top.get(name)) == count == sum(int(suite.get(name)) for suite in top) > 0
    assert int(top.get("tests")) == len(run.results)
    assert float(top.get("time")) == pytest.approx(sum(result.elapsed_s for result in run.results), abs=0.01)
    failure = top.find(".//failure")
    assert failure.get("message") == "NaN in MP.proj"
    assert top.find(".//error").text == "trace"


@pytest.mark.parametrize("text", [HOSTILE, "\x00\x0b\x1f\ud800\ufffe\uffff]]> & < \" '", "x" * 2**20])
def test_no_text_breaks_the_document(text):
    run = made(failed={"Backward Pass": text})
    run.results.append(Result(text[:500], text[:500], FAILED, text, text, combo=text[:100]))
    top = document(run, machine.of_run(run))
    assert int(top.get("failures")) == 2
    said = "".join(top.itertext()) + "".join("".join(element.attrib.values()) for element in top.iter())
    assert not junit.ILLEGAL.search(said) and "\x1b" not in said and "\u202e" not in said


def test_a_legal_character_stays():
    assert junit.clean("Grüße 🙂 日本\n\tx") == "Grüße 🙂 日本\n\tx"


def test_a_gate_adds_findings_and_waived_ones_are_skipped():
    run = made()
    top = document(run, machine.of_gate(gate()))
    cases = {case.get("classname"): case for case in top.iter("testcase")}
    assert "q_proj" in cases["compat.LOAD.key_renamed"].find("failure").get("message")
    assert cases["compat.COST.flops"].find("skipped").get("message").startswith("waived: pooling")
    assert cases["compat.GATE.waiver"].find("failure") is not None
    assert "compat.SUITE.save_load" not in cases  # the run's own case tells of it


def test_a_failure_that_does_not_fail_the_gate_is_skipped():
    test = "every key comes back"
    run = made(checks=("Save Load Methods",), failed={"Save Load Methods": "KeyError"}, combos=("a", "b", "c"))
    run.results = [replace(result, test=test) for result in run.results]
    known = gates.Judged(FAILING, "0" * 16, ["a"])
    waived = gates.Judged(FAILING, "0" * 16, ["b"], "until v3 (ada)")
    told = gate(known=[known], waived=[waived], new=[])
    top = xml.fromstring(junit.dumps(run, [], machine.accepted(told)))
    said = [case[0].tag + ": " + case[0].get("message") for case in top.iter("testcase")]
    assert said == [
        "skipped: fails on base too, so no news: KeyError",
        "skipped: waived: until v3 (ada): KeyError",
        "failure: KeyError",
    ]


def test_what_could_not_be_asked_is_an_error_and_never_an_empty_success():
    run = made(checks=())
    run.incomplete = "the target cannot be imported: SyntaxError"
    top = document(run, machine.of_run(run))
    assert (top.get("tests"), top.get("errors")) == ("1", "1")
    assert "SyntaxError" in top.find(".//error").get("message")


def test_a_passing_case_has_no_outcome():
    run = made(checks=("VRAM",))
    assert [len(case) for case in document(run).iter("testcase")] == [0] and run.results[0].status == PASSED
