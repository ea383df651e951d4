"""An evaluation from end to end: the JSON's fields, going on after a kill, refusals, and the call from Python."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import pytest
import torch

from nanovlm import cli
from nanovlm.errors import ConfigError
from nanovlm.evaluate import cli_evaluate
from nanovlm.evaluate import run as run_module
from nanovlm.evaluate.run import Settings, evaluate
from nanovlm.measure import flops
from tests.house.tree import ROOT
from tests.model.helpers import tiny_model

FIELDS = {
    "mcq_accuracy", "mcq_correct", "mcq_total", "mcq_avg_latency", "oa_accuracy", "oa_correct", "oa_total",
    "oa_avg_latency", "vit_manual_tflops", "vit_counter_tflops", "pooling_config", "resolution",
}  # fmt: skip
ASKED = Settings(("synthetic",), max_samples=10, batch_size=4)


def told(words, capsys):
    assert cli.main(["evaluate", "--tasks", "synthetic", "--max-samples", "6", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_results_have_the_document_s_fields(tiny_folder, tmp_path, capsys):
    output = tmp_path / "deep" / "results.json"
    slimmer = ["--resolution", "64", "--pool", "pool_avg"]
    found = told(["--model", str(tiny_folder), "--output", str(output), *slimmer], capsys)
    assert FIELDS <= set(found)
    assert found == json.loads(output.read_text()) and not list(output.parent.glob("*.partial"))
    assert found["pooling_config"] == {"pool_method": "pool_avg", "pool_factor": 2, "pool_at": "vision"}
    assert found["mcq_total"] == found["mcq_letter_total"] == found["oa_total"] == found["samples"] == 6
    assert found["mcq_accuracy"] == found["mcq_correct"] / 6 == found["tasks"]["synthetic"]["mcq_accuracy"]
    assert found["vit_manual_tflops"] == pytest.approx(found["vit_counter_tflops"], rel=1e-12)


def test_modes_ask_only_what_they_say(tiny_folder, capsys):
    mcq = told(["--model", str(tiny_folder), "--mode", "mcq", "--no-letters", "--output", ""], capsys)
    assert "mcq_total" in mcq and "oa_total" not in mcq and "mcq_letter_total" not in mcq
    oa = told(["--model", str(tiny_folder), "--mode", "oa", "--output", ""], capsys)
    assert "oa_total" in oa and "mcq_total" not in oa


def test_flops_are_those_of_the_prompts_that_were_asked(picture):
    model = tiny_model(vit_img_size=128)
    found = evaluate(model, Settings(("synthetic",), max_samples=1, mode="mcq", letters=False))
    ids, images = model.prepare(picture(128, 128), "What colour?")
    rows = flops.analytic(model.cfg, flops.Prompt(((128, 128),) * len(images[0]), ids.shape[1], 1))
    assert found["total_tflops"] == pytest.approx(sum(row.flops for row in rows) / 1e12, rel=1e-12)


def test_what_was_answered_before_a_kill_is_not_asked_again(tmp_path, monkeypatch):
    model, journal = tiny_model(), tmp_path / "answers.partial"
    whole = evaluate(model, ASKED)
    asked: list[str] = []
    real = run_module._ask

    def killed_after_two(model, batch, settings):
        if len(asked) >= 8:
            raise KeyboardInterrupt
        asked.extend(each.id for each in batch)
        return real(model, batch, settings)

    monkeypatch.setattr(run_module, "_ask", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, ASKED, journal=journal)
    assert len(asked) == 8 and len(journal.read_text().splitlines()) == 1 + 8
    with open(journal, "a") as file:
        file.write('{"task": "synthetic", "id": "cut o')  # the kill came in the middle of a line
    asked.clear()
    monkeypatch.setattr(run_module, "_ask", lambda *given: asked.extend(q.id for q in given[1]) or real(*given))
    again = evaluate(model, ASKED, journal=journal)
    assert len(asked) == 2
    same = ("mcq_correct", "mcq_letter_correct", "oa_correct", "samples", "total_tflops")
    assert {name: again[name] for name in same} == {name: whole[name] for name in same}


@pytest.mark.slow
def test_a_killed_command_goes_on(tiny_folder, tmp_path):
    """A real process, killed for real once it has answered something."""
    words = [
        "evaluate", "--model", str(tiny_folder), "--tasks", "synthetic", "--batch_size", "2", "--mode", "mcq",
        "--no-letters", "--output", str(tmp_path / "r.json"),
    ]  # fmt: skip
    journal = tmp_path / "r.json.partial"
    command = [sys.executable, "-m", "nanovlm", *words, "--max-samples", "400"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = journal.read_bytes()
    assert before.count(b"\n") > 4 and not (tmp_path / "r.json").exists()
    assert cli.main([*words, "--max-samples", "60"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["samples"] == 60 and not journal.exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: (model, Settings(("synthetic",), mode="oa")), "mode='both' there, 'oa' here"),
        (lambda model: (tiny_model(seed=1), ASKED), "weights='.*' there, '.*' here"),
        (lambda model: (tiny_model(vit_img_size=128), ASKED), "config.mp_image_token_length=4 there, 16 here"),
    ],
)
def test_answers_of_another_evaluation_are_not_mixed_in(tmp_path, change, told):
    model, journal = tiny_model(), tmp_path / "answers.partial"
    evaluate(model, Settings(("synthetic",), max_samples=2), journal=journal)
    before = journal.read_bytes()
    other, asked = change(model)
    with pytest.raises(ConfigError, match=told):
        evaluate(other, asked, journal=journal)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("strange", [b"\x00\xff\n", b"[1]\n", b"not json"])
def test_a_journal_of_something_else_is_begun_anew_only_where_nothing_in_it_is_whole(tmp_path, strange):
    journal = tmp_path / "answers.partial"
    journal.write_bytes(strange)
    assert evaluate(tiny_model(), Settings(("synthetic",), max_samples=2), journal=journal)["samples"] == 2
    assert json.loads(journal.read_text().splitlines()[0])["mode"] == "both"


def test_from_python_with_a_model_or_a_folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"tasks": "synthetic", "batch_size": 3, "max_samples": 3}
    by_folder = cli_evaluate(argparse.Namespace(model=str(tiny_folder), **options))
    by_model = cli_evaluate(argparse.Namespace(model=tiny_model(vit_img_size=128), **options))
    assert by_folder["mcq_correct"] == by_model["mcq_correct"] and by_model["model"] == "VisionLanguageModel"
    assert not list(tmp_path.iterdir()), "nothing is written unless output names it"
    with pytest.raises(ConfigError, match="no option 'batchsize'; there are: .*batch_size"):
        cli_evaluate(argparse.Namespace(model=str(tiny_folder), tasks="synthetic", batchsize=1))


def test_the_model_s_mode_is_as_it_was():
    model = tiny_model().train()
    evaluate(model, Settings(("synthetic",), max_samples=1))
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which model"),
        (["--use_preset", "tiny", "--tasks", "mmmu"], "no task 'mmmu'; there are: mmstar, aokvqa, synthetic"),
        (["--use_preset", "tiny", "--tasks", "mmstar", "--mode", "oa"], "mmstar has no open answers"),
        (["--use_preset", "tiny", "--tasks", "synthetic,synthetic"], "named 2 times"),
        (["--use_preset", "tiny", "--tasks", ","], "no tasks"),
        (["--use_preset", "tiny", "--tasks", "synthetic", "--max-samples", "0"], "max_samples=0"),
        (["--use_preset", "tiny", "--tasks", "synthetic", "--batch_size", "-1"], "batch_size=-1"),
        (["--use_preset", "tiny", "--tasks", "synthetic", "--data", "mmstar=x"], "names task 'mmstar', asked are"),
        (["--use_preset", "tiny", "--tasks", "synthetic", "--data", "x"], "expected TASK=FOLDER"),
        (["--model", "no/such/folder/here", "--tasks", "synthetic"], "no/such/folder/here"),
        (["--use_preset", "tiny", "--tasks", "mmstar", "--data", "mmstar=.", "--split", "val"], "cannot be read"),
    ],
)
def test_a_mistake_ends_with_a_sentence(words, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *words]) == 2
    assert told in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path, tiny_folder, capsys):
    (tmp_path / "file").write_text("")
    words = ["--model", str(tiny_folder), "--tasks", "synthetic", "--max-samples", "1"]
    assert cli.main(["evaluate", *words, "--output", str(tmp_path / "file" / "r.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
