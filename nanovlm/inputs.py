"""What ``forward`` and ``generate`` accept, checked and brought into one form.

Unusual: pictures come as one tensor, a list of tensors, or one list a row, whatever upstream's generations
passed; only the last says which row a picture belongs to, and then every row is checked by itself. Tiles
are squares of one size; a dynamic model takes pictures of H x W pixels, each of its own size.

B rows, T positions, N tiles of S x S pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovlm.config import VLMConfig
from nanovlm.errors import ImageError, ImageTokenMismatch, PromptError

WAY_OUT = "build the text with image_string and the grid of the same picture"


@dataclass(frozen=True)
class Pictures:
    """Tiles (N, 3, S, S) of a batch, pictures (3, H, W) of several sizes in a list, or None.

    ``features`` counts what each becomes; ``per_row`` counts them where the caller's nesting says so.
    """

    pixel_values: Tensor | list[Tensor] | None
    features: list[int]
    per_row: list[int] | None

    def __len__(self) -> int:
        return len(self.features)


def check_ids(cfg: VLMConfig, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise PromptError for ids that are no (B, T) numbers of the vocabulary, or a mask of another shape."""
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(given, Tensor) and (given is not None or name == "input_ids"):
            raise PromptError(f"{name}: expected a tensor (B, T), got {type(given).__name__}")
    shape = tuple(input_ids.shape)
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not input_ids.numel():
        raise PromptError(f"input_ids: expected whole numbers (B, T), got {input_ids.dtype} {shape}")
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise PromptError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {shape}")
    low, high = (int(value) for value in input_ids.aminmax())
    if low < 0 or high >= cfg.lm_vocab_size:
        bad = low if low < 0 else high
        raise PromptError(
            f"id {bad} is outside lm_vocab_size={cfg.lm_vocab_size}; was another tokenizer used?"
        )


def documents(cfg: VLMConfig, attention_mask: Tensor | None, batch: Pictures) -> Tensor | None:
    """attention_mask (B, T) as the number of each position's document, 0 at padding; None if all is one.

    Raises PromptError for numbers that do not rise along a row, and for packed rows that cannot be told apart.
    """
    if attention_mask is None:
        return None
    numbers = (attention_mask != 0 if attention_mask.is_floating_point() else attention_mask).long()
    low, high = (int(value) for value in numbers.aminmax())
    if low == high == 1:
        return None
    if high <= 1 and low >= 0:
        return numbers
    if low < 0 or bool((numbers < numbers.cummax(1).values).logical_and(numbers != 0).any()):
        raise PromptError(
            "attention_mask: 0 is padding, 1, 2, ... number a row's documents from left to right; "
            f"these numbers, {low} to {high}, do not rise"
        )
    if cfg.image_token_id is None and len(batch):
        raise PromptError(
            f"attention_mask numbers {high} documents in a row, but this model puts features in front of a row, "
            "not of a document; give each document a row of its own"
        )
    return numbers


