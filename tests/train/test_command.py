"""``python -m nanovlm train`` and ``validate``: every choice has its flag, and a run goes from flags to answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from nanovlm import TrainConfig, VisionLanguageModel, cli
from nanovlm.commands import train as command
from nanovlm.data.synthetic import APART, FAMILIES
from nanovlm.errors import ConfigError
from nanovlm.presets import RECIPES
from nanovlm.recompute import MODES
from nanovlm.train.metrics import read
from nanovlm.train_config import CHOICES
from tests.house.tree import ROOT

# of the documents, each with a value it takes
DOCUMENTED = {
    "use_preset": "tiny", "vision_encoder": "siglip", "dinov3_model": "vitb16", "language_model": "smollm",
    "freeze_vision_encoder": None, "lr_mp": "0.00512", "lr_backbones": "5e-05", "lr_vision_backbone": "0",
    "lr_language_backbone": "0", "batch_size": "2", "gradient_accumulation_steps": "32", "max_grad_norm": "1",
    "max_training_steps": "10", "compile": None, "no-compile": None, "num_workers": "4", "max_threads": "8",
    "console_log_interval": "10", "validation_steps": "100", "eval_interval": "500", "save_checkpoint_steps": "500",
    "resume_from_vlm_checkpoint": None, "vlm_checkpoint_path": "checkpoints/a", "run_name": "a",
    "hf_repo_name": "None", "log_wandb": None, "no_log_wandb": None, "wandb_entity": "us", "max_img_size": "1024",
    "val_ratio": "0.1", "use_lmms_eval": None, "lmms_eval_tasks": "mmstar,mme", "lmms_eval_limit": "1000",
}  # fmt: skip


def parsed(*words: str) -> argparse.Namespace:
    return cli.parser().parse_args(["train", *words])


def nanovlm(*words, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) in this process."""
    code = cli.main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_flag_is_understood(name):
    value = DOCUMENTED[name]
    options = parsed(f"--{name}", *([] if value is None else [value]))
    field = name.removeprefix("no-").removeprefix("no_")
    got = getattr(options, field)
    assert got is (not name.startswith("no")) if value is None else str(got) in (value, str(float_or(value)))


def float_or(text: str):
    try:
        return float(text)
    except ValueError:
        return text


SAMPLES = {"int": 7, "float": 0.25, "bool": None, "str": "some", "tuple[str, ...]": ("a", "b")}


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_field_is_a_flag_and_a_line_of_toml(tmp_path, field):
    kind = field.type.partition(" | ")[0]
    value = (not field.default) if kind == "bool" else CHOICES.get(field.name, (SAMPLES[kind],))[-1]
    if kind == "bool":
        words = [f"--{field.name}" if value else f"--no-{field.name}"]
    else:
        words = [f"--{field.name}", ",".join(value) if kind.startswith("tuple") else str(value)]
    assert getattr(command.train_config(parsed(*words)), field.name) == value
    file = tmp_path / "run.toml"
    file.write_text(f"{field.name} = {json.dumps(value)}\n")
    assert getattr(command.train_config(parsed("--config", str(file))), field.name) == value


def test_help_has_every_field_once_in_a_named_group(capsys):
    grouped = [name for group in command.GROUPS.values() for name in group]
    assert sorted(grouped) == sorted(f.name for f in dataclasses.fields(TrainConfig))
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    shown = capsys.readouterr().out
    for heading in command.GROUPS:
        assert f"\n{heading}:\n" in shown
    assert "(default: 0.00512)" in shown and "example: python -m nanovlm train" in shown


def test_defaults_are_those_of_the_documents_with_upload_and_wandb_off():
    cfg = command.train_config(parsed())
    assert cfg == TrainConfig()
    assert (cfg.lr_mp, cfg.lr_backbones, cfg.batch_size, cfg.gradient_accumulation_steps) == (0.00512, 5e-5, 2, 32)
    assert (cfg.num_workers, cfg.max_threads, cfg.eval_interval) == (2, 4, 500)
    assert not cfg.log_wandb and cfg.hf_repo_name is None and not cfg.use_lmms_eval


def test_what_can_be_recomputed_is_what_the_model_can():
    assert CHOICES["activation_checkpointing"] == MODES


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}='half': expected {CHOICES[name][0]}, "):
        TrainConfig(**{name: "half"})


