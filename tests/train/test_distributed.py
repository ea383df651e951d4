"""Two processes on gloo train what one does on twice the batch; one that dies takes the other along."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from nanovlm import VisionLanguageModel
from nanovlm.errors import CheckpointError, ConfigError
from nanovlm.train.checkpoints import checkpoints, load_optimizer
from nanovlm.train.distributed import world
from nanovlm.train.loop import Trainer
from nanovlm.train.metrics import read
from tests.house.tree import ROOT
from tests.train.rows import CPU, Held, Rows, config, make_model, run
from tests.train.two_ranks import WITHOUT, gradients

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


KINDS = pytest.mark.parametrize("two", ["ddp", pytest.param("shard", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture(scope="module")
def two(request, tmp_path_factory):
    """(kind, folder, what two processes found out)."""
    folder = tmp_path_factory.mktemp(request.param)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.two_ranks", str(folder), request.param]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **shared, "RANK": str(rank)}, text=True, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return request.param, folder, torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(told, gradients, whole run's folder) of one process on batches twice as large."""
    torch.set_num_threads(1)
    cfg, folder = config(batch_size=4), tmp_path_factory.mktemp("one")
    model = make_model()
    ours = Trainer(model, cfg, CPU, folder, (Rows(model.cfg, 4, without=WITHOUT), Held(model.cfg)))
    told = ours.one_step([])
    run(folder, cfg, make_model(), without=WITHOUT)
    return told, gradients(ours), folder


@KINDS
def test_two_ranks_equal_one_with_twice_the_batch(two, one):
    (_, folder, found), (told, expected, whole) = two, one
    assert found["labels"] == told["labels"] and found["tokens"] == told["tokens"]
    assert found["loss"] == pytest.approx(told["loss"], abs=1e-5)
    assert found["grad_norm"] == pytest.approx(told["grad_norm"], rel=1e-5)
    for name, gradient in expected.items():
        assert float((found["gradients"][name] - gradient).abs().max()) < 1e-5, name
    theirs, ours = ([record.get("loss") for record in read(each)] for each in (folder / "whole", whole))
    assert len(ours) == 5 and theirs[:4] == pytest.approx(ours[:4], abs=1e-4)


@KINDS
def test_gradients_travel_once_a_window(two):
    kind, _, found = two
    assert found["exchanged"] == [False, True]
    assert (found["kind"] == "DistributedDataParallel") == (kind == "ddp")


@KINDS
def test_a_sharded_process_holds_its_share_and_others_the_whole(two):
    kind, _, found = two
    whole = sum(p.numel() for p in make_model().parameters())
    assert found["share"] == whole if kind == "ddp" else found["share"] < 0.55 * whole


@KINDS
def test_checkpoints_of_several_processes_go_on_to_the_bit_and_load_in_one(two):
    kind, folder, _ = two
    assert [path.name for path in checkpoints(folder / "whole")] == ["step-00000002", "step-00000004"]
    records = ([r for r in read(folder / name) if r["step"] > 2] for name in ("whole", "again"))
    first, again = ([(r["step"], r.get("loss"), r.get("val_loss")) for r in rows] for rows in records)
    assert len(first) == 3 and first == again
    last = folder / "whole" / "last"
    assert (last / "sharded").exists() == (kind == "shard") and (last / "rank-00001.pt").is_file()
    loaded = VisionLanguageModel.from_pretrained(last)
    assert loaded.decoder.head.weight is loaded.decoder.token_embedding.weight
    assert not torch.equal(loaded.MP.proj.weight, make_model().MP.proj.weight)


@KINDS
def test_sharded_and_whole_checkpoints_are_told_apart(two):
    kind, folder, _ = two
    model = make_model()
    says = "written without --shard: leave out --shard" if kind == "ddp" else "written with --shard: add --shard"
    with pytest.raises(CheckpointError, match=says):
        load_optimizer(folder / "whole" / "last", model, torch.optim.AdamW(model.parameters()), sharded=kind == "ddp")


@KINDS
def test_ranks_read_disjoint_rows(two):
    first, second = map(set, two[2]["ids"])
    assert first and second and not first & second


def test_a_launcher_that_sets_half_the_variables_is_told_what_is_missing(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2, but RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        with world(torch.device("cpu")):
            pass


DYING = """
import os, sys, time
from pathlib import Path
from nanovlm.train.distributed import world
from tests.train.rows import *

class Dying(Rows):
    def __next__(self):
        if self.rank == 1 and self.at == 4:
            if sys.argv[2] == "killed":
                os.kill(os.getpid(), 9)
            raise OSError("the disk of rank 1 is gone")
        return super().__next__()

with world(torch.device("cpu")) as processes:
    model = make_model()
    loaders = Dying(model.cfg, 2, processes.rank, processes.size), Held(model.cfg)
    train(model, config(max_training_steps=100000), processes, Path(sys.argv[1]), loaders)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how, says", [("raises", "the disk of rank 1 is gone"), ("killed", "Signal 9 (SIGKILL)")])
def test_a_rank_that_dies_ends_the_others_within_a_minute_with_its_error(tmp_path, how, says):
    (tmp_path / "script.py").write_text(DYING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    began = time.monotonic()
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path / "run"), how],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and says in done.stderr, done.stderr
    assert time.monotonic() - began < 60
    records = read(tmp_path / "run")
    assert records[-1]["step"] == 2, "what was told before stays"
