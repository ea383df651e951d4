"""The commands of ``nanovlm``, a file each: ``add`` describes the arguments, ``run`` does the work.

Unusual: a command imports torch inside ``run``, after the arguments are known to be good, so a mistake is
told at once. What several commands share stands here.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nanovlm.checks import POOL_AT, POOLINGS
from nanovlm.errors import ConfigError
from nanovlm.presets import DINOV3, LANGUAGE, VISION, mix, preset

if TYPE_CHECKING:
    import torch

    from nanovlm.config import VLMConfig

SLIMMING = ("resolution", "pool", "pool_factor", "keep_ratio", "pool_at")  # VLMConfig.slimmed's
MIXING = ("vision_encoder", "dinov3_model", "language_model", "vit_model_type", "lm_model_type")


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """Options that put a model together, for ``config_of``."""
    add = command.add_argument_group("a model of one's own, or a change to a preset").add_argument
    add("--vision_encoder", metavar="NAME", help=", ".join(VISION))
    add("--dinov3_model", metavar="SIZE", help=f"of dinov3: {', '.join(DINOV3)}")
    add("--language_model", metavar="NAME", help=", ".join(LANGUAGE))
    add("--vit_model_type", metavar="SOURCE", help="folder or repository whose config.json sizes the encoder")
    add("--lm_model_type", metavar="SOURCE", help="the same of the language model; its tokenizer comes along")
    add("--max_img_size", type=int, metavar="N", help="longest side in pixels; DINO pictures keep shape")
    add_slim_flags(command)


def add_slim_flags(command: argparse.ArgumentParser) -> None:
    """Options that make any model cheaper, a checkpoint's, too; for ``slimming``."""
    add = command.add_argument_group("a cheaper model, also of a checkpoint").add_argument
    add("--resolution", type=int, metavar="N", help="pixels a side of a tile; positions are interpolated")
    add("--pool", "--pool-method", choices=tuple(POOLINGS), help="how image tokens become fewer")
    add("--pool-factor", "--pool_factor", type=int, metavar="N", help="N x N tokens become one: 2 or 4 (default: 2)")
    add("--keep-ratio", "--keep_ratio", type=float, metavar="R", help="share that drop_norm keeps (default: 0.5)")
    add("--pool-at", "--pool_at", choices=POOL_AT, help="in front of the projector (default), or behind it")


def slimming(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments for ``VLMConfig.slimmed`` and ``slimming.slim``: what the options say, and nothing else."""
    return {name: getattr(options, name) for name in SLIMMING if getattr(options, name) is not None}


def config_of(options: argparse.Namespace) -> VLMConfig | None:
    """The config that a preset or the options of ``add_model_flags`` describe; None without either."""
    mixed = {name: getattr(options, name) for name in MIXING if getattr(options, name) is not None}
    changes = {} if options.max_img_size is None else {"max_img_size": options.max_img_size}
    if options.use_preset and mixed:
        first = next(iter(mixed))
        raise ConfigError(f"--{first} puts a model together, --use_preset names one: give one of both")
    if options.use_preset:
        return preset(options.use_preset, **changes).slimmed(**slimming(options))
    if not mixed:
        return None
    if "lm_model_type" in mixed:
        changes["lm_tokenizer"] = mixed["lm_model_type"]
    cfg = mix(**mixed, **changes)
    sources = [name for name in ("vit_model_type", "lm_model_type") if name in mixed]
    if sources:
        from nanovlm.vlm import with_hub_sizes

        cfg = with_hub_sizes(cfg, *sources)
    return cfg.slimmed(**slimming(options))


def device_of(name: str) -> torch.device:
    """The device that ``--device`` names. Raises ConfigError if it cannot be used here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
