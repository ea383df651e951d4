"""From rows to batches. What a training loop may rely on:

A row is ``{"images": [picture, ...], "texts": [{"user": str, "assistant": str}, ...]}`` as in the Cauldron and
FineVision; a picture is a PIL image, bytes, a path or the Hub's ``{"bytes", "path"}``; ``images`` may be empty or
None. Optional: ``id``, and the ratings of FineVision, one a turn.

A sample is ``{"input_ids": (T,), "labels": (T,), "images": [(n, 3, H, W), ...], "id": str}``. ``labels[t]`` is
the id expected *after* ``input_ids[t]``, -100 where nothing is taught: shifted once, so that
``model(ids, images, attention_mask=mask, targets=labels)`` shifts nothing.

A batch is ``{"input_ids", "labels", "attention_mask": (B, T), "images": [[(n, 3, H, W), ...] of each row],
"ids": [[str, ...] of each row]}``, padded on the left. ``attention_mask`` is 0 at padding; elsewhere it holds the
number of the document within its row, 1, 2, ...: all 1 where rows are not packed. Documents of a packed row do
not see each other, and positions restart in each.

``build_loaders(train_cfg, cfg, tokenizer, image_processor, rank, world_size)`` -> (train, validation):

- ``train`` never ends: ``next(train)`` is a batch. ``train.state_dict()`` is what JSON can hold, and says where the
  *next* batch begins, whatever was read ahead; ``train.load_state_dict(state)``, before the first ``next``, goes on
  exactly there. Each rank has its own state. ``train.stats`` counts what the batches handed out were made of:
  ``rows``, ``skipped`` ({reason: rows}), ``neutralised`` (image tokens found in words), ``batches``, ``epoch``,
  ``utilisation`` (share of positions that are no padding). ``train.close()`` ends the background workers.
- ``validation`` is finite and may be iterated again: the same batches each time. Ranks read disjoint rows, and
  their numbers of batches may differ by one, so add up sums and counts.

Raises DataError (no such data set, nothing readable in it), NoLabels (a batch without one label), ConfigError.
A single row that cannot be used is a BadRow: ``VQADataset[i]`` raises it, loaders skip and count it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_WHERE = {
    "build_loaders": "build",
    "VQADataset": "dataset",
    "VQAIterableDataset": "dataset",
    "VQACollator": "collate",
    "Loader": "loader",
    "Validation": "loader",
    "LocalRows": "local",
    "Synthetic": "synthetic",
    "HeldOut": "synthetic",
}
__all__ = ["HeldOut", "Loader", "LocalRows", "Synthetic", "VQACollator", "VQADataset", "VQAIterableDataset",
           "Validation", "build_loaders"]  # fmt: skip

if TYPE_CHECKING:
    from nanovlm.data.build import build_loaders
    from nanovlm.data.collate import VQACollator
    from nanovlm.data.dataset import VQADataset, VQAIterableDataset
    from nanovlm.data.loader import Loader, Validation
    from nanovlm.data.local import LocalRows
    from nanovlm.data.synthetic import HeldOut, Synthetic


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'nanovlm.data' has no attribute {name!r}")
    return getattr(import_module(f"nanovlm.data.{_WHERE[name]}"), name)
