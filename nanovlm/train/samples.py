"""Questions out of a batch, and what a model answers to them: what a validation shows beside its loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovlm.vlm import IGNORE_INDEX, VisionLanguageModel


@dataclass(frozen=True)
class Sample:
    """One turn: ``expected`` is what the data answers, ``answer`` what the model does."""

    id: str
    question: str
    expected: str
    answer: str


def turns(batch: dict[str, Any], cfg) -> Iterator[tuple[str, Tensor, Tensor, list[Tensor]]]:
    """(id, prompt ids (T,), expected ids (n,), pictures) of the first turn of every document in a batch."""
    for row, numbers in enumerate(batch["attention_mask"]):
        pictures = list(batch["images"][row])
        for number, name in zip(range(1, int(numbers.max()) + 1), batch["ids"][row], strict=True):
            here = numbers == number
            ids, labels = batch["input_ids"][row][here], batch["labels"][row][here]
            mine = _taken(pictures, ids, cfg)
            taught = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
            if not taught:
                continue
            first = taught[0]
            length = sum(1 for at, place in enumerate(taught) if place == first + at)
            yield name, ids[: first + 1], labels[first : first + length], mine


def _taken(pictures: list[Tensor], ids: Tensor, cfg) -> list[Tensor]:
    """The pictures of a document, taken off the front of its row's: as many as it has image tokens for."""
    if cfg.image_token_id is None:
        return [pictures.pop(0) for _ in range(len(pictures))]
    tokens, mine = int((ids == cfg.image_token_id).sum()), []
    while tokens > 0:
        mine.append(pictures.pop(0))
        count, _, height, width = mine[-1].shape
        tokens -= count * cfg.image_tokens(height, width)
    return mine


def answers(model: VisionLanguageModel, loader: Iterable[dict[str, Any]], count: int) -> list[Sample]:
    """The likeliest answers to the first ``count`` questions of a loader, cut at a little over the expected length."""
    device, tokenizer, was_training = model.MP.proj.weight.device, model.tokenizer, model.training
    model.eval()
    found = []
    questions = itertools.chain.from_iterable(turns(batch, model.cfg) for batch in loader)
    for name, prompt, expected, pictures in itertools.islice(questions, count):
        images = [picture.to(device) for picture in pictures]
        ids = model.generate(prompt[None].to(device), images, max_new_tokens=len(expected) + 8, greedy=True)
        texts = (_words(tokenizer, part, model.cfg) for part in (prompt, expected, ids[0]))
        found.append(Sample(name, *texts))
    model.train(was_training)
    return found


def _words(tokenizer, ids: Tensor, cfg) -> str:
    kept = [number for number in ids.tolist() if number != cfg.image_token_id]
    return " ".join(tokenizer.decode(torch.tensor(kept), skip_special_tokens=True).split())
