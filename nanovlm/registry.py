"""Names of backbones, and where their code is. Nothing is imported until a name is asked for.

What a backbone's class offers:

- ``Class(cfg)``: a module with upstream nanoVLM's parameter names.
- ``RULES, PREFIXES, IGNORED``: how its weights are called on the Hub (see weights.py).
- ``hub_fields(config)``: the VLMConfig fields that the Hub's config.json decides.
- a vision encoder: ``forward(pixel_values (N, 3, H, W)) -> (N, P, D)``, patches only, in reading order; and, where
  weights depend on the size of tiles, ``resize_positions(grid)``, patches a side.
- a language model: ``embed(ids)``, ``forward(embeds, position_ids, mask, cache) -> hidden``, ``head``,
  ``new_cache(batch, length)``.

A kind of checkpoint offers ``RULES, IGNORED`` of the whole model and ``config(json, source, revision)``;
a tiling ``of(cfg)``, a function as ``get_image_processor`` returns, and ``image_string``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from nanovlm.errors import UnknownBackbone

VISION_ENCODERS = {
    "siglip": "nanovlm.vision.siglip:Siglip",
    "dinov2": "nanovlm.vision.dinov2:Dinov2",
    "dinov3": "nanovlm.vision.dinov3:Dinov3",
}
# What a config must know of an encoder without importing it: does it have a CLS token, and does it take
# rectangles of any size?
WITH_CLS = frozenset({"dinov2", "dinov3"})
ANY_GRID = frozenset({"dinov2", "dinov3"})
LANGUAGE_MODELS = {
    "smollm": "nanovlm.language.llama:Llama",
    "gemma": "nanovlm.language.gemma3:Gemma3",
}
# Checkpoints other than nanoVLM's own, by the model_type in their config.json.
CHECKPOINTS = {
    "idefics3": "nanovlm.granite_docling:Idefics3",
    "smolvlm": "nanovlm.granite_docling:Idefics3",
}
# Ways to cut a picture and to write it down other than nanoVLM's own, by an extra token that only they have.
TILINGS = {"fake_image_token": "nanovlm.granite_docling:SplitPicture"}
ALIASES = {
    "siglip2": "siglip", "llama": "smollm", "smollm2": "smollm", "gemma3": "gemma",
    # names of the same weights outside the Hub
    "facebook/dinov2-vits14": "facebook/dinov2-small",
    "facebook/dinov2-vitb14": "facebook/dinov2-base",
}  # fmt: skip
# Documents name these, but nobody published them; what is meant instead.
UNPUBLISHED = {
    "vitl14": "vitl16",
    "facebook/dinov3-vitl14-pretrain-lvd1689m": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}


def vision_encoder(name: str) -> type[Any]:
    """The class of a vision encoder. Raises UnknownBackbone."""
    return _load("vision encoder", name, VISION_ENCODERS)


def language_model(name: str) -> type[Any]:
    """The class of a language model. Raises UnknownBackbone."""
    return _load("language model", name, LANGUAGE_MODELS)


def checkpoint(config: object) -> type[Any] | None:
    """The kind of checkpoint that a config.json is of; None for nanoVLM's own, and for an unknown one."""
    where = CHECKPOINTS.get(str(config.get("model_type"))) if isinstance(config, Mapping) else None
    return None if where is None else _imported(where)


def tiling(extra_tokens: Mapping[str, str]) -> type[Any] | None:
    """The tiling that a model with these extra tokens was taught; None for nanoVLM's own."""
    return next((_imported(where) for token, where in TILINGS.items() if token in extra_tokens), None)


def canonical(name: str) -> str:
    """``name`` with an alias replaced by what it stands for; warns of a name that was never published."""
    if name in UNPUBLISHED:
        meant = UNPUBLISHED[name]
        warnings.warn(f"there is no {name}: DINOv3's ViT-L has patches of 16; using {meant}", stacklevel=2)
        return meant
    return ALIASES.get(name, name)


def _load(kind: str, name: str, table: dict[str, str]) -> type[Any]:
    where = table.get(canonical(name))
    if where is None:
        aliases = [alias for alias, meant in ALIASES.items() if meant in table]
        raise UnknownBackbone(f"no {kind} {name!r}; there are: {', '.join([*table, *aliases])}")
    return _imported(where)


def _imported(where: str) -> type[Any]:
    module, _, attribute = where.partition(":")
    return getattr(import_module(module), attribute)
