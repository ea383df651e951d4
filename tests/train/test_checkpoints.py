"""Checkpoints: whole or not at all, gone on with to the bit, and never lost to a full disk."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanovlm import VisionLanguageModel
from nanovlm.errors import CheckpointError, SourceNotFound
from nanovlm.train import checkpoints, train
from nanovlm.train.metrics import read
from tests.house.tree import ROOT
from tests.train.rows import CPU, Held, Rows, config, make_model, run

try:
    import resource
except ImportError:  # not on Windows
    resource = None

DROPOUT = {"lm_dropout": 0.1, "vit_dropout": 0.1}


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """Everything a loss curve is drawn from."""
    kinds = ("loss", "val_loss", "grad_norm")
    return [(record["step"], kind, record[kind]) for record in read(folder) for kind in kinds if kind in record]


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints.checkpoints(folder)]


def go_on(folder: Path, cfg, steps: int | None = None):
    """As a process of its own would: a model from the newest checkpoint, fresh loaders."""
    newest = checkpoints.checkpoints(folder)[-1]
    torch.manual_seed(12345)
    random.seed(12345)
    return run(folder, cfg, VisionLanguageModel.from_pretrained(newest), resume=newest)


class Interrupting(Rows):
    """Sends a signal to this process while it hands out batch number ``at_batch``."""

    at_batch, signal = 5, signal.SIGINT

    def __next__(self):
        if self.at == self.at_batch:
            os.kill(os.getpid(), self.signal)
        return super().__next__()


def test_a_resumed_run_has_the_loss_curve_of_an_uninterrupted_one_to_the_bit(tmp_path):
    cfg = config(max_training_steps=8, save_checkpoint_steps=3, validation_steps=2, eval_interval=4)
    torch.manual_seed(0)
    run(tmp_path / "whole", cfg, make_model(**DROPOUT))
    torch.manual_seed(0)
    model = make_model(**DROPOUT)
    rows = Interrupting(model.cfg)
    rows.at_batch = 9  # in step 5: two batches a step
    result = train(model, cfg, CPU, tmp_path / "cut", (rows, Held(model.cfg)))
    assert result.signal == signal.SIGINT and names(tmp_path / "cut")[-1] == "step-00000005"
    go_on(tmp_path / "cut", cfg)
    assert len(losses(tmp_path / "whole")) == 8 * 2 + 4
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (VisionLanguageModel.from_pretrained(tmp_path / name / "last") for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_steps_after_the_checkpoint_are_told_once(tmp_path):
    cfg = config(max_training_steps=4, save_checkpoint_steps=2)
    run(tmp_path, cfg)
    shutil.rmtree(tmp_path / "step-00000004")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # the process was ended in the middle of a line
    before = losses(tmp_path)
    go_on(tmp_path, cfg)
    assert losses(tmp_path) == before and [step for step, kind, _ in before if kind == "loss"] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_after_the_step_with_a_checkpoint(tmp_path, number, capsys):
    model = make_model()
    rows = Interrupting(model.cfg)
    rows.at_batch, rows.signal = 2, number
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    result = train(model, config(), CPU, tmp_path / "mine", (rows, Held(model.cfg)))
    assert result.signal == number and result.counts.step == 2
    assert names(tmp_path / "mine") == ["step-00000002"]
    assert "--resume --run_name mine" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_ctrl_c_twice_ends_at_once(tmp_path):
    model = make_model()

    class Impatient(Interrupting):
        def __next__(self):
            batch = super().__next__()
            if self.at > 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return batch

    with pytest.raises(KeyboardInterrupt):
        train(model, config(), CPU, tmp_path, (Impatient(model.cfg), Held(model.cfg)))
    assert names(tmp_path) == []


def test_the_last_ones_stay_and_the_best(tmp_path):
    rising = {"lr_backbones": 0.1, "lr_mp": 0.1, "warmup_ratio": 1.0}
    cfg = config(max_training_steps=7, save_checkpoint_steps=1, keep_checkpoints=2, eval_interval=2, **rising)
    run(tmp_path, cfg, VisionLanguageModel(make_model().cfg, load_backbone=False))  # it has nowhere to go but up
    validated = {record["step"]: record["val_loss"] for record in read(tmp_path) if "val_loss" in record}
    best = min((2, 4, 6, 7), key=validated.__getitem__)
    assert os.readlink(tmp_path / "best") == f"step-{best:08d}" and best < 6, "the test is of an early best"
    assert names(tmp_path) == [f"step-{step:08d}" for step in (best, 6, 7)]
    assert os.readlink(tmp_path / "last") == "step-00000007"
    assert not list(tmp_path.glob(".step-*"))


def test_run_and_checkpoint_are_folders_that_from_pretrained_loads(tmp_path):
    model = make_model()
    run(tmp_path, config(save_checkpoint_steps=2), model)
    for folder in (tmp_path, tmp_path / "last", tmp_path / "step-00000004"):
        loaded = VisionLanguageModel.from_pretrained(folder)
        assert loaded.cfg == model.cfg
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert checkpoints.resolve(tmp_path).is_dir() and checkpoints.resolve(tmp_path / "step-00000002").is_dir()


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(SourceNotFound, match="neither a config.json nor a checkpoint"):
        checkpoints.resolve(tmp_path)
    with pytest.raises(SourceNotFound, match="no such folder"):
        checkpoints.resolve(tmp_path / "missing")


def test_a_checkpoint_of_another_shape_is_refused_with_both_values(tmp_path):
    run(tmp_path, config(max_training_steps=1))
    stored = VisionLanguageModel.from_pretrained(tmp_path).cfg
    checkpoints.check_shape(tmp_path, stored, dataclasses.replace(stored, hf_repo_name="another"))
    wider = stored.replace(lm_inter_dim=256)
    with pytest.raises(CheckpointError, match="of another model: lm_inter_dim=128 there, 256 asked for; leave out"):
        checkpoints.check_shape(tmp_path, stored, wider)


def test_state_of_a_part_that_is_frozen_now_is_refused(tmp_path):
    run(tmp_path, config(max_training_steps=1))
    with pytest.raises(CheckpointError, match="state of vision_encoder.*, which is frozen"):
        go_on(tmp_path, config(freeze_vision_encoder=True))


def test_another_number_of_processes_is_refused(tmp_path):
    run(tmp_path, config(max_training_steps=1))
    with pytest.raises(CheckpointError, match="written by 1 processes, this run has 2"):
        checkpoints.load_trainer(tmp_path / "last", dataclasses.replace(CPU, size=2))


@pytest.mark.parametrize(
    "name, says",
    [("optimizer.pt", "cannot be read"), ("rank-00000.pt", "cannot be read"), ("trainer.json", "no training")],
)
def test_a_damaged_file_is_named(tmp_path, name, says):
    run(tmp_path, config(max_training_steps=1))
    path = tmp_path / "last" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=says) as caught:
        go_on(tmp_path, config())
    assert "step-00000001" in str(caught.value)


def test_a_weights_only_folder_says_how_to_start_from_it(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="--resume_from_vlm_checkpoint --vlm_checkpoint_path"):
        checkpoints.load_trainer(tmp_path, CPU)


# -- a disk that is full, a process that is ended -----------------------------------------------------------------

class Filling(Rows):
    """From the third step on no file may grow beyond ``limit`` bytes, as on a full disk; after ``room``, again."""

    limit, room = 100_000, 10**9

    def __next__(self):
        if self.at in (4, self.room):
            free = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit if self.at == 4 else free, free))
        return super().__next__()


@pytest.fixture
def filling():
    if resource is None:
        pytest.skip("this system cannot limit the size of a file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield Filling(make_model().cfg)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [100_000, 500_000], ids=["the weights", "the optimizer's state"])
def test_a_full_disk_costs_the_new_checkpoint_and_no_old_one(tmp_path, filling, limit):
    filling.limit, model = limit, make_model()
    with pytest.raises(CheckpointError, match="step-00000004 could not be written") as caught:
        train(model, config(save_checkpoint_steps=2), CPU, tmp_path, (filling, Held(model.cfg)))
    assert "GB are free there. Earlier checkpoints are whole; make room, lower --keep_checkpoints" in str(caught.value)
    assert names(tmp_path) == ["step-00000002"] and not list(tmp_path.glob(".step-*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert go_on(tmp_path, config()).counts.step == 4, "the one before is whole"


def test_training_goes_on_when_a_checkpoint_between_steps_cannot_be_written(tmp_path, filling, caplog):
    filling.room, model = 8, make_model()
    cfg = config(max_training_steps=6, save_checkpoint_steps=2)
    assert train(model, cfg, CPU, tmp_path, (filling, Held(model.cfg))).counts.step == 6
    assert "step-00000004 could not be written" in caplog.text and "Training goes on" in caplog.text
    assert names(tmp_path) == ["step-00000002", "step-00000006"]


def script(text: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


KILLED = """
import sys
from tests.train.rows import *
model = make_model()
cfg = config(max_training_steps=100000, save_checkpoint_steps=1, keep_checkpoints=2, gradient_accumulation_steps=1)
print("ready", flush=True)
train(model, cfg, CPU, Path(sys.argv[1]), (Rows(model.cfg), Held(model.cfg)))
"""


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path):
    dice = random.Random(0)
    partial = 0
    for number in range(6):
        folder = tmp_path / str(number)
        process = script(KILLED, folder)
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while not checkpoints.checkpoints(folder) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.2)
        process.kill()
        process.communicate()
        partial += bool(list(folder.glob(".step-*.partial")))
        found = checkpoints.checkpoints(folder)
        assert found, "a checkpoint was there before the kill"
        for path in [*found, folder]:
            VisionLanguageModel.from_pretrained(path)
        cfg = config(max_training_steps=int(found[-1].name[5:]) + 1, gradient_accumulation_steps=1)
        assert go_on(folder, cfg).counts.step == cfg.max_training_steps
        assert not list(folder.glob(".step-*")), "what was half written is cleared"
    assert partial, "no kill fell into the writing: the test shows too little"


def test_what_was_half_written_is_never_taken_for_a_checkpoint(tmp_path):
    cfg = config(max_training_steps=2, save_checkpoint_steps=1)
    run(tmp_path, cfg)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000003.partial")
    (tmp_path / ".step-00000003.partial" / "trainer.json").unlink()
    assert names(tmp_path)[-1] == "step-00000002"
    go_on(tmp_path, config(max_training_steps=3))
    assert names(tmp_path)[-1] == "step-00000003"
    assert json.loads((tmp_path / "last" / "trainer.json").read_text())["step"] == 3
