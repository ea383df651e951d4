"""Samples -> a batch, padded on the left; packed rows say which token belongs to which document.

B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanovlm.data.dataset import IGNORED
from nanovlm.errors import DataError, NoLabels


class VQACollator:
    """Batches as a forward pass takes them; see ``nanovlm.data`` for what they hold.

    max_length: positions of a row at most; a longer sample raises DataError.
    pad_to: positions of every row, None for those of the longest one.
    """

    def __init__(self, tokenizer, max_length: int, pad_to: int | None = None) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self.max_length = max_length
        self.pad_to = pad_to

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of one sample a row."""
        return self.packed([[sample] for sample in samples])

    def packed(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """A batch whose rows hold several samples each, one after the other. Raises DataError, NoLabels."""
        if not rows or not all(rows):
            raise DataError(f"a batch of {len(rows)} rows, of them {sum(not row for row in rows)} empty")
        lengths = [sum(len(sample["input_ids"]) for sample in row) for row in rows]
        if max(lengths) > self.max_length:
            names = ", ".join(sample["id"] for sample in rows[lengths.index(max(lengths))])
            raise DataError(f"{names}: {max(lengths)} tokens; at most max_length={self.max_length} fit in a row")
        T = max(lengths) if self.pad_to is None else max(self.pad_to, max(lengths))
        input_ids = torch.full((len(rows), T), self.pad_token_id)
        labels = torch.full((len(rows), T), IGNORED)
        mask = torch.zeros(len(rows), T, dtype=torch.int64)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            at = T - length
            for document, sample in enumerate(row, start=1):
                end = at + len(sample["input_ids"])
                input_ids[number, at:end] = sample["input_ids"]
                labels[number, at:end] = sample["labels"]
                mask[number, at:end] = document
                at = end
        ids = [[sample["id"] for sample in row] for row in rows]
        check_labels(labels, ids)
        images = [[tiles for sample in row for tiles in sample["images"]] for row in rows]
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "images": images, "ids": ids}


def check_labels(labels: Tensor, ids: Sequence[Sequence[str]]) -> None:
    """Raise NoLabels if a batch teaches nothing: its loss would be the mean of nothing, NaN."""
    if not bool((labels != IGNORED).any()):
        names = [name for row in ids for name in row]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise NoLabels(
            f"none of the {labels.numel()} positions of this batch has a label ({shown}): nothing would be learned. "
            "Does the chat template write what an assistant says?"
        )
