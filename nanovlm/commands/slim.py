"""``nanovlm slim``: which resolution and pooling is the cheapest that still answers well; or one setting, saved."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from nanovlm.checks import POOLINGS
from nanovlm.commands import add_slim_flags, slimming
from nanovlm.errors import ConfigError

EXAMPLE = "example: python -m nanovlm slim --model checkpoints/my_run --grid --tasks synthetic --max-samples 120"


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("slim", help="the cheapest setting that still answers well", epilog=EXAMPLE)
    command.set_defaults(run=run)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR|REPO", help="a checkpoint, the folder of a run, or a repository")
    source.add_argument("--use_preset", metavar="NAME", help="random weights: to see that it runs")
    add = command.add_argument_group("a grid of settings").add_argument
    add("--grid", action="store_true", help="try every resolution with every pooling")
    add("--resolutions", metavar="LIST", help='such as "512 384 256 192" (default: 4/4, 3/4, 2/4 and 3/8 of its own)')
    add("--pools", metavar="LIST", default=" ".join(POOLINGS), help="poolings to try (default: all)")
    add("--min-accuracy", "--min_accuracy", type=float, default=0.65, metavar="A", help="floor (default: 0.65)")
    add("--tasks", default="aokvqa", metavar="A,B", help="what is asked: mmstar, aokvqa, synthetic (default: aokvqa)")
    add("--split", metavar="NAME", help="another split than the task's own")
    add("--data", action="append", default=[], metavar="TASK=DIR", help="read a task from a folder or repository")
    add("--max-samples", "--max_samples", type=int, metavar="N", help="questions of each task at most")
    add("--mode", choices=("mcq", "oa"), default="mcq", help="what is compared: choices by likelihood, or open answers")
    add("--batch_size", "--batch-size", type=int, default=8, metavar="N", help="questions at once (default: 8)")
    add("--finetune-steps", "--finetune_steps", type=int, default=0, metavar="N", help="train each setting first (0)")
    add("--finetune-data", metavar="DATA", default="synthetic", help="on these: a repository, a folder or synthetic")
    add("--finetune-lr", type=float, default=1e-3, metavar="X", help="at this learning rate (default: 0.001)")
    add("--finetune-batch", type=int, default=32, metavar="N", help="rows of a step (default: 32)")
    add("--output", default="results/slim", metavar="DIR", help="grid.json and the front (default: %(default)s)")
    add("--json", action="store_true", help="print the JSON instead of a table")
    add_slim_flags(command)
    add = command.add_argument
    add("--save", metavar="DIR", help="without --grid: write the model as the options make it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--seed", type=int, default=0, help="of random weights and of training (default: 0)")


def run(options: argparse.Namespace) -> int:
    """``nanovlm slim``: 1 where no setting reaches the floor."""
    if options.grid == bool(options.save):
        raise ConfigError("--grid tries settings, --save DIR writes one: give one of both")
    return _grid(options) if options.grid else _save(options)


def _save(options: argparse.Namespace) -> int:
    if not slimming(options):
        raise ConfigError("--save: what is to become smaller? Give --resolution or --pool")
    from nanovlm.commands.evaluate import load

    model, name = load(options)
    folder = Path(options.save)
    if (folder / "config.json").exists():
        raise ConfigError(f"--save {folder} holds a model already; name another folder")
    try:
        model.save_pretrained(folder)
    except OSError as error:
        raise ConfigError(f"--save {folder} cannot be written: {error.strerror or error}") from None
    print(f"{folder}: {name} with {model.cfg.mp_image_token_length} image tokens a tile of {model.cfg.vit_img_size}")
    return 0


def _grid(options: argparse.Namespace) -> int:
    if not 0 <= options.min_accuracy <= 1:
        raise ConfigError(f"--min-accuracy {options.min_accuracy}: expected a share from 0 to 1")
    if options.finetune_steps < 0:
        raise ConfigError(f"--finetune-steps {options.finetune_steps}: expected a count from 0 up")
    if options.resolution is not None or options.pool is not None:
        raise ConfigError("--grid tries --resolutions and --pools; --resolution and --pool go with --save")
    pools = options.pools.replace(",", " ").split()
    for pool in pools:
        if pool not in POOLINGS:
            raise ConfigError(f"--pools names {pool!r}; there are: {', '.join(POOLINGS)}")
    from nanovlm.commands.evaluate import _pair, load
    from nanovlm.evaluate.drawing import draw
    from nanovlm.evaluate.grid import cheapest, front, run_grid, settings, table
    from nanovlm.evaluate.run import Settings
    from nanovlm.train_config import TrainConfig

    tasks = tuple(name for name in options.tasks.replace(" ", ",").split(",") if name)
    asked = Settings(
        tasks, options.split, options.max_samples, options.mode, options.batch_size, letters=False,
        data=dict(_pair(text) for text in options.data),
    )  # fmt: skip
    first: list[Any] = [load(options)[0]]
    resolutions = _numbers(options.resolutions) if options.resolutions else _default(first[0].cfg)
    finetune = None
    if options.finetune_steps:
        steps = options.finetune_steps
        finetune = TrainConfig(
            batch_size=options.finetune_batch, gradient_accumulation_steps=1, lr_mp=options.finetune_lr,
            lr_backbones=options.finetune_lr, max_training_steps=steps, warmup_ratio=0.1, min_lr_ratio=0.02,
            eval_in_epochs=False, validation_batches=1, save_checkpoint_steps=steps + 1, num_workers=0, pack=False,
            train_dataset_path=options.finetune_data, seed=options.seed, console_log_interval=steps,
        )  # fmt: skip
    output = Path(options.output)

    def fresh() -> Any:
        return first.pop() if first else load(options)[0]

    def tell(row: Any) -> None:
        said = "impossible" if row.problem else f"accuracy {row.accuracy:.3f}, {1e3 * row.tflops:.6g} GFLOPs"
        print(f"nanovlm: {row.name}: {said}, {row.seconds:.1f} s", file=sys.stderr, flush=True)

    cells = settings(resolutions, pools, options.pool_factor, options.keep_ratio, options.pool_at)
    try:
        rows = run_grid(fresh, cells, asked, output, finetune=finetune, tell=tell)
        chosen = cheapest(rows, options.min_accuracy)
        drawn = draw(rows, output, options.min_accuracy, chosen)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from None
    if options.json:
        facts = {"rows": [dataclasses.asdict(row) for row in rows], "front": [row.name for row in front(rows)]}
        print(json.dumps({**facts, "chosen": chosen and chosen.name, "min_accuracy": options.min_accuracy}, indent=2))
    else:
        print(table(rows, chosen))
        print("the front: " + ", ".join(str(path) for path in drawn))
        if chosen is None:
            print(f"no setting reaches an accuracy of {options.min_accuracy:g}")
        else:
            least = f"cheapest with an accuracy of at least {options.min_accuracy:g}"
            print(f"{least}: {chosen.name}, {chosen.accuracy:.3f} at {1e3 * chosen.tflops:.6g} GFLOPs")
    return 0 if chosen is not None else 1


def _numbers(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and 0 < int(word) <= 4096 for word in words):
        raise ConfigError(f'--resolutions {text!r}: expected pixels, such as "512 384 256 192"')
    return list(dict.fromkeys(map(int, words)))


def _default(cfg: Any) -> list[int]:
    """512, 384, 256 and 192 of 512, as far as they are whole numbers of image tokens."""
    sizes = [cfg.vit_img_size * eighths // 8 // cfg.token_side * cfg.token_side for eighths in (8, 6, 4, 3)]
    return list(dict.fromkeys(size for size in sizes if size))
