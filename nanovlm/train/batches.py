"""What the loop asks of a batch: how many labels it has, and that it lies where the model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanovlm.errors import NoLabels
from nanovlm.vlm import IGNORE_INDEX


def count_labels(batch: Mapping[str, Any]) -> int:
    """Labels of a batch. Raises NoLabels, naming the samples, where there is none."""
    count = int((batch["labels"] != IGNORE_INDEX).sum())
    if not count:
        raise NoLabels(
            f"not one of {batch['labels'].numel()} positions has a label in the batch of samples "
            f"{shorten(flat(batch['ids']))}: nothing to learn. Does max_sample_length cut the answers off, or does "
            f"the chat template not mark the assistant's words?"
        )
    return count


def on_device(batch: Mapping[str, Any], device: torch.device, n_labels: int) -> dict[str, Any]:
    """The batch where the model is; to a GPU from pinned memory, so that nobody waits for the copy."""

    def move(tensor: Tensor) -> Tensor:
        if device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    moved = {name: move(batch[name]) for name in ("input_ids", "attention_mask", "labels")}
    return {**moved, "images": [[move(stack) for stack in row] for row in batch["images"]], "n_labels": n_labels}


def blank() -> dict[str, Any]:
    """One position: for a process that has no batch left while others have, and must take part."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    return {"input_ids": one, "labels": one, "attention_mask": one + 1, "images": [[]]}


def flat(ids: Any) -> list[str]:
    """The ids of nested lists, in order."""
    return [name for inner in ids for name in flat(inner)] if isinstance(ids, list) else [ids]


def shorten(names: list[str], most: int = 20) -> str:
    """The first of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
