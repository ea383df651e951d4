"""SARIF: every rule of the judge, results with places and fingerprints, waived ones suppressed."""

from __future__ import annotations

import json

import pytest

from compat.gate import _as_finding
from compat.reports import machine, sarif
from compat.result import FAILED, Result
from compat.rules import catalogue
from compat.suites import catalogue as suites
from compat.waivers import fingerprint
from tests.report.machines import gate
from tests.report.made import HOSTILE, made


@pytest.fixture
def fork(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vision_language_model.py").write_text("import torch\n\nclass VisionLanguageModel: ...\n")
    return tmp_path


def run_of(fork, **more):
    run = made(**more)
    run.target["folder"] = str(fork)
    run.environment["model_class"] = "models.vision_language_model:VisionLanguageModel"
    return run


def told(items, run, root, complete=True) -> dict:
    document = json.loads(sarif.dumps(items, run, root, "gate", complete))
    assert document["version"] == "2.1.0"
    [found] = document["runs"]
    return found


def test_the_rules_are_those_of_the_catalogue_the_checks_and_the_gate(fork):
    rules = told([], run_of(fork), fork)["tool"]["driver"]["rules"]
    ids = [rule["id"] for rule in rules]
    assert ids == [*catalogue(), *(f"SUITE.{suite.name}" for suite in suites()), *machine.ABOUT]
    first = catalogue()[ids[0]]
    assert rules[0]["shortDescription"]["text"] == first.what and first.fix in rules[0]["help"]["text"]
    assert {rule["defaultConfiguration"]["level"] for rule in rules} == {"error", "warning", "note"}


def test_a_finding_has_rule_place_fact_and_the_waiver_s_fingerprint(fork):
    found = told(machine.of_gate(gate()), run_of(fork), fork)
    rules = found["tool"]["driver"]["rules"]
    by_rule = {result["ruleId"]: result for result in found["results"]}
    renamed = by_rule["LOAD.key_renamed"]
    assert rules[renamed["ruleIndex"]]["id"] == "LOAD.key_renamed" and renamed["level"] == "error"
    place = renamed["locations"][0]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "models/vision_language_model.py"
    assert place["physicalLocation"]["region"] == {"startLine": 3}, "where the class begins"
    assert place["logicalLocations"] == [{"fullyQualifiedName": "state.blocks.0.q_proj.weight"}]
    assert renamed["partialFingerprints"] == {"compatFinding/v1": "00000000000000aa"}
    assert "q_proj.weight -> query.weight" in renamed["message"]["text"]
    assert by_rule["SUITE.save_load"]["locations"][0]["physicalLocation"]["region"] == {"startLine": 2}
    [suppression] = by_rule["COST.flops"]["suppressions"]
    assert suppression["justification"].startswith("pooling is meant") and "suppressions" not in renamed


def test_a_failing_test_has_the_fingerprint_that_the_gate_gives_it():
    result = Result("Save Load Methods", "every key comes back", FAILED, "no", combo="a")
    [item] = machine.of_run(made(checks=(), results=[result]))
    assert item.fingerprint == fingerprint(_as_finding(result, suites()), {}, {})


def test_a_failure_under_several_combos_is_one_result():
    run = made(combos=("a", "b"), failed={"Backward Pass": "NaN"})
    [item] = machine.of_run(run)
    assert item.combos == ("a", "b")


def test_what_could_not_be_asked_is_a_notification_and_no_success(fork):
    found = told(machine.of_gate(gate(incomplete=["base could not be asked"])), None, fork, complete=False)
    [invocation] = found["invocations"]
    assert invocation["executionSuccessful"] is False
    assert invocation["toolExecutionNotifications"][0]["message"]["text"] == "base could not be asked"
    assert all(result["ruleId"] != machine.INCOMPLETE for result in found["results"])


def test_a_file_that_is_not_there_or_lies_outside_is_not_named(fork, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    item = machine.Item("SUITE.config", "error", "no", file="models/gone.py", line=3)
    assert machine.place(item, run_of(fork), fork) == ("", 0)
    item = machine.Item("SUITE.config", "error", "no", file="models/vision_language_model.py", line=3)
    assert machine.place(item, run_of(fork), fork) == ("models/vision_language_model.py", 3)
    assert machine.place(item, run_of(fork), fork.parent) == (f"{fork.name}/models/vision_language_model.py", 3)
    assert machine.place(item, run_of(fork), elsewhere) == ("", 0)


def test_a_message_cannot_name_a_file_outside_the_target(fork):
    (fork.parent / "secret.py").write_text("")
    item = machine._placed(machine.Item("SUITE.config", "error", ""), "ValueError: no (../secret.py:1)")
    assert machine.place(item, run_of(fork), fork) == ("", 0)


def test_hostile_text_is_text(fork):
    run = run_of(fork, failed={"Backward Pass": HOSTILE})
    found = told(machine.of_run(run), run, fork)
    [result] = found["results"]
    text = result["message"]["text"]
    assert "<script>" in text and "\x1b" not in text and "\n" not in text and "\u202e" not in text
