"""``nanovlm vram``: the peak memory of training, measured on a CUDA device, predicted without one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from nanovlm.commands import add_model_flags, config_of, slimming
from nanovlm.errors import ConfigError, SourceNotFound
from nanovlm.presets import PRESETS

EXAMPLE = 'example: python -m nanovlm vram --use_preset tiny --batch_sizes "1 2 4" --gpu rtx4090-24gb'
MIB = 1 << 20


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("vram", help="peak memory of training for each batch size", epilog=EXAMPLE)
    command.set_defaults(run=run)
    source = command.add_mutually_exclusive_group()
    source.add_argument("--vlm_checkpoint_path", metavar="DIR", help="folder with a config.json: its model")
    source.add_argument("--use_preset", metavar="NAME", help=f"the model (default: default): {', '.join(PRESETS)}")
    source.add_argument(
        "--published", choices=("v0.1", "v0.2"), help="the model of a table that upstream published, beside its figures"
    )
    add_model_flags(command)
    add = command.add_argument
    add("--batch_sizes", default="1 2 4", metavar="LIST", help='such as "1 2 4 8" (default: %(default)s)')
    add("--seq_len", type=int, default=None, metavar="N", help="positions of a row, one picture's among them "
        "(default: 128, or twice the picture's where that is more)")  # fmt: skip
    add("--dtype", default="bf16", help="of autocast: bf16, fp16, or fp32 for none (default: %(default)s)")
    add("--optimizer", default="adamw", help="adamw, adamw-fused (what training here uses), adam, sgd")
    add("--checkpointing", action="store_true", help="keep the input of each block alone and compute it again")
    add("--gpu", metavar="NAME", help="predict for this one, such as h100-80gb, even where a CUDA device is")
    add("--fits", metavar="SIZE", help="predict the largest batch for a memory such as 24gb")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """``nanovlm vram``."""
    sizes = batch_sizes(options.batch_sizes)
    from nanovlm.measure.gpus import gpu, parse_size

    limit = None if options.fits is None else parse_size(options.fits)
    card = gpu(options.gpu or "h100-80gb")
    if options.vlm_checkpoint_path and not os.path.isdir(options.vlm_checkpoint_path):
        raise SourceNotFound(f"--vlm_checkpoint_path {options.vlm_checkpoint_path}: no such folder")
    mixed = config_of(options)
    if mixed is not None and (options.vlm_checkpoint_path or options.published):
        raise ConfigError("a checkpoint, a published table and a model of flags are three models: give one of them")
    import torch

    from nanovlm.measure import published, vram

    if options.published:
        if options.seq_len is not None or options.checkpointing or options.dtype != "bf16":
            raise ConfigError(f"--published {options.published} is one setting; leave the others away")
        cfg, training = published.config(options.published), published.TRAINING
        sizes = sizes if options.batch_sizes != "1 2 4" else list(published.PEAKS[options.published])
    else:
        cfg = mixed or config_from(options.vlm_checkpoint_path).slimmed(**slimming(options))
        training = vram.Training(options.dtype, options.optimizer)
    seq_len = options.seq_len or max(128, 2 * cfg.image_tokens(cfg.vit_img_size, cfg.vit_img_size))
    cuda = options.gpu is None and options.fits is None and torch.cuda.is_available()

    def batch(rows: int) -> vram.Batch:
        return published.batch(cfg, rows) if options.published else vram.make_batch(cfg, rows, seq_len)

    batch(1)  # a mistake in seq_len is told before the model is made
    with torch.device("cuda" if cuda else "meta"):
        model = make_model(cfg, options)
    rows: list[Any]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        rows = [vram.measure(model, batch(n), training, torch.device("cuda")) for n in sizes]
    else:
        predictor = vram.Predictor(model, batch, training, card)
        if limit is not None:
            return _largest(predictor, limit, options)
        rows = [predictor.predict(n) for n in sizes]
    source = "measured" if cuda else f"predicted for {card.name}"
    if options.json:
        print(json.dumps({"source": source, "unit": "bytes", "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(f"VRAM allocated after loading model to device: {rows[0].loaded / MIB:.2f} MB ({source})")
        _print(rows, published.PEAKS[options.published] if options.published else {})
    return 0


def make_model(cfg, options: argparse.Namespace):
    """The model to train, wherever torch's default device is."""
    if options.published:
        from nanovlm.measure.published import Published

        return Published(cfg)
    from nanovlm.vlm import VisionLanguageModel

    model = VisionLanguageModel(cfg, load_backbone=False)
    if options.checkpointing:
        model.recompute_activations("blocks")
    return model


def config_from(folder: str | None):
    """The config of a checkpoint's folder, or the default preset's."""
    from nanovlm import hub
    from nanovlm.presets import preset
    from nanovlm.vlm import read_config

    return preset("default") if folder is None else read_config(hub.read_json(folder, "config.json"), folder)[0]


def batch_sizes(text: str) -> list[int]:
    """The numbers of a list such as "1 2 4"; commas do as well. Raises ConfigError."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and 0 < int(word) <= 1 << 20 for word in words):
        raise ConfigError(f'--batch_sizes {text!r}: expected counts from 1 up, such as "1 2 4"')
    return [int(word) for word in words]


def _largest(predictor, limit: int, options: argparse.Namespace) -> int:
    found = predictor.largest(limit)
    if options.json:
        print(json.dumps({"memory": limit, "largest_batch_size": found}))
    else:
        print(f"{found} rows fit {options.fits}" if found else f"not one row fits {options.fits}")
    return 0


def _print(rows: list, table: dict[int, float | None]) -> None:
    """A table: a row for each batch size, in MB of 1024**2 bytes."""
    parts = [name for name in getattr(rows[0], "parts", {}) if any(row.parts[name] for row in rows)]
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table("batch", "peak", "reserved", *(["published", "off by"] if table else []), *parts, box=box.ASCII)
    for row in rows:
        peak = f"{row.peak / MIB:.2f}" if row.fits else f"OOM (peak before {row.peak / MIB:.2f})"
        cells = [str(row.batch_size), peak, f"{row.reserved / MIB:.0f}"]
        if table:
            there = table.get(row.batch_size)
            known = row.batch_size in table
            cells.append("OOM" if known and there is None else f"{there:.2f}" if known else "-")
            cells.append(f"{100 * (row.peak / MIB / there - 1):+.1f} %" if there and row.fits else "-")
        cells += [f"{row.parts[name] / MIB:.0f}" for name in parts]
        shown.add_row(*cells)
    Console(width=300, file=sys.stdout, highlight=False).print(shown)
