"""The loaders of a run, from what its config says; see ``nanovlm.data`` for what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovlm.config import TrainConfig, VLMConfig
from nanovlm.data import hub
from nanovlm.data.collate import VQACollator
from nanovlm.data.dataset import Encoder, Processor
from nanovlm.data.loader import Loader, Reading, Validation
from nanovlm.data.local import LocalRows, jsonl_files
from nanovlm.data.rows import RATINGS, Reader
from nanovlm.data.sources import Indexed, Streamed, split
from nanovlm.data.synthetic import HeldOut, Synthetic
from nanovlm.errors import ConfigError, DataError


def build_loaders(
    train_cfg: TrainConfig,
    cfg: VLMConfig,
    tokenizer,
    image_processor: Processor,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Loader, Validation]:
    """(training batches without end, validation batches). Raises DataError, ConfigError."""
    if train_cfg.pack and cfg.image_token_id is None:
        raise ConfigError(
            "pack=True puts several documents into a row, but this model sets its pictures in front of the row "
            "(v0.1); use --no-pack"
        )
    training, validation = sources(train_cfg)
    encoder = Encoder(
        tokenizer,
        image_processor,
        cfg.tokens_per_cell,
        Reader(
            {name: getattr(train_cfg, f"{name}_min_rating") for name in RATINGS},
            min(train_cfg.max_images_per_example, train_cfg.max_images_per_knapsack),
        ),
        min(train_cfg.max_sample_length, cfg.lm_max_length),
        train_cfg.task,
    )
    shared: dict[str, Any] = {"rank": rank, "world_size": world_size, "lanes": max(1, train_cfg.num_workers)}
    # one shape for every batch where the step is compiled, or packed anyway
    length = cfg.lm_max_length
    collator = VQACollator(tokenizer, length, length if train_cfg.pack or train_cfg.compile else None)
    reading = Reading(
        training,
        encoder,
        collator,
        train_cfg.batch_size,
        pack=train_cfg.pack,
        max_pictures=train_cfg.max_images_per_knapsack,
        **shared,
    )
    held_out = Reading(
        validation, encoder, VQACollator(tokenizer, length), train_cfg.batch_size, once=True, **shared
    )
    return Loader(reading, train_cfg.num_workers), Validation(held_out, train_cfg.num_workers)


def sources(train_cfg: TrainConfig) -> tuple[Indexed | Streamed, Indexed | Streamed]:
    """(training, validation) rows of ``train_dataset_path``: synthetic, a folder, or a repository."""
    path, names, seed = train_cfg.train_dataset_path, train_cfg.train_dataset_name, train_cfg.seed
    ratio, size = train_cfg.val_ratio, train_cfg.val_size
    if path == Synthetic.name:
        return Indexed(Synthetic(seed), Synthetic.name), Indexed(HeldOut(min(size, 1000)), "held_out")
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or folder.exists()
    if looks_local:
        folder = folder.expanduser()
        if not folder.is_dir():
            kind = "is a file, not a folder" if folder.exists() else "does not exist"
            raise DataError(f"data set {path} {kind}; name a folder with a JSONL file or parquet files")
        path = str(folder)
        if jsonl_files(folder):
            return split(LocalRows(folder), folder.name, seed, ratio, size)
    name = path.rpartition("/")[2] if looks_local else path
    if train_cfg.stream_dataset:
        stream = hub.Stream(path, names)
        return (
            Streamed(stream, name, ratio, validation=False),
            Streamed(stream, name, ratio, validation=True, limit=size),
        )
    return split(hub.rows(path, names), name, seed, ratio, size)
