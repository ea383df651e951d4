"""``nanovlm generate``: answers to a question about pictures, as they grow."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import unicodedata
from typing import TYPE_CHECKING

from nanovlm.commands import add_model_flags, config_of, device_of, slimming
from nanovlm.errors import ConfigError, SourceNotFound
from nanovlm.presets import PRESETS

if TYPE_CHECKING:
    from nanovlm.vlm import VisionLanguageModel

EXAMPLE = 'example: python -m nanovlm generate --use_preset tiny --image cat.png --prompt "What is this?"'


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("generate", help="answer a question about pictures", epilog=EXAMPLE)
    command.set_defaults(run=run)
    source = command.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="DIR", help="folder with config.json and model.safetensors")
    source.add_argument("--hf_model", metavar="REPO", help="repository on the Hub, such as lusxvr/nanoVLM-222M")
    source.add_argument("--use_preset", metavar="NAME", help=f"random weights: {', '.join(PRESETS)}")
    add_model_flags(command)
    add = command.add_argument
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
    add("--measure_vram", action="store_true", help="say what memory loading and generating took at most")
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> int:
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

    device = device_of(options.device)
    torch.manual_seed(options.seed)
    memory = {}
    _restart_peak(device)
    model = _model(options, cfg).to(device).eval()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and _is_tiny(model):
        torch.set_num_threads(1)  # waking a second thread costs a tiny model more than half of its work
    if options.compile:
        _compile(model)
    memory["loading"] = peak_memory(device)
    _restart_peak(device)
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
    memory["generating"] = peak_memory(device)
    if options.measure_vram and not options.json:
        for stage, peaks in memory.items():
            print(f"peak memory of {stage}: {_shown(peaks)}")
    if options.json:
        tiles = sum(map(len, pixel_values))
        facts = {
            "prompt": options.prompt,
            "images": options.image,
            "tiles": tiles,
            "prompt_tokens": input_ids.shape[1],
        }
        if options.measure_vram:
            facts["peak_memory"] = memory
        print(json.dumps({**facts, "generations": answers}, ensure_ascii=False, indent=2))
    return 0


def _model(options: argparse.Namespace, cfg) -> VisionLanguageModel:
    from nanovlm.vlm import VisionLanguageModel

    if cfg is None:
        from nanovlm.slimming import slim

        return slim(VisionLanguageModel.from_pretrained(options.checkpoint or options.hf_model), **slimming(options))
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


def peak_memory(device) -> dict[str, int]:
    """Bytes that this process had at most since ``_restart_peak``; where no CUDA counts, since its start."""
    import torch

    if device.type == "cuda":
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    try:
        import resource
    except ImportError:  # Windows
        return {}
    # the kernel counts kibibytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return {"resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _restart_peak(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _shown(peaks: dict[str, int]) -> str:
    words = ", ".join(f"{count / 1e6:,.0f} MB {name.removesuffix('_bytes')}" for name, count in peaks.items())
    if "allocated_bytes" in peaks:
        return words
    return f"{words or 'not counted on this system'} (of the whole process; CUDA alone counts device memory)"


def _is_tiny(model) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) < 5_000_000


def visible(text: str) -> str:
    """Text whose control characters are written out: a model's tokens must not move the user's cursor."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)


class Printer:
    """A streamer that prints an answer as it grows, whole characters only."""

    def __init__(self, tokenizer, title: str) -> None:
        self.tokenizer, self.title, self.shown = tokenizer, title, 0
        self.ids: list[int] = []

    def put(self, ids) -> None:
        """The next id of row 0. The title comes with the first: what is refused has none."""
        if not self.ids:
            print(self.title, end="", flush=True)
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
