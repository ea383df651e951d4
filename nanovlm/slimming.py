"""A loaded model made cheaper: smaller tiles and fewer image tokens.

Unusual: nothing is copied. The model itself is changed and handed back; weights that do not depend on the size
stay the very same tensors, and only the position table of a SigLIP is made anew, by interpolation.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from nanovlm.projector import ModalityProjector
from nanovlm.vlm import VisionLanguageModel


def slim(
    model: VisionLanguageModel,
    resolution: int | None = None,
    pool: str | None = None,
    pool_factor: int | None = None,
    keep_ratio: float | None = None,
    pool_at: str | None = None,
) -> VisionLanguageModel:
    """``model`` itself, for tiles of ``resolution`` pixels and with fewer image tokens; None changes nothing.

    The arguments are ``VLMConfig.slimmed``'s. Raises ConfigError before anything is changed.
    """
    cfg = model.cfg.slimmed(resolution, pool, pool_factor, keep_ratio, pool_at)
    if cfg == model.cfg:
        return model
    resize = getattr(model.vision_encoder, "resize_positions", None)
    if resize is not None and cfg.vit_grid != model.cfg.vit_grid:
        resize(cfg.vit_grid)
    if cfg.pool != model.cfg.pool:
        weight = model.MP.proj.weight
        with torch.random.fork_rng(devices=()):  # what is drawn for the linear layer is thrown away
            projector = ModalityProjector(cfg)
        projector.proj = model.MP.proj
        model.MP = projector.to(weight.device, weight.dtype).train(model.MP.training)
    model.cfg = cfg
    return model


class VLMWithTokenPooling(VisionLanguageModel):
    """A VisionLanguageModel whose ``from_pretrained`` pools what it loads, as nanoVLM-Lite calls it."""

    @classmethod
    def from_pretrained(
        cls,
        repo_id_or_path: str | os.PathLike,
        pool_method: str | None = None,
        pool_factor: int | None = None,
        keep_ratio: float | None = None,
        *,
        pool_at: str | None = None,
        resolution: int | None = None,
        **options: Any,
    ) -> VLMWithTokenPooling:
        """The model of a folder or repository, pooled; a checkpoint that is pooled needs no word of it.

        options: VisionLanguageModel.from_pretrained's. Raises its errors, and ConfigError.
        """
        model: Any = super().from_pretrained(repo_id_or_path, **options)
        return slim(model, resolution, pool_method, pool_factor, keep_ratio, pool_at)  # type: ignore[return-value]
