"""``nanovlm convert``: safetensors of a pickled checkpoint."""

from __future__ import annotations

import argparse
import sys


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    about = "make a folder with safetensors of a pickled checkpoint"
    example = "example: python -m nanovlm convert old/model.pth new"
    command = commands.add_parser("convert", help=about, epilog=example)
    command.set_defaults(run=run)
    add = command.add_argument
    add("file", metavar="FILE", help="a .pth, .pt or .bin file that holds nothing but tensors by name")
    add("folder", metavar="FOLDER", help="where config.json and model.safetensors go")
    add("--config", metavar="PATH", help="the model's config.json (default: the one beside FILE)")
    add("--key", metavar="NAME", help="entry of FILE that holds the tensors, where there are several")


def run(options: argparse.Namespace) -> int:
    """``nanovlm convert``."""
    from nanovlm.convert import convert

    report = convert(options.file, options.folder, config=options.config, key=options.key)
    print(f"nanovlm: {options.file}: {report}", file=sys.stderr)
    print(options.folder)
    return 0
