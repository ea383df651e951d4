"""Several processes that train one model: who this one is, and what they tell each other.

Unusual: the module that is wrapped is ``Step``, whose output is one loss, and never the model; so parameter
names stay what they are in every checkpoint. A batch without a picture still passes one through the encoder
when there are several processes: each must take part in every exchange, whatever its rows hold.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanovlm.errors import ConfigError
from nanovlm.vlm import VisionLanguageModel


@dataclass(frozen=True)
class World:
    """The processes of a run; ``size`` 1 without torchrun."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def of_first(self, value: Any) -> Any:
        """The first process's value."""
        return self.gather(value)[0]


@contextlib.contextmanager
def world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun, or a launcher that sets the same variables, started.

    A GPU process takes the GPU of its LOCAL_RANK. Raises ConfigError where the variables are half there.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 and "RANK" not in os.environ:
        yield World(device)
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE={size}, but {', '.join(missing)} is not set; start the command with torchrun")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class Step(nn.Module):
    """A batch in, the sum of its labels' losses out: what is wrapped, and what accumulates rightly."""

    def __init__(self, model: VisionLanguageModel, autocast: torch.dtype | None, everywhere: bool) -> None:
        super().__init__()
        self.model, self.autocast, self.everywhere = model, autocast, everywhere

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """batch: a collated batch on the model's device, with ``n_labels``."""
        ids = batch["input_ids"]
        blank = self.everywhere and not any(batch["images"])
        with torch.autocast(ids.device.type, self.autocast, enabled=self.autocast is not None):
            with self._blank_picture() if blank else contextlib.nullcontext():
                _, loss = self.model(
                    ids,
                    batch["images"],
                    attention_mask=batch["attention_mask"],
                    targets=batch["labels"],
                    want_logits=False,
                )
        return loss.float() * batch["n_labels"]

    @contextlib.contextmanager
    def _blank_picture(self) -> Iterator[None]:
        """Pass a picture that counts nothing through the encoder, at the point where others pass theirs."""
        side = self.model.cfg.vit_img_size

        def add_nothing(module: nn.Module, given: Any, embeds: Tensor) -> Tensor:
            (features,) = self.model.encode_images(torch.zeros(1, 3, side, side, device=embeds.device))
            return embeds + 0 * features.sum()

        hook = self.model.decoder.token_embedding.register_forward_hook(add_nothing)
        try:
            yield
        finally:
            hook.remove()


def replicate(step: Step) -> nn.Module:
    """The step with gradients averaged over processes in the backward pass."""
    return DistributedDataParallel(step)


def shard(model: VisionLanguageModel) -> None:
    """Split parameters, gradients and optimizer state over the processes, a block at a time (FSDP2).

    An encoder of pictures in their own shape is one piece: its calls differ in number between processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    blocks: list[nn.Module] = [] if model.cfg.dynamic else list(model.vision_encoder.blocks)
    for block in [*blocks, *model.decoder.blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def exchanging(wrapped: nn.Module, model: Any, last: bool) -> Iterator[None]:
    """Gradients travel in the last backward pass of a window only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        yield
    else:
        waits = wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else None
        with waits or contextlib.nullcontext():
            yield
