"""Text from a model: prefill once, then one token at a time. No tokenizer in here.

Unusual: rows are packed to the right before they start, so a batch padded on either side generates what its
rows generate alone; ``top_k`` and ``top_p`` choose among the logits before ``temperature`` is applied, which
is upstream nanoVLM's order.

B rows, T prompt positions, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanovlm.cache import KVCache
from nanovlm.errors import PromptError, PromptTooLong


class Streamer(Protocol):
    """What follows a generation: ``put`` gets the new ids (B,) of each step, ``end`` comes last."""

    def put(self, ids: Tensor) -> None: ...

    def end(self) -> None: ...


@torch.inference_mode()
def generate(
    model,
    input_ids: Tensor,
    images,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 5,
    *,
    eos_token_id: int | Sequence[int] | None,
    top_k: int = 50,
    top_p: float = 0.9,
    temperature: float = 0.5,
    greedy: bool = False,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] | Sequence[Sequence[int]] = (),
    streamer: Streamer | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """New ids (B, n), n at most ``max_new_tokens``: fewer when every row has ended.

    A row ends with an ``eos_token_id`` or one of the ``stop`` sequences of ids (or the only one, given flat);
    then it repeats the end token (the first, of several).
    """
    # greedy draws from nothing, and upstream's evaluation then gives None for what it would draw with
    drawn_with = (0, 1.0, 1.0) if greedy else (top_k, top_p, temperature)
    _check(max_new_tokens, *drawn_with, repetition_penalty)
    stops = _sequences(stop)
    input_ids, attention_mask = pack_right(input_ids, attention_mask)
    B = input_ids.shape[0]
    if max_new_tokens == 0:
        return input_ids.new_empty(B, 0)
    embeds, documents, _ = model.embed_prompt(input_ids, images, attention_mask)
    valid = None if documents is None else documents.bool()
    T = embeds.shape[1]
    limit = model.cfg.lm_max_position_embeddings
    if T + max_new_tokens > limit:
        raise PromptTooLong(
            f"a prompt of {T} positions and max_new_tokens={max_new_tokens} need {T + max_new_tokens}, but "
            f"lm_max_position_embeddings={limit}: max_new_tokens={limit - T} still fits; or shorten the prompt, "
            "or use smaller pictures"
        )
    decoder = model.decoder
    cache = decoder.new_cache(B, T + max_new_tokens)
    logits = decoder.head(prefill(decoder, embeds, valid, cache))
    positions = torch.full((B, 1), T, device=embeds.device) if valid is None else valid.sum(1, keepdim=True)
    if valid is not None:
        valid = torch.cat((valid, valid.new_ones(B, max_new_tokens)), dim=1)
    seen = _seen(input_ids, attention_mask, logits.shape[-1]) if repetition_penalty != 1 else None
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    ended = torch.zeros(B, dtype=torch.bool, device=embeds.device)
    rows: list[Tensor] = []
    for step in range(max_new_tokens):
        if seen is not None:
            penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        ids = sample_next(
            logits, top_k=top_k, top_p=top_p, temperature=temperature, greedy=greedy, generator=generator
        )
        if rows:
            ids = torch.where(ended, ends[0] if ends else rows[-1], ids)
        rows.append(ids)
        if streamer is not None:
            streamer.put(ids)
        for end in ends:
            ended = ended | (ids == end)
        for sequence in stops:
            ended = ended | _ends_with(rows, sequence)
        if step + 1 == max_new_tokens or bool(ended.all()):
            break
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        hidden = decode_one_token(decoder, ids, positions + step, valid, cache)
        logits = decoder.head(hidden)
    if streamer is not None:
        streamer.end()
    return torch.stack(rows, dim=1)


def prefill(decoder, embeds: Tensor, valid: Tensor | None, cache: KVCache) -> Tensor:
    """Fill ``cache`` with a prompt (B, T, D); hidden states (B, D) of its last position."""
    from nanovlm.layers import causal_mask

    mask = None if valid is None else causal_mask(valid)
    hidden = decoder(embeds, position_ids(embeds, valid), mask, cache)
    cache.advance(embeds.shape[1])
    return hidden[:, -1]


def decode_one_token(decoder, ids: Tensor, positions: Tensor, valid: Tensor | None, cache: KVCache) -> Tensor:
    """Hidden states (B, D) after ids (B,) at positions (B, 1); ``valid`` covers the cache and them."""
    mask = None if valid is None else valid[:, None, None, : cache.length + 1]
    hidden = decoder(decoder.embed(ids[:, None]), positions, mask, cache)
    cache.advance(1)
    return hidden[:, -1]


def sample_next(
    logits: Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits (B, V) -> ids (B,). top_k=0 and top_p=1 keep everything; temperature=0 is greedy."""
    if greedy or temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if 0 < top_k < logits.shape[-1]:
        logits, choices = logits.topk(top_k)
    else:
        logits, choices = logits.sort(descending=True)
    if top_p < 1:
        total = logits.softmax(-1).cumsum(-1)
        beyond = total > top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond, float("-inf"))
    drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
    return choices.gather(1, drawn)[:, 0]


