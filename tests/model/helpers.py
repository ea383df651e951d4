"""Small real models and prompts for the tests of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovlm import VisionLanguageModel, VLMConfig, preset

V02_TOKENS = {"image_token": "<|image|>"}


def tiny_config(generation: str = "main", **changes) -> VLMConfig:
    """A tiny config of any generation."""
    if generation == "v0.1":
        return preset("tiny_original_small", **changes)
    if generation == "v0.2":
        tokens = {"vlm_extra_tokens": V02_TOKENS, "max_img_size": 64, "resize_to_max_side_len": False}
        return preset("tiny", **{**tokens, "lm_chat_template": "", **changes})
    return preset("tiny", **changes)


def scale(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights drawn so that activations and outputs are of order 1, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(0.1 * noise if "bias" in name else 1 + 0.1 * noise)
            elif "emb" in name or "head" in name.rpartition(".")[0].rpartition(".")[2]:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(noise / noise[0].numel() ** 0.5)
    return module.eval()


def tiny_model(generation: str = "main", seed: int = 0, **changes) -> VisionLanguageModel:
    """A tiny model whose logits are of order 1, and which never writes an image token of its own."""
    model = scale(VisionLanguageModel(tiny_config(generation, **changes), load_backbone=False), seed)
    if model.cfg.image_token_id is not None:
        with torch.no_grad():
            model.decoder.head.weight[model.cfg.image_token_id] = 0
    return model


def tiles(cfg: VLMConfig, count: int, seed: int = 0) -> Tensor:
    """(count, 3, S, S) in [0, 1]."""
    side = cfg.vit_img_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def prompt(cfg: VLMConfig, text: int, images: int = 0, seed: int = 0) -> list[int]:
    """Ids of ``images`` tiles, where the text holds them, and ``text`` random bytes."""
    words = torch.randint(3, 259, (text,), generator=torch.Generator().manual_seed(seed)).tolist()
    slots = [] if cfg.image_token_id is None else [cfg.image_token_id] * cfg.mp_image_token_length * images
    return slots + words


def pad(rows: list[list[int]], side: str = "left", fill: int = 2) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) of rows padded on one side."""
    longest = max(map(len, rows))
    gaps = [[fill] * (longest - len(row)) for row in rows]
    ids = [gap + row if side == "left" else row + gap for gap, row in zip(gaps, rows, strict=True)]
    zeros = [[0] * len(gap) for gap in gaps]
    ones = [[1] * len(row) for row in rows]
    mask = [z + o if side == "left" else o + z for z, o in zip(zeros, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)
