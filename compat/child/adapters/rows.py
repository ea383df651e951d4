"""Probe rows as tensors, in the layout and the form of pictures that a target takes.

Shapes: B rows, T padded length. A probe row's ``tokens`` hold -1 where an image stands.
"""

from __future__ import annotations

import dataclasses

import torch

from .. import probe
from ..protocol import NotSupported


@dataclasses.dataclass
class Batch:
    """Rows as tensors. ``text`` lists, a row, where its text tokens lie in the padded sequence."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    targets: torch.Tensor | None
    pictures: list  # a row: list of (1, 3, S, S)
    text: list


class Rows:
    """The part of an Adapter that makes batches."""

    def batch(self, rows, padding="left"):
        """Rows to a Batch on the model's device, padded on the side asked for."""
        expanded = [self.expand(row) for row in rows]
        longest = max(len(ids) for ids, _, _ in expanded)
        needs = any(len(ids) < longest for ids, _, _ in expanded)
        pad = self.pad_id
        ids_rows, label_rows, mask_rows, text = [], [], [], []
        for ids, labels, where in expanded:
            gap = longest - len(ids)
            left, right = (0, gap) if padding == "right" else (gap, 0)
            ids_rows.append([pad] * left + ids + [pad] * right)
            label_rows.append([-100] * left + labels + [-100] * right)
            mask_rows.append([0] * left + [1] * len(ids) + [0] * right)
            text.append([left + i for i in where])
        labelled = any(label != -100 for row in label_rows for label in row)
        # Rows of one length need no mask; a model that takes one gets it all the same, as training gives it.
        masked = needs or (padding != "none" and self.takes["attention_mask"])
        mask = torch.tensor(mask_rows, device=self.device) if masked else None
        return Batch(
            torch.tensor(ids_rows, device=self.device),
            mask,
            torch.tensor(label_rows, device=self.device) if labelled else None,
            [[probe.picture(k, self.image_size)[None].to(self.device) for k in row.get("images", ())] for row in rows],
            text,
        )

    def in_one_row(self, rows):
        """A Batch of one row that holds all rows as documents, numbered from 1 in its attention mask."""
        if not self.takes["attention_mask"] or self.layout == "in_front":
            raise NotSupported("documents share a row only where a mask tells apart text that holds its pictures")
        alone = [self.batch([row], "none") for row in rows]
        starts = [sum(batch.input_ids.shape[1] for batch in alone[:number]) for number in range(len(alone))]
        masks = [torch.full_like(batch.input_ids, number) for number, batch in enumerate(alone, 1)]
        targets = [batch.targets for batch in alone if batch.targets is not None]
        return Batch(
            torch.cat([batch.input_ids for batch in alone], 1),
            torch.cat(masks, 1),
            torch.cat(targets, 1) if targets else None,
            [[picture for batch in alone for picture in batch.pictures[0]]],
            [[start + place for start, batch in zip(starts, alone) for place in batch.text[0]]],
        )

    def expand(self, row):
        """(ids, labels, positions of the text tokens) of one probe row in this layout."""
        tokens, labels = row["tokens"], row.get("labels") or [-100] * len(row["tokens"])
        if tokens.count(-1) != len(row.get("images", ())):
            raise ValueError(f"a row with {tokens.count(-1)} image places and {len(row.get('images', ()))} images")
        ids, targets, where = [], [], []
        for token, label in zip(tokens, labels):
            if token == -1:
                count = 0 if self.layout == "in_front" else self.image_tokens
                ids += [self.image_token_id] * count
                targets += [-100] * count
            else:
                where.append(len(ids))
                ids.append(token)
                targets.append(label)
        return ids, targets, where

    @property
    def pad_id(self):
        value = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if value is None else int(value)

    def images(self, pictures, form=None):
        """Pictures a row, in the form this target takes them."""
        flat = [picture for row in pictures for picture in row]
        form = form or self.image_form
        if form == "nested lists":
            return pictures
        if form == "list of 4-D tensors":
            return flat
        if form == "list of 3-D tensors":
            return [picture[0] for picture in flat]
        return torch.cat(flat) if flat else None

    FORMS = ("nested lists", "list of 4-D tensors", "one tensor", "list of 3-D tensors")

    def find_image_form(self):
        """The first form of pictures that a forward pass accepts; the dialect's own when none does."""
        ids = [i for i in range(8)][:3]
        batch = self.batch([{"tokens": [-1, *ids], "images": [0]}], "none")
        for form in self.FORMS:
            try:
                with torch.no_grad():
                    self.call(batch, form=form)
                return form
            except Exception:  # the target's; the checks that follow report it with its own words
                continue
        return self.FORMS[0]