def position_ids(embeds: Tensor, documents: Tensor | None) -> Tensor:
    """Positions (B, T) that count a document's own tokens only: it equals its unpadded, unpacked self.

    documents (B, T): the number of each position's document, rising along a row; 0 (or False) at padding.
    """
    if documents is None:
        return torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
    before = (documents != 0).long().cumsum(1) - 1
    number = documents.long().cummax(1).values
    starts = torch.diff(number, dim=1, prepend=number.new_zeros(len(number), 1)) > 0
    return (before - torch.where(starts, before, 0).cummax(1).values).clamp_(min=0)


def pack_right(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each row's padding moved to its front; a mask of ones becomes None."""
    if attention_mask is None or attention_mask.shape != input_ids.shape:
        return input_ids, attention_mask  # the model names a wrong shape
    if not attention_mask.is_floating_point() and attention_mask.max() > 1:
        raise PromptError(
            f"attention_mask numbers {int(attention_mask.max())} documents in a row; give each a row of its own"
        )
    valid = attention_mask.bool()
    if valid.all():
        return input_ids, None
    if not valid.any(1).all():
        raise PromptError(
            f"row {int((~valid.any(1)).nonzero()[0, 0])} of the batch is all padding: nothing to continue"
        )
    order = valid.long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), valid.gather(1, order)


def _seen(input_ids: Tensor, valid: Tensor | None, vocabulary: int) -> Tensor:
    """(B, V), True for ids of the prompt."""
    counts = torch.zeros(input_ids.shape[0], vocabulary, device=input_ids.device)
    weights = torch.ones_like(input_ids, dtype=counts.dtype) if valid is None else valid.to(counts.dtype)
    return counts.scatter_add_(1, input_ids, weights) > 0


def _sequences(stop: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """``stop`` as sequences of ids. Raises PromptError for anything else, text included."""
    try:
        rows = [stop] if stop and isinstance(stop[0], int) else stop
        found = [[operator.index(number) for number in row] for row in rows]
    except (TypeError, KeyError):  # text, floats, a number alone, a mapping
        found = [[]]
    if not all(found):
        raise PromptError(
            f"stop={stop!r}: expected sequences of token ids, such as [[13, 13]]; for a text, "
            "stop=[model.tokenizer.encode(text, add_special_tokens=False)]"
        )
    return found


def _ends_with(rows: list[Tensor], sequence: Sequence[int]) -> Tensor:
    """(B,): which rows end with ``sequence``."""
    if len(sequence) > len(rows):
        return torch.zeros_like(rows[-1], dtype=torch.bool)
    tail = torch.stack(rows[-len(sequence) :], dim=1)
    return (tail == torch.tensor(sequence, device=tail.device)).all(1)


def _check(
    max_new_tokens: int, top_k: int, top_p: float, temperature: float, repetition_penalty: float
) -> None:
    """Refuse numbers that would draw from nothing."""
    for name, value, fine, expected in (
        (
            "max_new_tokens",
            max_new_tokens,
            isinstance(max_new_tokens, int) and max_new_tokens >= 0,
            "a count from 0 up",
        ),
        ("top_k", top_k, isinstance(top_k, int) and top_k >= 0, "a count, 0 for all"),
        ("top_p", top_p, 0 < top_p <= 1, "a share above 0, at most 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "a number from 0 (greedy) up"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "a number above 0"),
    ):
        if not fine:
            raise PromptError(f"{name}={value!r}: expected {expected}")
