"""``nanovlm train``: a model from a preset, from its backbones or from a checkpoint, trained.

Unusual: every field of TrainConfig is a flag of its own name, made from the field; the table here adds the words.
A TOML file holds the same names; the command line has the last word.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovlm.commands import MIXING, SLIMMING, add_model_flags, config_of, device_of, slimming
from nanovlm.errors import CheckpointError, ConfigError
from nanovlm.presets import PRESETS, RECIPES, mix
from nanovlm.train_config import TrainConfig

if TYPE_CHECKING:
    import torch

    from nanovlm.config import VLMConfig
    from nanovlm.vlm import VisionLanguageModel

EXAMPLE = "example: python -m nanovlm train --use_preset tiny --train_dataset_path synthetic"
# Heading -> {field: what it means}; a field that is missing here stands under "more".
GROUPS: dict[str, dict[str, str]] = {
    "learning": {
        "lr_mp": "learning rate of the modality projector; 0 freezes it",
        "lr_backbones": "of encoder and language model; 0 freezes both",
        "lr_vision_backbone": "of the encoder alone",
        "lr_language_backbone": "of the language model alone",
        "freeze_vision_encoder": "the same as --lr_vision_backbone 0",
        "batch_size": "rows of a micro-batch, on each process",
        "gradient_accumulation_steps": "micro-batches of an optimizer step",
        "max_training_steps": "optimizer steps of the run",
        "warmup_ratio": "share of the steps in which learning rates rise",
        "min_lr_ratio": "share of its peak that a learning rate falls to",
        "weight_decay": "of AdamW",
        "adam_beta2": "how slowly AdamW forgets the size of gradients; 0.95 suits short runs",
        "max_grad_norm": "longest gradient; a longer one is shortened to it",
        "max_nonfinite_steps": "steps of NaN or infinity in a row that end the run",
        "seed": "of weights, data and dropout",
    },
    "data": {
        "train_dataset_path": "repository on the Hub, folder, or synthetic",
        "train_dataset_name": "subsets of it, separated by commas; or all, or shards",
        "stream_dataset": "read from the Hub as it goes",
        "task": "aokvqa-mcq makes rows of A-OKVQA multiple choice",
        "pack": "fill every row with several documents, which do not see each other",
        "val_size": "most rows that are kept for validation",
        "val_ratio": "share of the rows that is kept for validation",
        "relevance_min_rating": "leave out turns rated lower, where there are ratings",
        "image_correspondence_min_rating": "the same",
        "visual_dependency_min_rating": "the same",
        "formatting_min_rating": "the same",
        "max_sample_length": "longest row in tokens",
        "max_images_per_example": "most pictures of a row",
        "max_images_per_knapsack": "most tiles of rows packed together",
        "num_workers": "processes that read data",
    },
    "validation and checkpoints": {
        "output_dir": "folder of runs",
        "run_name": "folder of this run in it (default: model, data and time)",
        "resume": "go on with this run's last checkpoint, if it has one",
        "resume_from_vlm_checkpoint": "start a run from the weights in --vlm_checkpoint_path",
        "validation_steps": "measure the validation loss every so many steps",
        "validation_batches": "most batches of a validation, on each process",
        "eval_interval": "validate and keep the best model every so many steps",
        "eval_in_epochs": "validate during the run, not only at its end",
        "save_checkpoint_steps": "write a checkpoint every so many steps",
        "keep_checkpoints": "how many of the last ones stay, besides the best",
        "use_lmms_eval": "run lmms-eval at every --eval_interval",
        "lmms_eval_tasks": "its tasks, separated by commas",
        "lmms_eval_limit": "most samples of a task, or a share below 1",
        "lmms_eval_batch_size": "its batch size",
        "hf_repo_name": "upload the best model to this repository on the Hub at the end; off unless given",
    },
    "speed and memory": {
        "autocast": "auto is bfloat16 where the GPU has it; or bfloat16, float32",
        "compile": "compile encoder and language model; needs a C++ compiler",
        "activation_checkpointing": "activations to compute again instead of keeping them: nothing; elementwise, which "
        "costs little time; or blocks, which keeps least",
        "shard": "split weights and optimizer over the processes (FSDP2) instead of copying them (DDP)",
        "max_threads": "most CPU threads of a process",
    },
    "what is told": {
        "console_log_interval": "a line every so many steps, where there is no terminal for a bar",
        "stats_log_interval": "counts of the data every so many steps",
        "log_wandb": "log to Weights & Biases; off unless asked",
        "wandb_entity": "its user or team",
    },
}
OTHERS = (*MIXING, *SLIMMING, "max_img_size", "use_preset", "vlm_checkpoint_path", "device", "scored_scenes")
METAVARS = {"int": "N", "float": "X", "str": "TEXT", "tuple[str, ...]": "A,B"}


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("train", help="train a model", epilog=EXAMPLE)
    command.set_defaults(run=run)
    model = command.add_argument_group("model").add_argument
    model("--config", metavar="FILE", help="TOML file with any of these options; the command line wins")
    model("--use_preset", metavar="NAME", help=f"{', '.join(PRESETS)} (default: default)")
    model(
        "--vlm_checkpoint_path",
        metavar="DIR",
        help="with --resume_from_vlm_checkpoint the folder or repository to start from; without, --output_dir",
    )
    model("--device", help="auto, cpu, cuda, mps (default: auto)")
    words = "held-out drawings that a model of --train_dataset_path synthetic is asked about at the end (default: 1000)"
    model("--scored_scenes", type=int, metavar="N", help=words)
    add_model_flags(command)
    add_train_flags(command)


def add_train_flags(command: argparse.ArgumentParser, *only: str) -> None:
    """A flag for every field of TrainConfig, or of the groups of these headings; unset where it is not given."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    rest = {name: "" for name in fields if not any(name in group for group in GROUPS.values())}
    for heading, helps in {**GROUPS, "more": rest}.items():
        if only and heading not in only or not helps:
            continue
        group = command.add_argument_group(heading)
        for name, words in helps.items():
            _add_flag(group, fields[name], words)


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, words: str) -> None:
    name, kind, default = field.name, str(field.type), field.default
    shown = ",".join(default) if isinstance(default, tuple) else default
    words = words if default is None or "default:" in words else f"{words} (default: {shown})".lstrip()
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": words.replace("%", "%%")}
    if kind == "bool":
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **options)
        off = {"dest": name, "action": "store_false", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        group.add_argument(f"--no_{name}", **off)  # type: ignore[arg-type]
    else:
        group.add_argument(f"--{name}", type=_reader(kind), metavar=METAVARS[kind.partition(" | ")[0]], **options)


def _reader(kind: str) -> Callable[[str], Any]:
    """From a word on the command line to a field's value."""
    base, _, none = kind.partition(" | ")
    converters: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "tuple[str, ...]": _words}
    convert = converters[base]

    def read(text: str) -> Any:
        return None if none and text == "None" else convert(text)

    read.__name__ = base  # argparse says "invalid int value" by it
    return read


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def train_config(options: argparse.Namespace, base: dict[str, Any] | None = None) -> TrainConfig:
    """``base``, the file of --config over it, the command line over both; the preset's recipe where base is None.

    Options that are no fields are set in place. Raises ConfigError.
    """
    stored, names = {}, [f.name for f in dataclasses.fields(TrainConfig)]
    if getattr(options, "config", None):
        for name, value in read_toml(options.config).items():
            if name not in OTHERS:
                stored[name] = value
            elif getattr(options, name) is None:
                setattr(options, name, value)
    if base is None:
        base = RECIPES.get(options.use_preset, {})
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return TrainConfig.from_values({**base, **stored, **given})


