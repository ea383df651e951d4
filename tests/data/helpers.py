"""Rows, encoders and loaders in small, for the tests of the data side."""

from __future__ import annotations

from functools import cache
from typing import Any

from PIL import Image

from nanovlm import TrainConfig, get_image_processor, get_tokenizer, preset
from nanovlm.data import build_loaders
from nanovlm.data.build import sources
from nanovlm.data.collate import VQACollator
from nanovlm.data.dataset import Encoder
from nanovlm.data.loader import Loader, Reading
from nanovlm.data.rows import Reader
from nanovlm.data.sources import Indexed


@cache
def parts(name: str = "tiny", **changes) -> tuple:
    """(config, tokenizer, image processor) of a preset."""
    cfg = preset(name, **changes)
    return cfg, get_tokenizer(cfg), get_image_processor(cfg)


def picture(width: int = 40, height: int = 30, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def row(*answers: str, pictures: int = 1, **more: Any) -> dict[str, Any]:
    """A row with one turn an answer."""
    texts = [{"user": f"question {number}?", "assistant": answer} for number, answer in enumerate(answers or ("yes",))]
    return {"images": [picture() for _ in range(pictures)], "texts": texts, **more}


def rows(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths that say their number; every third has a picture."""
    return [
        row(f"answer {number} " + "x" * (7 * number % 40), pictures=int(number % 3 == 0), id=f"row {number}")
        for number in range(count)
    ]


def encoder(name: str = "tiny", reader: Reader | None = None, **options: Any) -> Encoder:
    cfg, tokenizer, processor = parts(name)
    return Encoder(tokenizer, processor, cfg.tokens_per_cell, reader, **options)


def loader(source: Any, batch_size: int = 2, num_workers: int = 0, max_length: int = 256, **options: Any) -> Loader:
    """A loader over rows or a source."""
    if isinstance(source, list):
        source = Indexed(source, "rows", options.pop("seed", 0))
    encode = options.pop("encoder", None) or encoder(max_length=max_length)
    pad_to = max_length if options.get("pack") else None
    collator = VQACollator(encode.tokenizer, max_length, pad_to)
    lanes = options.pop("lanes", max(1, num_workers))
    return Loader(Reading(source, encode, collator, batch_size, lanes=lanes, **options), num_workers)


def built(name: str = "tiny", rank: int = 0, world_size: int = 1, **changes: Any):
    """build_loaders for a preset and changes of the TrainConfig."""
    values = {"num_workers": 0, "pack": False, "batch_size": 4, "train_dataset_path": "synthetic", **changes}
    return build_loaders(TrainConfig(**values), *parts(name), rank, world_size)


def both_halves(**changes: Any):
    """(training, validation) sources of a TrainConfig."""
    return sources(TrainConfig(**changes))


def ids_of(batches: list[dict[str, Any]]) -> list[str]:
    return [name for batch in batches for group in batch["ids"] for name in group]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two batches are equal to the last bit."""
    tensors = all(one[name].equal(other[name]) for name in ("input_ids", "labels", "attention_mask"))
    shapes = [len(group) for group in one["images"]] == [len(group) for group in other["images"]]
    pixels = all(
        a.equal(b)
        for mine, theirs in zip(one["images"], other["images"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    return tensors and shapes and pixels and one["ids"] == other["ids"]