def check_targets(input_ids: Tensor, targets: Tensor) -> None:
    """Raise PromptError for targets that are no whole numbers shaped as input_ids (B, T)."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise PromptError(f"targets: expected a tensor of torch.int64, got {kind}")
    if targets.shape != input_ids.shape:
        raise PromptError(
            f"targets have shape {tuple(targets.shape)}, expected {tuple(input_ids.shape)} as input_ids"
        )


def check_labels(cfg: VLMConfig, labels: Tensor) -> None:
    """Raise PromptError for labels (n,) outside the vocabulary: on a GPU they would end the process."""
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= cfg.lm_vocab_size:
        raise PromptError(
            f"target {low if low < 0 else high} is outside lm_vocab_size={cfg.lm_vocab_size}, and not -100"
        )


def pictures(cfg: VLMConfig, images: Any, rows: int) -> Pictures:
    """All accepted forms of ``images`` as one stack of tiles. Raises ImageError."""
    if images is None:
        return Pictures(None, [], None)
    if isinstance(images, Tensor):
        if images.dim() == 5:  # (B, n, 3, S, S)
            return pictures(cfg, [list(row) for row in images], rows)
        images = [images]
    if not isinstance(images, list | tuple):
        raise ImageError(f"images: expected None, a tensor or a list, got {type(images).__name__}")
    nested = any(item is None or isinstance(item, list | tuple) for item in images)
    if nested and len(images) != rows:
        raise ImageError(f"images: {len(images)} lists for {rows} rows; give one a row, empty for no picture")
    groups = [item or () if item is None or isinstance(item, list | tuple) else [item] for item in images]
    stacks = [[_stack(tile) for tile in group] for group in groups]
    flat = [stack for group in stacks for stack in group if len(stack)]
    per_row = [sum(map(len, group)) for group in stacks] if nested else None
    features = [count for stack in flat for count in [_features(cfg, stack)] * len(stack)]
    if not flat:
        return Pictures(None, [], per_row)
    if any(stack.shape[1:] != flat[0].shape[1:] for stack in flat):
        return Pictures([picture for stack in flat for picture in stack], features, per_row)
    return Pictures(flat[0] if len(flat) == 1 else torch.cat(flat), features, per_row)


def slots_in_front(cfg: VLMConfig, batch: Pictures, rows: int, device: torch.device) -> Tensor:
    """(B, front), True where a row's features go; rows with fewer pictures begin with padding."""
    per_row = batch.per_row or [len(batch) // rows] * rows
    if sum(per_row) != len(batch):
        raise ImageTokenMismatch(f"{len(batch)} pictures for {rows} rows: give one list of pictures a row")
    wanted = torch.tensor(per_row, device=device)[:, None] * cfg.mp_image_token_length
    front = max(per_row) * cfg.mp_image_token_length
    return torch.arange(front, device=device) >= front - wanted


def check_slots(slots: Tensor, batch: Pictures) -> None:
    """Raise ImageTokenMismatch unless slots (B, T) and features agree, row by row where known."""
    found = slots.sum(1).tolist()
    first = 0
    for row, (tokens, tiles) in enumerate(zip(found, batch.per_row or (), strict=False)):
        features = sum(batch.features[first : first + tiles])
        first += tiles
        if tokens != features:
            raise ImageTokenMismatch(
                f"row {row} has {tokens} image tokens, its {tiles} tiles make {features} features; {WAY_OUT}"
            )
    features = sum(batch.features)
    if sum(found) != features:
        raise ImageTokenMismatch(
            f"the text has {sum(found)} image tokens, {len(batch)} tiles make {features} features; {WAY_OUT}"
        )


def _stack(tile: Any) -> Tensor:
    """One tile (3, S, S), or several (n, 3, S, S), as several."""
    if not isinstance(tile, Tensor):
        raise ImageError(f"images: expected tensors, got {type(tile).__name__}; use get_image_processor")
    if tile.dim() not in (3, 4):
        raise ImageError(f"images: a tensor of shape {tuple(tile.shape)}; expected (3, S, S) or (n, 3, S, S)")
    return tile[None] if tile.dim() == 3 else tile


def _features(cfg: VLMConfig, pixels: Tensor) -> int:
    """Features of each picture of a stack (n, 3, H, W). Raises ImageError for one the model cannot see."""
    height, width = pixels.shape[2:]
    unit, most, side = cfg.token_side, cfg.max_img_size, cfg.vit_img_size
    if cfg.dynamic and (height % unit or width % unit or not height * width or max(height, width) > most):
        raise ImageError(
            f"images: a picture of {height}x{width} pixels; this model takes sides that are multiples of "
            f"{unit}, at most max_img_size={most}; use get_image_processor"
        )
    if pixels.shape[1] != 3 or (not cfg.dynamic and (height, width) != (side, side)):
        raise ImageError(
            f"images: tiles of shape {tuple(pixels.shape)}, vit_img_size={side} wants (n, 3, {side}, {side})"
        )
    if not pixels.is_floating_point():
        raise ImageError(f"images: expected floating point in [0, 1], got {pixels.dtype}; divide by 255")
    if not bool(torch.isfinite(pixels).all()):
        raise ImageError(f"images: {int((~torch.isfinite(pixels)).sum())} pixels are NaN or infinite")
    return cfg.image_tokens(height, width)
