"""``nanovlm validate``: the validation loss of a checkpoint, and answers to look at."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from nanovlm.commands import add_model_flags, config_of, device_of, slimming
from nanovlm.commands.generate import visible
from nanovlm.commands.train import add_train_flags, stored_config, train_config

EXAMPLE = "example: python -m nanovlm validate --checkpoint_dir checkpoints/my_run"


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("validate", help="validation loss and sample answers of a checkpoint", epilog=EXAMPLE)
    command.set_defaults(run=run)
    add = command.add_argument
    add("--checkpoint_dir", metavar="DIR", required=True, help="a run (its best checkpoint), or a checkpoint of one")
    add("--use_preset", metavar="NAME", help="the preset that it should be of; another one is an error")
    add("--samples", type=int, default=3, metavar="N", help="answers to print (default: %(default)s)")
    add("--validation_batches", type=int, default=argparse.SUPPRESS, metavar="N", help="most batches to read")
    add("--batch_size", type=int, default=argparse.SUPPRESS, metavar="N", help="rows of a batch")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add_model_flags(command)
    add_train_flags(command, "data")


def run(options: argparse.Namespace) -> int:
    """``nanovlm validate``. The data are those that the run was trained on, unless flags say otherwise."""
    from nanovlm.train.checkpoints import check_shape, resolve

    folder = resolve(options.checkpoint_dir)
    cfg = train_config(options, _stored(folder))
    wanted = config_of(options)
    import torch

    from nanovlm.data import build_loaders
    from nanovlm.images import get_image_processor
    from nanovlm.slimming import slim
    from nanovlm.train.distributed import Step, World
    from nanovlm.train.loop import autocast_dtype, validation_loss
    from nanovlm.train.samples import answers
    from nanovlm.vlm import VisionLanguageModel

    device = device_of(options.device)
    torch.manual_seed(cfg.seed)
    model = slim(VisionLanguageModel.from_pretrained(folder), **slimming(options)).to(device).eval()
    if wanted is not None:
        check_shape(folder, model.cfg, wanted)
    loaders = build_loaders(cfg, model.cfg, model.tokenizer, get_image_processor(model.cfg), 0, 1)
    step = Step(model, autocast_dtype(cfg, device), everywhere=False)
    loss = validation_loss(step, loaders[1], World(device), cfg.validation_batches)
    shown = answers(model, loaders[1], options.samples)
    if options.json:
        facts = {"checkpoint": str(folder), "dataset": cfg.train_dataset_path, "val_loss": loss}
        print(json.dumps({**facts, "samples": [dataclasses.asdict(sample) for sample in shown]}, indent=2))
        return 0
    print(f"{folder}: validation loss " + ("none, there are no validation rows" if loss is None else f"{loss:.4f}"))
    for sample in shown:
        print(visible(f"\n{sample.id}: {sample.question}\n  expected: {sample.expected}\n  answered: {sample.answer}"))
    return 0


def _stored(folder: Path) -> dict:
    """The training config beside a checkpoint; for a model that was not trained here, the data need a name."""
    if (folder / "train_config.json").is_file():
        return stored_config(folder)
    print(f"nanovlm: {folder} does not say what it was trained on; asking about synthetic rows", file=sys.stderr)
    return {"train_dataset_path": "synthetic"}
