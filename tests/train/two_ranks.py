"""One of two processes: trains, goes on from the middle, and the first writes what came out.

python -m tests.train.two_ranks FOLDER ddp|shard; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nanovlm import VisionLanguageModel
from nanovlm.train.distributed import exchanging, world
from nanovlm.train.loop import Trainer
from tests.train.rows import Held, Rows, config, make_model, run

WITHOUT = {4: "image", 5: "image"}  # one batch of one rank has no picture


def gradients(ours: Trainer) -> dict[str, torch.Tensor]:
    """As applied in the first step."""
    found = {name: 10 * ours.optimizer.state[p]["exp_avg"] for name, p in ours.model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def exchanged(ours: Trainer) -> list[bool]:
    """Whether gradients had travelled after each of the two backward passes of a window."""
    found = []
    for last in (False, True):
        batch = {**next(ours.train_loader), "n_labels": 1}
        with exchanging(ours.wrapped, ours.model, last):
            ours.wrapped(batch).backward()
        gradient = ours.model.MP.proj.weight.grad
        if ours.cfg.shard:  # kept whole, out of .grad, until it is shared out
            found.append(gradient is not None)
        else:
            found.append(len(set(ours.world.gather(float(gradient.abs().sum())))) == 1)
    ours.optimizer.zero_grad()
    return found


def main(folder: Path, shard: bool) -> None:
    """Everything that test_distributed.py asks about."""
    torch.set_num_threads(1)
    with world(torch.device("cpu")) as processes:
        cfg = config(shard=shard, save_checkpoint_steps=2)
        model = make_model()
        rows = Rows(model.cfg, 2, processes.rank, processes.size, WITHOUT)
        ours = Trainer(model, cfg, processes, folder / "unused", (rows, Held(model.cfg)))
        told = ours.one_step([])
        found = {
            "loss": told["loss"], "grad_norm": told["grad_norm"], "labels": told["labels"], "tokens": told["tokens"],
            "gradients": gradients(ours), "exchanged": exchanged(ours), "kind": type(ours.wrapped).__name__,
            "share": sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters()),
        }  # fmt: skip
        run(folder / "whole", cfg, make_model(), processes, without=WITHOUT)
        middle = folder / "whole" / "step-00000002"
        torch.manual_seed(99)
        run(folder / "again", config(shard=shard), VisionLanguageModel.from_pretrained(middle), processes, middle)
        found["ids"] = processes.gather([name for row in next(rows)["ids"] for name in row])
        if processes.first:
            torch.save(found, folder / "found.pt")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), shard=sys.argv[2] == "shard")