def test_help_needs_no_torch():
    ask = "import sys, nanovlm.cli; nanovlm.cli.parser(); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "False", shown.stderr


def test_the_command_line_wins_over_the_file_and_the_file_names_the_model(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('use_preset = "tiny"\nbatch_size = 8\nlr_mp = 0.1\ntrain_dataset_name = ["a", "b"]\n')
    options = parsed("--config", str(file), "--batch_size", "3")
    cfg = command.train_config(options)
    assert (cfg.batch_size, cfg.lr_mp, cfg.train_dataset_name) == (3, 0.1, ("a", "b"))
    assert options.use_preset == "tiny"


@pytest.mark.parametrize(
    "text, says",
    [
        ("batch_sise = 8", "no field 'batch_sise'; did you mean 'batch_size'"),
        ('batch_size = "8"', "batch_size='8': expected int"),
        ("[train]\nbatch_size = 8", r"has a table \[train\]"),
        ("batch_size = ", "is no TOML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_file_is_told_by_name(tmp_path, text, says):
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        command.train_config(parsed("--config", str(file)))


@pytest.mark.parametrize(
    "words, says",
    [
        (["--resume"], "--resume: which run?"),
        (["--resume", "--run_name", "a", "--resume_from_vlm_checkpoint"], "give one of both"),
        (["--resume_from_vlm_checkpoint"], "Give --vlm_checkpoint_path DIR"),
        (["--shard", "--use_preset", "tiny"], "start it with torchrun"),
        (["--run_name", "a/b", "--use_preset", "tiny"], "not a path"),
        (["--use_preset", "tiny", "--vision_encoder", "dinov3"], "give one of both"),
        (["--lr_mp", "0", "--lr_backbones", "0"], "nothing would be trained"),
        (["--use_preset", "tiny", "--use_lmms_eval"], "lmms-eval"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, says, capsys):
    code, out, err = nanovlm("train", *words, capsys=capsys)
    assert code == 2 and says in err and not out
    assert len(err.strip().splitlines()) == 1, err


QUICK = {
    "max_training_steps": 4, "gradient_accumulation_steps": 1, "batch_size": 2, "num_workers": 0,
    "validation_batches": 2, "train_dataset_path": "synthetic", "max_sample_length": 256, "scored_scenes": 6,
    "use_preset": "tiny",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of runs, what a run of a few steps printed)."""
    import contextlib
    import io

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    (folder / "run.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in QUICK.items()))
    words = ["--config", folder / "run.toml", "--output_dir", folder, "--run_name", "first"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["train", *map(str, words)])
    return folder, code, out.getvalue(), err.getvalue()


def test_a_run_ends_with_its_folder_on_stdout_and_a_model_in_it(trained):
    folder, code, out, err = trained
    assert code == 0 and out.splitlines()[0] == str(folder / "first")
    assert "step 4: validation loss" in err
    assert VisionLanguageModel.from_pretrained(folder / "first").cfg.lm_tokenizer == "byte"
    assert {"loss.png", "loss.svg", "metrics.jsonl"} <= {path.name for path in (folder / "first").iterdir()}


def test_a_run_on_drawings_ends_with_a_table_of_exact_answers_beside_controls(trained):
    folder, _, out, _ = trained
    head, *rows = out.splitlines()[1:]
    assert head.split() == ["family", "rows", "exact", "chance", "blank", "shuffled"]
    assert [row.split()[0] for row in rows] == [*FAMILIES, "mean", *APART]
    assert all(row.endswith("(apart)") == (row.split()[0] in APART) for row in rows)
    scores = json.loads((folder / "first" / "scores.json").read_text())
    assert set(scores) == {*FAMILIES, *APART}
    assert all(each["rows"] == 1 and each["chance"] == 1 for each in scores.values()), "one row a family here"


def test_a_preset_brings_its_recipe_and_flags_win_over_it():
    cfg = command.train_config(parsed("--use_preset", "tiny", "--batch_size", "3"))
    assert cfg == TrainConfig.from_values({**RECIPES["tiny"], "batch_size": 3})
    assert command.train_config(parsed("--use_preset", "default")) == TrainConfig()


def test_a_run_is_not_overwritten(trained, capsys):
    folder = trained[0]
    before = (folder / "first" / "metrics.jsonl").read_bytes()
    words = ["train", "--config", folder / "run.toml", "--output_dir", folder, "--run_name", "first"]
    code, out, err = nanovlm(*words, capsys=capsys)
    assert code == 2 and "holds checkpoints up to step-00000004: --resume goes on with it" in err
    assert (folder / "first" / "metrics.jsonl").read_bytes() == before


def test_resume_goes_on_with_a_run_and_starts_one_that_is_not_there(trained, capsys):
    folder = trained[0]
    common = ["train", "--output_dir", folder, "--resume", "--run_name", "again"]
    first = ["--config", folder / "run.toml", "--max_training_steps", 2, "--lr_mp", 0.001]
    assert nanovlm(*common, *first, capsys=capsys)[0] == 0
    # the preset, the data and the rates come from the checkpoint
    code, _, err = nanovlm(*common, "--max_training_steps", 3, "--scored_scenes", 0, capsys=capsys)
    assert code == 0 and "step 3/3" in err and "step 2/3" not in err
    records = [record for record in read(folder / "again") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    stored = json.loads((folder / "again" / "last" / "train_config.json").read_text())
    assert (stored["lr_mp"], stored["batch_size"], stored["train_dataset_path"]) == (0.001, 2, "synthetic")
    code, _, err = nanovlm(*common, "--use_preset", "tiny_dinov3_smollm", capsys=capsys)
    assert code == 2 and re.search(r"is of another model: \w+=.* there, .* asked for", err)


def test_weights_of_a_run_start_another(trained, capsys):
    folder = trained[0]
    code, _, err = nanovlm(
        "train", "--config", folder / "run.toml", "--output_dir", folder, "--run_name", "second", "--lr_mp", 0,
        "--lr_vision_backbone", 0, "--resume_from_vlm_checkpoint", "--vlm_checkpoint_path", folder / "first",
        "--max_training_steps", 1, "--scored_scenes", 0, capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    first, second = (VisionLanguageModel.from_pretrained(folder / name) for name in ("first", "second"))
    assert torch.equal(first.MP.proj.weight, second.MP.proj.weight)
    assert not torch.equal(first.decoder.norm.weight, second.decoder.norm.weight)
    assert [record["step"] for record in read(folder / "second") if "loss" in record] == [1]


def test_the_best_model_is_uploaded_where_a_repository_is_named(trained, monkeypatch, capsys):
    folder, pushed = trained[0], []
    monkeypatch.setattr(
        VisionLanguageModel, "push_to_hub", lambda model, repo: pushed.append((repo, model)) or f"hub/{repo}"
    )
    words = ["--output_dir", folder, "--run_name", "first", "--resume", "--scored_scenes", 0]
    code, out, _ = nanovlm("train", *words, "--hf_repo_name", "me/mine", capsys=capsys)
    assert code == 0 and out.splitlines()[-1] == "hub/me/mine"
    ((repo, model),) = pushed
    best = VisionLanguageModel.from_pretrained(folder / "first" / "best")
    assert repo == "me/mine" and torch.equal(model.MP.proj.weight, best.MP.proj.weight)
    assert nanovlm("train", *words, "--hf_repo_name", "None", capsys=capsys)[0] == 0 and len(pushed) == 1


def test_a_place_that_cannot_be_written_is_told_before_the_first_step(trained, tmp_path, monkeypatch, capsys):
    common = ["train", "--config", trained[0] / "run.toml", "--run_name", "a"]
    (tmp_path / "file").touch()
    code, _, err = nanovlm(*common, "--output_dir", tmp_path / "file", capsys=capsys)
    assert code == 2 and "cannot be read: Not a directory; name another --output_dir" in err and "step 1" not in err
    made = type(tmp_path).mkdir

    def refused(path, *arguments, **options):
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path))  # chmod stops no test that runs as root
        return made(path, *arguments, **options)

    monkeypatch.setattr(type(tmp_path), "mkdir", refused)
    code, _, err = nanovlm(*common, "--output_dir", tmp_path, capsys=capsys)
    assert code == 2 and "cannot be written: Permission denied; name another --output_dir" in err


def test_vlm_checkpoint_path_alone_is_where_runs_go(trained, tmp_path, capsys):
    code, out, _ = nanovlm(
        "train", "--config", trained[0] / "run.toml", "--vlm_checkpoint_path", tmp_path / "mine",
        "--max_training_steps", 1, capsys=capsys,
    )  # fmt: skip
    assert code == 0 and out.startswith(f"{tmp_path / 'mine' / 'tiny-synthetic-'}")


def test_validate_tells_the_loss_of_the_run_and_answers(trained, capsys):
    folder = trained[0]
    last = [record["val_loss"] for record in read(folder / "first") if "val_loss" in record][-1]
    code, out, _ = nanovlm("validate", "--checkpoint_dir", folder / "first", "--json", capsys=capsys)
    said = json.loads(out)
    assert code == 0 and said["val_loss"] == pytest.approx(last, abs=1e-5) and said["dataset"] == "synthetic"
    assert len(said["samples"]) == 3
    assert all(sample["question"] and sample["expected"] for sample in said["samples"])
    code, out, _ = nanovlm("validate", "--checkpoint_dir", folder / "first", "--samples", 1, capsys=capsys)
    assert code == 0 and f"validation loss {last:.4f}" in out and out.count("expected:") == out.count("answered:") == 1


def test_validate_asks_a_model_that_was_trained_elsewhere_about_synthetic_rows(tmp_path, capsys):
    from tests.model.helpers import tiny_model

    tiny_model().save_pretrained(tmp_path)
    code, out, err = nanovlm(
        "validate", "--checkpoint_dir", tmp_path, "--validation_batches", 1, "--samples", 1, "--num_workers", 0,
        capsys=capsys,
    )  # fmt: skip
    assert code == 0 and "validation loss" in out and "does not say what it was trained on" in err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--checkpoint_dir", "missing"], "missing: no such folder"),
        (["--checkpoint_dir", "first", "--vision_encoder", "dinov3"], "of another model"),
    ],
)
def test_validate_refuses_what_is_not_there_or_not_that_model(trained, words, says, capsys, monkeypatch):
    monkeypatch.chdir(trained[0])
    code, out, err = nanovlm("validate", *words, capsys=capsys)
    assert code == 2 and says in err and not out


def test_the_documented_lines_of_python_train(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    small = "max_training_steps=1, gradient_accumulation_steps=1, num_workers=0, validation_batches=1"
    monkeypatch.chdir(tmp_path)
    exec(block.replace("max_training_steps=100", small), {})
    assert re.fullmatch(r"[\d.]+ 1", capsys.readouterr().out.strip())
    assert (tmp_path / "checkpoints" / "mine" / "model.safetensors").is_file()


def test_every_documented_command_line_of_training_is_understood():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"-m nanovlm ((?:train|validate)[^#&\n]*)", page)
    assert len(lines) > 8
    for line in lines:
        if "--help" not in line and "..." not in line:
            assert cli.parser().parse_args(line.split()).run


@pytest.mark.slow
def test_ctrl_c_in_a_shell_saves_and_resume_finishes(tmp_path):
    """With workers, which get the terminal's signal too."""
    import signal

    words = [sys.executable, "-m", "nanovlm", "train", "--use_preset", "tiny", "--train_dataset_path", "synthetic"]
    words += ["--output_dir", str(tmp_path), "--run_name", "a", "--gradient_accumulation_steps", "1", "--resume"]
    words += ["--scored_scenes", "0", "--console_log_interval", "1", "--max_sample_length", "256"]
    words += ["--validation_batches", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "text": True, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([*words, "--num_workers", "2"], start_new_session=True, **options)
    deadline = time.monotonic() + 60
    while len(read(tmp_path / "a")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.count("stopping after this step") == 1 and "--resume --run_name a goes on from there" in err
    assert "Traceback" not in err
    steps = len(read(tmp_path / "a"))
    done = subprocess.run([*words, "--max_training_steps", str(steps + 1)], timeout=90, **options)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in read(tmp_path / "a") if "loss" in r] == list(range(1, steps + 2))


@pytest.mark.slow
def test_torchrun_starts_the_same_command(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "nanovlm"]
    words += ["train", "--use_preset", "tiny", "--train_dataset_path", "synthetic", "--output_dir", str(tmp_path)]
    words += ["--max_training_steps", "2", "--gradient_accumulation_steps", "1", "--validation_batches", "1"]
    words += ["--num_workers", "0", "--max_sample_length", "256", "--run_name", "a", "--shard", "--scored_scenes", "6"]
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True, "capture_output": True}
    done = subprocess.run(words, timeout=150, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "a") and "step 2: validation loss" in done.stderr
    assert VisionLanguageModel.from_pretrained(tmp_path / "a").cfg.lm_tokenizer == "byte"
