"""``nanovlm flops``: the floating-point operations of an answer, from the config and as torch dispatches them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from nanovlm.commands import add_model_flags, config_of, slimming
from nanovlm.errors import ConfigError, SourceNotFound
from nanovlm.presets import PRESETS

EXAMPLE = "example: python -m nanovlm flops --use_preset tiny --image cat.png --question 'What is this?'"


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("flops", help="floating-point operations of an answer", epilog=EXAMPLE)
    command.set_defaults(run=run)
    source = command.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="DIR", help="folder with a config.json: its model; no weights are read")
    source.add_argument("--use_preset", metavar="NAME", help=f"the model (default: default): {', '.join(PRESETS)}")
    add_model_flags(command)
    add = command.add_argument
    add("--image", metavar="PATH", nargs="+", action="extend", required=True, help="one or more picture files")
    add("--question", default="What is this?", metavar="TEXT|FILE", help="the text, or a file of it")
    add("--text_tokens", type=int, metavar="N", help="length of the prompt without pictures, where no tokenizer is")
    add("--new_tokens", type=int, default=3, metavar="N", help="length of the answer (default: %(default)s)")
    add("--output", metavar="FILE", help="write the JSON there, too")
    add("--json", action="store_true", help="print the JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """``nanovlm flops``."""
    if options.checkpoint and not os.path.isdir(options.checkpoint):
        raise SourceNotFound(f"--checkpoint {options.checkpoint}: no such folder")
    cfg = config_of(options)
    if cfg is not None and options.checkpoint:
        raise ConfigError("--checkpoint says its own model; leave the flags of another away")
    from nanovlm.commands.vram import config_from
    from nanovlm.images import get_image_processor, open_picture

    cfg = cfg or config_from(options.checkpoint).slimmed(**slimming(options))
    opened = [open_picture(path) for path in options.image]
    from nanovlm.measure import flops

    processor = get_image_processor(cfg)
    tiles, grids = zip(*(processor(picture) for picture in opened), strict=True)
    model = flops.meta_model(cfg)
    text = options.text_tokens
    if text is None:
        from nanovlm.prompts import question

        ids = question(cfg, model.tokenizer, words(options.question), grids)
        text = len(ids) - (ids.count(cfg.image_token_id) if cfg.image_token_id is not None else 0)
    prompt = flops.prompt_of(cfg, tiles, text, options.new_tokens)
    facts = flops.report(model, prompt, sum(len(t) > g[0] * g[1] for t, g in zip(tiles, grids, strict=True)))
    facts = {"images": options.image, "grids": [list(grid) for grid in grids], "text_tokens": text, **facts}
    written = json.dumps(facts, indent=2)
    if options.output:
        try:
            Path(options.output).write_text(written + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {options.output} cannot be written: {error.strerror}") from None
    print(written) if options.json else _print(facts)
    return 0


def words(text: str) -> str:
    """The question: what the file holds if ``text`` names one, else itself. Raises ConfigError."""
    try:
        return Path(text).read_text(encoding="utf-8").strip() if Path(text).is_file() else text
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(f"--question {text}: the file is no UTF-8 text") from None
        return text  # too long for a path, so no path


def _print(facts: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120, file=sys.stdout, highlight=False)
    table = Table("part", "product", "operator", "GFLOPs", box=box.ASCII)
    for row in facts["analytic"]:
        table.add_row(row["part"], row["name"], row["operator"], f"{row['flops'] / 1e9:.6f}")
    console.print(table)
    table = Table("operator", "analytic GFLOPs", "counted GFLOPs", box=box.ASCII)
    for name, (ours, theirs) in facts["by_class"].items():
        table.add_row(name, f"{ours / 1e9:.6f}", f"{theirs / 1e9:.6f}")
    console.print(table)
    for name in ("total", "generation_without_warmup", "generation_with_warmup"):
        console.print(f"{name.replace('_', ' ')}: {facts[name] / 1e12} TFLOPs")
    for name in ("vit_manual", "vit_counter"):
        console.print(f"vision as the Lite document counts it, {name}: {facts[name] / 1e12} TFLOPs")