def stored_config(folder: Path) -> dict[str, Any]:
    """The fields of the TrainConfig beside a checkpoint. Raises ConfigError."""
    path = folder / "train_config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def read_toml(path: str) -> dict[str, Any]:
    """A file's top level. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no TOML: {error}") from None
    tables = [name for name, value in values.items() if isinstance(value, dict)]
    if tables:
        raise ConfigError(f"--config {path} has a table [{tables[0]}]; options stand at the top, without a table")
    return values


def run(options: argparse.Namespace) -> int:
    """``nanovlm train``."""
    cfg = train_config(options)
    if cfg.resume and cfg.resume_from_vlm_checkpoint:
        raise ConfigError("--resume goes on with a run, --resume_from_vlm_checkpoint starts one: give one of both")
    if cfg.resume_from_vlm_checkpoint and not options.vlm_checkpoint_path:
        raise ConfigError("--resume_from_vlm_checkpoint: from which? Give --vlm_checkpoint_path DIR")
    if cfg.resume and cfg.run_name is None:
        raise ConfigError("--resume: which run? Give its --run_name")
    if cfg.use_lmms_eval and importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError("--use_lmms_eval: lmms-eval is not installed: pip install 'nanovlm[lmms]', or leave it out")
    if cfg.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError("--compile needs a C++ compiler, and none is on the PATH; leave it out")
    if options.vlm_checkpoint_path and not cfg.resume_from_vlm_checkpoint:
        options.output_dir = options.vlm_checkpoint_path
        cfg = dataclasses.replace(cfg, output_dir=options.vlm_checkpoint_path)
    wanted = config_of(options)
    if "RANK" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        # torchrun shows the error of the process that failed first
        return record(_run)(options, cfg, wanted) or 0
    return _run(options, cfg, wanted)


def _run(options: argparse.Namespace, cfg: TrainConfig, wanted: VLMConfig | None) -> int:
    import torch

    from nanovlm.data import build_loaders
    from nanovlm.images import get_image_processor
    from nanovlm.train import checkpoints, train
    from nanovlm.train.distributed import world

    with world(device_of(options.device or "auto")) as processes:
        if cfg.shard and processes.size == 1:
            raise ConfigError("--shard splits a model over several processes, and this is one; start it with torchrun")
        folder = processes.of_first(_run_folder(options, cfg))
        found = processes.of_first(checkpoints.checkpoints(folder))
        if found and not cfg.resume:
            raise CheckpointError(
                f"{folder} holds checkpoints up to {found[-1].name}: --resume goes on with it, another --run_name "
                f"starts anew"
            )
        start = found[-1] if found else None
        if start:  # what the flags do not say is as it was
            cfg = train_config(options, {**stored_config(start), "resume_from_vlm_checkpoint": False})
        torch.manual_seed(cfg.seed)
        model = _model(options, cfg, wanted, start)
        _set_threads(model, cfg)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.manual_seed(cfg.seed + processes.rank)  # each process drops out units of its own
        model.tokenizer  # noqa: B018  before the workers of the loaders start
        loaders = build_loaders(
            cfg, model.cfg, model.tokenizer, get_image_processor(model.cfg), processes.rank, processes.size
        )
        try:
            result = train(model, cfg, processes, folder, loaders, resume=start, benchmark=_benchmark(cfg))
        finally:
            loaders[0].close()
        if processes.first:
            print(result.run)
            if result.signal is None:
                _finish(result.run, cfg, options.scored_scenes, processes.device)
    return 0 if result.signal is None else 128 + result.signal


def _run_folder(options: argparse.Namespace, cfg: TrainConfig) -> Path:
    made = options.use_preset or "-".join(filter(None, (options.vision_encoder, options.language_model))) or "nanovlm"
    data = Path(cfg.train_dataset_path).name
    name = cfg.run_name or f"{made}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(name).name != name:
        raise ConfigError(f"run_name={name!r} is the name of a folder in --output_dir, not a path")
    return Path(cfg.output_dir, name)


def _model(
    options: argparse.Namespace, cfg: TrainConfig, wanted: VLMConfig | None, start: Path | None
) -> VisionLanguageModel:
    from nanovlm.slimming import slim
    from nanovlm.train.checkpoints import check_shape, resolve
    from nanovlm.vlm import VisionLanguageModel

    source: str | Path | None = start
    if cfg.resume_from_vlm_checkpoint:
        source = options.vlm_checkpoint_path
        source = resolve(source) if os.path.isdir(source) else source
    if source is None:
        wanted = wanted or mix().slimmed(**slimming(options))
        return VisionLanguageModel(wanted, load_backbone=wanted.vlm_load_backbone_weights)
    model = slim(VisionLanguageModel.from_pretrained(source), **slimming(options))
    if wanted is not None:
        check_shape(source, model.cfg, wanted)
    return model


def _benchmark(cfg: TrainConfig) -> Callable[[VisionLanguageModel], Mapping[str, float]] | None:
    if not cfg.use_lmms_eval:
        return None
    from nanovlm.evaluate.lmms import benchmark

    return benchmark(cfg.lmms_eval_tasks, cfg.lmms_eval_limit, cfg.lmms_eval_batch_size)


def _set_threads(model: VisionLanguageModel, cfg: TrainConfig) -> None:
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    tiny = sum(parameter.numel() for parameter in model.parameters()) < 5_000_000
    # waking a second thread costs a tiny model more than half of its work
    torch.set_num_threads(1 if tiny else min(cfg.max_threads, os.cpu_count() or 1))


def _finish(folder: Path, cfg: TrainConfig, scenes: int | None, device: torch.device) -> None:
    """Score the run's best model on held-out drawings, where it learned from drawings; upload it, where asked."""
    from nanovlm.vlm import VisionLanguageModel

    scenes = 1000 if scenes is None else scenes
    if cfg.train_dataset_path == "synthetic" and scenes:
        from nanovlm import checkpoint, exact
        from nanovlm.data.synthetic import APART, FAMILIES, HeldOut

        model = VisionLanguageModel.from_pretrained(folder).to(device).eval()
        asked = [HeldOut(scenes), HeldOut(max(len(APART), scenes // 5), APART)]
        scores = exact.score(model, [rows[number] for rows in asked for number in range(len(rows))])
        found = {family: dataclasses.asdict(each) for family, each in scores.items()}
        checkpoint.write_text(folder / "scores.json", json.dumps(found, indent=2))
        print(exact.table(scores, FAMILIES))
    if cfg.hf_repo_name:
        print(f"nanovlm: uploading {folder} to {cfg.hf_repo_name}", file=sys.stderr)
        print(VisionLanguageModel.from_pretrained(folder).push_to_hub(cfg.hf_repo_name))
