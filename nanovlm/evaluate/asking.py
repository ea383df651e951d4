"""Asking a model: what it says, and how likely it is to say each of several answers.

Unusual: a prompt goes through the model once, whatever the number of its options; each option goes on from a copy
of the cache. An answer's likelihood includes its end, so it is the probability of saying exactly that.

B prompts, T positions, R options in all, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanovlm import generate, prompts
from nanovlm.images import get_image_processor
from nanovlm.layers import causal_mask
from nanovlm.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, ``texts`` with their image strings, and the sizes of their pictures in pixels."""

    input_ids: Tensor
    mask: Tensor
    images: list[list[Tensor]]
    grids: list[list[tuple[int, int]]]

    def sizes(self, row: int) -> tuple[tuple[int, int], ...]:
        """(height, width) of each tile or picture of a row."""
        return tuple((stack.shape[2], stack.shape[3]) for stack in self.images[row] for _ in range(len(stack)))


def batch_of(model: VisionLanguageModel, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Batch:
    """Questions about pictures, ready for the model."""
    process, tokenizer, device = get_image_processor(model.cfg), model.tokenizer, model.MP.proj.weight.device
    ids, images, grids = [], [], []
    for text, shown in zip(texts, pictures, strict=True):
        made = [process(picture) for picture in shown]
        grids.append([grid for _, grid in made])
        ids.append(prompts.question(model.cfg, tokenizer, text, grids[-1]))
        images.append([tiles.to(device) for tiles, _ in made])
    longest = max(map(len, ids))
    padded = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return Batch(torch.tensor(padded, device=device), torch.tensor(mask, device=device), images, grids)


def say(model: VisionLanguageModel, batch: Batch, max_new_tokens: int) -> list[str]:
    """The likeliest answers."""
    new = model.generate(batch.input_ids, batch.images, batch.mask, max_new_tokens, greedy=True)
    return [text.strip() for text in model.tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.inference_mode()
def log_likelihoods(
    model: VisionLanguageModel, batch: Batch, answers: Sequence[Sequence[str]]
) -> list[list[tuple[float, bool]]]:
    """For each answer to each prompt: log-probability of saying exactly it, and whether greedy would say it."""
    tails = [[_tail(model.tokenizer, answer) for answer in row] for row in answers]
    flat = [tail for row in tails for tail in row]
    R, L = len(flat), max(map(len, flat))
    decoder, device = model.decoder, batch.input_ids.device
    embeds, documents, _ = model.embed_prompt(batch.input_ids, batch.images, batch.mask)
    B, T = embeds.shape[:2]
    valid = torch.ones(B, T, dtype=torch.bool, device=device) if documents is None else documents.bool()
    cache = decoder.new_cache(B, T)
    last = generate.prefill(decoder, embeds, None if documents is None else valid, cache)

    of = torch.repeat_interleave(torch.tensor([len(row) for row in tails], device=device))  # (R,) its prompt
    ids = torch.zeros(R, L, dtype=torch.long, device=device)
    for number, tail in enumerate(flat):
        ids[number, : len(tail)] = torch.tensor(tail, device=device)
    first = decoder.head(last).float().log_softmax(-1)[of][:, None]
    scores = first
    if L > 1:
        copied = decoder.new_cache(R, T + L)
        for (keys, values), (old_keys, old_values) in zip(copied.layers, cache.layers, strict=True):
            keys[:, :, :T] = old_keys[of, :, :T]
            values[:, :, :T] = old_values[of, :, :T]
        copied.advance(T)
        seen = torch.cat((valid[of], valid.new_ones(R, L - 1)), dim=1)
        positions = valid[of].sum(1, keepdim=True) + torch.arange(L - 1, device=device)
        hidden = decoder(decoder.embed(ids[:, :-1]), positions, causal_mask(seen)[:, :, T:], copied)
        scores = torch.cat((first, decoder.head(hidden).float().log_softmax(-1)), dim=1)
    each = scores.gather(2, ids[..., None])[..., 0]
    likeliest = scores.argmax(-1) == ids
    found = [(float(each[n, : len(t)].sum()), bool(likeliest[n, : len(t)].all())) for n, t in enumerate(flat)]
    taken = iter(found)
    return [[next(taken) for _ in row] for row in tails]


def _tail(tokenizer: Any, answer: str) -> list[int]:
    """The ids that training teaches for an answer: its words and its end."""
    ids, counts = prompts.conversation(tokenizer, [("", answer)])
    return [number for number, counted in zip(ids, counts, strict=True) if counted]
