"""The command line: parse, call, print, exit code. Answers go to stdout, everything else to stderr.

Unusual: torch is imported after the arguments are known to be good, so a mistake is told at once.
Exit codes: 0 done, 2 a mistake in what was given, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import unicodedata
from typing import TYPE_CHECKING

from nanovlm import __version__
from nanovlm.errors import ConfigError, NanoVLMError, SourceNotFound
from nanovlm.presets import DINOV3, LANGUAGE, PRESETS, VISION, mix, preset

if TYPE_CHECKING:
    from nanovlm.config import VLMConfig
    from nanovlm.vlm import VisionLanguageModel

USAGE = 2
MIXING = ("vision_encoder", "dinov3_model", "language_model", "vit_model_type", "lm_model_type")
EXAMPLE = 'example: python -m nanovlm generate --use_preset tiny --image cat.png --prompt "What is this?"'


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except NanoVLMError as error:
        print(f"nanovlm: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else the interpreter complains at exit
        return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="nanovlm", description="A small vision-language model.", epilog=EXAMPLE
    )
    top.add_argument("--version", action="version", version=f"nanovlm {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser(
        "generate", help="answer a question about pictures", epilog=EXAMPLE
    ).add_argument
    commands.choices["generate"].set_defaults(run=run_generate)
    source = commands.choices["generate"].add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="DIR", help="folder with config.json and model.safetensors")
    source.add_argument(
        "--hf_model", metavar="REPO", help="repository on the Hub, such as lusxvr/nanoVLM-222M"
    )
    source.add_argument("--use_preset", metavar="NAME", help=f"random weights: {', '.join(PRESETS)}")
    add_model_flags(commands.choices["generate"])
    add(
        "--image",
        metavar="PATH",
        nargs="+",
        action="extend",
        default=[],
        help="one or more picture files; none asks about text alone",
    )
    add("--prompt", default="What is this?", help="the question (default: %(default)s)")
    add("--generations", type=int, default=5, metavar="N", help="how many answers (default: %(default)s)")
    add(
        "--max_new_tokens",
        type=int,
        default=100,
        metavar="N",
        help="longest answer in tokens (default: %(default)s)",
    )
    add("--greedy", action="store_true", help="always the likeliest token: every answer is the same")
    add("--seed", type=int, default=0, help="of random weights and of sampling (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add("--compile", action="store_true", help="faster tokens after half a minute; needs a C++ compiler")
    add("--json", action="store_true", help="print one JSON object instead of text")
    about = "make a folder with safetensors of a pickled checkpoint"
    example = "example: python -m nanovlm convert old/model.pth new"
    commands.add_parser("convert", help=about, epilog=example).set_defaults(run=run_convert)
    add = commands.choices["convert"].add_argument
    add("file", metavar="FILE", help="a .pth, .pt or .bin file that holds nothing but tensors by name")
    add("folder", metavar="FOLDER", help="where config.json and model.safetensors go")
    add("--config", metavar="PATH", help="the model's config.json (default: the one beside FILE)")
    add("--key", metavar="NAME", help="entry of FILE that holds the tensors, where there are several")
    return top


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """Options that put a model together, for ``config_of``."""
    add = command.add_argument_group("a model of one's own, or a change to a preset").add_argument
    add("--vision_encoder", metavar="NAME", help=", ".join(VISION))
    add("--dinov3_model", metavar="SIZE", help=f"of dinov3: {', '.join(DINOV3)}")
    add("--language_model", metavar="NAME", help=", ".join(LANGUAGE))
    add("--vit_model_type", metavar="SOURCE", help="folder or repository whose config.json sizes the encoder")
    add("--lm_model_type", metavar="SOURCE", help="the same of the language model; its tokenizer comes along")
    add("--max_img_size", type=int, metavar="N", help="longest side in pixels; DINO pictures keep shape")


def config_of(options: argparse.Namespace) -> VLMConfig | None:
    """The config that a preset or the options of ``add_model_flags`` describe; None without either."""
    mixed = {name: getattr(options, name) for name in MIXING if getattr(options, name) is not None}
    changes = {} if options.max_img_size is None else {"max_img_size": options.max_img_size}
    if options.use_preset and mixed:
        first = next(iter(mixed))
        raise ConfigError(f"--{first} puts a model together, --use_preset names one: give one of both")
    if options.use_preset:
        return preset(options.use_preset, **changes)
    if not mixed:
        return None
    if "lm_model_type" in mixed:
        changes["lm_tokenizer"] = mixed["lm_model_type"]
    cfg = mix(**mixed, **changes)
    sources = [name for name in ("vit_model_type", "lm_model_type") if name in mixed]
    if sources:
        from nanovlm.vlm import with_hub_sizes

        cfg = with_hub_sizes(cfg, *sources)
    return cfg


def run_generate(options: argparse.Namespace) -> int:
    """``nanovlm generate``."""
    for name in ("generations", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: expected at least 1")
    cfg = config_of(options)
    if (cfg is None) == (options.checkpoint is None and options.hf_model is None):
        raise ConfigError("which model? Give --checkpoint, --hf_model, --use_preset or --vision_encoder")
    if cfg is None and options.max_img_size is not None:
        raise ConfigError("--max_img_size changes a preset; a checkpoint's config.json says its own")
    if options.checkpoint and not os.path.isdir(options.checkpoint):
        raise SourceNotFound(f"--checkpoint {options.checkpoint}: no such folder")
    from nanovlm.images import open_picture

    pictures = [open_picture(path) for path in options.image]
    import torch

    device = _device(options.device)
    torch.manual_seed(options.seed)
    model = _model(options, cfg).to(device).eval()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and _is_tiny(model):
        torch.set_num_threads(1)  # waking a second thread costs a tiny model more than half of its work
    if options.compile:
        _compile(model)
    input_ids, pixel_values = model.prepare(pictures, options.prompt)
    answers = []
    for number in range(1, options.generations + 1):
        streamer = None if options.json else Printer(model.tokenizer, f">> Generation {number}: ")
        ids = model.generate(
            input_ids,
            pixel_values,
            max_new_tokens=options.max_new_tokens,
            greedy=options.greedy,
            streamer=streamer,
        )
        answers.append(model.tokenizer.decode(ids[0], skip_special_tokens=True))
    if options.json:
        tiles = sum(map(len, pixel_values))
        facts = {
            "prompt": options.prompt,
            "images": options.image,
            "tiles": tiles,
            "prompt_tokens": input_ids.shape[1],
        }
        print(json.dumps({**facts, "generations": answers}, ensure_ascii=False, indent=2))
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """``nanovlm convert``."""
    from nanovlm.convert import convert

    report = convert(options.file, options.folder, config=options.config, key=options.key)
    print(f"nanovlm: {options.file}: {report}", file=sys.stderr)
    print(options.folder)
    return 0


def _model(options: argparse.Namespace, cfg) -> VisionLanguageModel:
    from nanovlm.vlm import VisionLanguageModel

    if cfg is None:
        return VisionLanguageModel.from_pretrained(options.checkpoint or options.hf_model)
    print(
        f"nanovlm: {options.use_preset or 'this mix'} has random weights: its answers mean nothing",
        file=sys.stderr,
    )
    return VisionLanguageModel(cfg, load_backbone=False)


def _compile(model: VisionLanguageModel) -> None:
    from nanovlm.language.llama import Llama

    if not isinstance(model.decoder, Llama):
        raise ConfigError(
            f"--compile: language_model={model.cfg.language_model!r} has nothing to compile; leave it out"
        )
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if not any(map(shutil.which, compilers)):
        raise ConfigError(f"--compile needs a C++ compiler; none of {', '.join(compilers)} is on the PATH")
    model.decoder.compile_step()


def _device(name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _is_tiny(model) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) < 5_000_000


def visible(text: str) -> str:
    """Text whose control characters are written out: a model's tokens must not move the user's cursor."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)


class Printer:
    """A streamer that prints an answer as it grows, whole characters only."""

    def __init__(self, tokenizer, title: str) -> None:
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0
        print(title, end="", flush=True)

    def put(self, ids) -> None:
        """The next id of row 0."""
        self.ids.append(int(ids[0]))
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a character may follow
            self._print(text)

    def end(self) -> None:
        """End the line."""
        self._print(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        print(flush=True)

    def _print(self, text: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        print(visible(text[self.shown :]).encode(encoding, "replace").decode(encoding), end="", flush=True)
        self.shown = len(text)
