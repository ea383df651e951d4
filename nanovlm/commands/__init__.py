"""The commands of ``nanovlm``, a file each: ``add`` describes the arguments, ``run`` does the work.

Unusual: a command imports torch inside ``run``, after the arguments are known to be good, so a mistake is
told at once. What several commands share stands here.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nanovlm.errors import ConfigError
from nanovlm.presets import DINOV3, LANGUAGE, VISION, mix, preset

if TYPE_CHECKING:
    import torch

    from nanovlm.config import VLMConfig

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
