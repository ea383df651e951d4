"""The loader of the default preset against what its training step eats, and how full packed rows are.

Unusual: the step is timed by a part of it that can be timed in seconds on two cores: the vision encoder reading
one tile, forward only, times the tiles of a row. The whole step, with its backward pass and the language model,
takes several times as long, so the ratio printed here is smaller than the true one. One reader is timed, in this
process; a run has two beside it.
"""

from __future__ import annotations

import io
import itertools

import numpy as np
import torch
from PIL import Image

from benchmarks.sides import against, our_model
from nanovlm import get_image_processor, get_tokenizer, preset
from nanovlm.data.collate import VQACollator
from nanovlm.data.dataset import Encoder
from nanovlm.data.loader import Loader, Reading
from nanovlm.data.sources import Indexed

BYTES = {"lm_tokenizer": "byte", "lm_base_vocab_size": 259}  # no download; bytes are more tokens than words
SIZES = [(1200, 900), (640, 480), (1024, 1024), (500, 800)]


def photographs() -> list[bytes]:
    """JPEG files whose content costs a decoder about what a photograph's does."""
    rng = np.random.default_rng(0)
    files = []
    for width, height in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def loader(pack: bool) -> Loader:
    """Rows of one picture and two turns of 10 to 150 letters; every third is text alone."""
    cfg = preset("default", **BYTES)
    files, rng = photographs(), np.random.default_rng(1)
    rows = [
        {
            "images": [files[number % len(files)]] if number % 3 else [],
            "texts": [
                {"user": "u" * int(rng.integers(10, 150)), "assistant": "a" * int(rng.integers(10, 150))}
                for _ in range(2)
            ],
        }
        for number in range(400)
    ]
    tokenizer = get_tokenizer(cfg)
    encoder = Encoder(tokenizer, get_image_processor(cfg), cfg.tokens_per_cell, max_length=cfg.lm_max_length)
    collator = VQACollator(tokenizer, cfg.lm_max_length, cfg.lm_max_length if pack else None)
    return Loader(Reading(Indexed(rows, "rows", 0), encoder, collator, 2, pack=pack), 0)


def tiles(batch) -> int:
    return sum(len(stack) for row in batch["images"] for stack in row)


def test_loader_feeds_the_step(benchmark):
    source = loader(pack=True)
    model = our_model(preset("default", **BYTES, lm_n_blocks=1), torch.float32)
    tile = torch.rand(1, 3, 512, 512)
    loaded: list[int] = []

    @torch.inference_mode()
    def see() -> None:
        model.vision_encoder(tile)

    def load() -> None:
        loaded.append(tiles(next(source)))

    turns = against(benchmark, load, rounds=6, see=see)
    a_tile = benchmark.stats.stats.total / sum(loaded[-6:])
    ratio = turns.median("see") / a_tile
    benchmark.extra_info.update(
        ours=f"{a_tile * 1e3:.0f} ms a tile, its text included",
        theirs=f"{turns.median('see') * 1e3:.0f} ms to see it, forward",
        ratio=f"{ratio:.1f}",
        utilisation=f"{source.stats['utilisation']:.3f}",
    )
    assert ratio >= 5


def test_packed_rows_are_full(benchmark):
    source = loader(pack=True)
    source.reading.encoder.finish = lambda encoded: {  # the plan alone: what is decoded does not change it
        "input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels), "images": [], "id": "",
    }  # fmt: skip
    benchmark.pedantic(lambda: list(itertools.islice(source, 40)), rounds=1)
    benchmark.extra_info["utilisation"] = f"{source.stats['utilisation']:.3f}"
    assert source.stats["utilisation"] >= 0.95
