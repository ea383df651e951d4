"""--json: every document is what docs/schema says, whatever the run or the comparison holds."""

from __future__ import annotations

import json
import math

import jsonschema
import pytest

from compat import cli, process, store
from compat import gate as gates
from compat.result import FAILED, Result
from compat.rules import compare
from tests.house.tree import ROOT
from tests.judge.fake_child import FakeChild
from tests.judge.repos import FACTS, Asker, commit, git, lock_of, repository, write
from tests.report.machines import DEARER, gate
from tests.report.made import HOSTILE, finding, made

KEPT = {path: value for path, value in FACTS.items() if not path.startswith("state.")}
NAMES = ("run", "gate", "comparison", "doctor")


def schema(name: str) -> dict:
    return json.loads((ROOT / f"docs/schema/{name}.json").read_text(encoding="utf-8"))


def refused(constant: str):
    raise ValueError(f"{constant} is no JSON")


def hold(name: str, text: str | bytes) -> dict:
    """The document, which the schema must accept; NaN and infinities are refused by the reader."""
    document = json.loads(text, parse_constant=refused)
    jsonschema.Draft202012Validator(schema(name)).validate(document)
    return document


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one_and_lets_no_field_pass_unnamed(name):
    jsonschema.Draft202012Validator.check_schema(schema(name))
    good = {"run": json.loads(store.dumps(made())), "gate": gate()}.get(name)
    if good:
        for wrong in (good | {"more": 1}, {k: v for k, v in good.items() if k != "schema"}, good | {"schema": 2}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.Draft202012Validator(schema(name)).validate(wrong)


def test_a_run_of_the_command_line_is_what_the_schema_says(tmp_path, monkeypatch, capsys):
    (tmp_path / "fork").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "Child", lambda target, **options: FakeChild())
    assert cli.main(["run", "fork", "--no-log", "--json", "run.json", "--junit", "j.xml", "--sarif", "s.json"]) == 0
    document = hold("run", (tmp_path / "run.json").read_bytes())
    assert len(document["results"]) > 50 and (tmp_path / "j.xml").stat().st_size > 1000
    assert json.loads((tmp_path / "s.json").read_bytes())["runs"][0]["results"] == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_with_numbers_that_json_lacks(value):
    run = made(failed={"VRAM": HOSTILE}, findings=[finding(old=HOSTILE)], output=HOSTILE, notes=[HOSTILE])
    run.cost["siglip2-smollm2"]["tokens_per_s"] = value
    run.facts["siglip2-smollm2"] = {"special_tokens": {"<pad>": value}}
    run.results.append(Result("VRAM", HOSTILE, FAILED, HOSTILE, HOSTILE, combo="x"))
    assert hold("run", store.dumps(run))["cost"]["siglip2-smollm2"]["tokens_per_s"] == str(value)


def test_a_gate_with_numbers_that_json_lacks():
    from dataclasses import replace

    found = gates.Gate("../fork", "main", ["siglip2-smollm2"], "tiny")
    members = {"numbers.loss": [1.5, math.nan]}
    found.new = [gates.Judged(replace(DEARER, members=members), "0" * 16, ["siglip2-smollm2"])]
    assert hold("gate", gates.dumps(found))["new"][0]["members"] == {"numbers.loss": [1.5, "nan"]}


def test_a_gate_with_one_of_everything():
    assert hold("gate", json.dumps(gate()))["verdict"] == "failed"


def test_a_gate_of_the_command_line_leaves_every_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gates, "answer", Asker())
    monkeypatch.setattr(gates, "cross", lambda pairs, how: ([None] * len(pairs), 0))
    folder = repository(tmp_path / "repo")
    write(folder)
    commit(folder, "one")
    git(folder, "checkout", "-q", "-b", "work")
    write(folder, KEPT)
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    out.mkdir()
    words = [word for name in ("json", "junit", "sarif", "comment") for word in (f"--{name}", str(out / name))]
    assert cli.main(["gate", "--no-log", *words]) == 1
    [new] = hold("gate", (out / "json").read_bytes())["new"]
    [result] = json.loads((out / "sarif").read_bytes())["runs"][0]["results"]
    assert result["ruleId"] == new["rule"] == "LOAD.key_removed"
    assert result["partialFingerprints"] == {"compatFinding/v1": new["fingerprint"]}
    assert 'classname="compat.LOAD.key_removed"' in (out / "junit").read_text()
    assert (out / "comment").read_text().startswith("<!-- compat:gate -->\n### ❌ compat gate: failed")
    assert cli.main(["gate", "--no-log", "--sarif", "no/such/x"]) == 3
    assert "--sarif no/such/x cannot be written" in capsys.readouterr().err


def test_a_comparison(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, facts in (("a", None), ("b", KEPT)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, facts)
        (tmp_path / f"{name}.json").write_text(json.dumps(lock_of(tmp_path / name)))
    found = compare(lock_of(tmp_path / "a"), lock_of(tmp_path / "b"))
    assert found.findings and hold("comparison", json.dumps(found.as_json()))["verdict"] == "breaking"
    code = cli.main(["compare", "a.json", "b.json", "--json", "-"])
    assert code == 1 and hold("comparison", capsys.readouterr().out)["findings"]


def test_the_doctor(capsys):
    code = cli.main(["doctor", "--json", "-"])
    assert hold("doctor", capsys.readouterr().out)["exit_code"] == code


@pytest.mark.parametrize("flag", ["--junit", "--sarif", "--comment"])
def test_an_output_that_cannot_be_written_is_said_before_anything_is_asked(flag, tmp_path, monkeypatch, capsys):
    (tmp_path / "fork").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "Child", lambda target, **options: pytest.fail("asked"))
    assert cli.main(["run", "fork", "--no-log", flag, "no/such/x"]) == 3
    assert f"{flag} no/such/x cannot be written: there is no folder no/such" in capsys.readouterr().err
    assert cli.main(["run", "fork", "--no-log", flag, "-"]) == 2 and "name a file" in capsys.readouterr().err
    assert cli.main(["run", "fork", "--no-log", flag, "x", "--json", "./x"]) == 2
    assert f"--json and {flag} both name" in capsys.readouterr().err


def test_a_target_that_cannot_be_asked_still_leaves_every_output(tmp_path, monkeypatch, capsys):
    class Mute(FakeChild):
        def ask(self, *words, **more):
            raise process.CouldNotAsk("the target cannot be imported: SyntaxError")

    (tmp_path / "fork").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "Child", lambda target, **options: Mute())
    words = ["--json", "r.json", "--junit", "j.xml", "--sarif", "s.json", "--comment", "c.md"]
    assert cli.main(["run", "fork", "--no-log", *words]) == 3
    hold("run", (tmp_path / "r.json").read_bytes())
    assert "SyntaxError" in (tmp_path / "j.xml").read_text() and "incomplete" in (tmp_path / "c.md").read_text()
    assert json.loads((tmp_path / "s.json").read_text())["runs"][0]["invocations"][0]["executionSuccessful"] is False
