"""SigLIP and SigLIP 2 vision transformer (fixed resolution).

Unusual: no CLS token, positions are learned and added once, GELU in its tanh form, q, k and v in one
projection with bias. The attention-pooling head of the published models is not used. Source:
https://arxiv.org/abs/2303.15343, https://arxiv.org/abs/2502.14786; parity-checked against transformers.

N pictures, P patches, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, empty, nn

from nanovlm.checks import check_variant
from nanovlm.config import VLMConfig
from nanovlm.errors import ImageError, WeightsError
from nanovlm.layers import draw_weights, gelu_of, gelu_tanh, joined, spread
from nanovlm.recompute import Stack, again
from nanovlm.weights import CONCAT, Join, Rule


def _resized_positions(parts: list[Tensor], ours: Tensor) -> Tensor:
    """A table (P, D) of the file -> (1, P', D), interpolated over its square where the sizes differ."""
    return _interpolated(parts[0], ours.shape[1])


def _interpolated(table: Tensor, wanted: int) -> Tensor:
    """A table (P, D) of a square of patches -> (1, wanted, D) of another square."""
    side, target = int(table.shape[0] ** 0.5), int(wanted**0.5)
    if side == target:
        return table[None]
    if side * side != table.shape[0]:
        raise WeightsError(
            f"a position table of {table.shape[0]} rows is no square and cannot be interpolated to {wanted}"
        )
    square = table.float().T.reshape(1, -1, side, side)
    square = F.interpolate(square, size=(target, target), mode="bicubic", align_corners=False)
    return square.flatten(2).transpose(1, 2).to(table.dtype)


POSITIONS = Join(_resized_positions, lambda ours, count: [ours[0]])


class PatchEmbedding(nn.Module):
    """Pixels (N, 3, S, S) -> patches with their positions (N, P, D)."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, cfg.vit_hidden_dim, cfg.vit_patch_size, stride=cfg.vit_patch_size)
        self.position_embedding = nn.Parameter(empty(1, cfg.vit_grid**2, cfg.vit_hidden_dim))
        nn.init.normal_(self.position_embedding, std=spread(cfg.vit_hidden_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        positions = self.position_embedding.shape[1]
        side = math.isqrt(positions) * self.conv.stride[0]
        if pixel_values.shape[-2:] != (side, side):
            height, width = pixel_values.shape[-2:]
            raise ImageError(
                f"a picture of {height}x{width} pixels, but this encoder has positions for {side}x{side}: "
                "resize the picture, or load the model for another vit_img_size"
            )
        return self.conv(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding


class Attention(nn.Module):
    """Every patch sees every patch."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = cfg.vit_n_heads, cfg.vit_dropout
        self.qkv_proj = nn.Linear(cfg.vit_hidden_dim, 3 * cfg.vit_hidden_dim)
        self.out_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        N, P, D = x.shape
        dropout = self.dropout if self.training else 0.0
        q, k, v = self.qkv_proj(x).view(N, P, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        x = joined(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout))
        return F.dropout(self.out_proj(x), dropout)


class MLP(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.dropout = cfg.vit_dropout
        self.fc1 = nn.Linear(cfg.vit_hidden_dim, cfg.vit_inter_dim)
        self.fc2 = nn.Linear(cfg.vit_inter_dim, cfg.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(gelu_of(self.fc1, x, gelu_tanh))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.attn = Attention(cfg)
        self.ln2 = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(again(self.ln1, x))
        return x + self.mlp(again(self.ln2, x))


class Siglip(Stack):
    """pixel_values (N, 3, S, S), scaled as the preset says -> patch features (N, P, D)."""

    PREFIXES = ("vision_model.", "")  # the Hub's file, and transformers 5's SiglipVisionModel
    IGNORED = (
        "text_model.*",
        "logit_scale",
        "logit_bias",
        "vision_model.head.*",
        "head.*",
        "*embeddings.position_ids",
    )
    RULES = (
        Rule("embeddings.patch_embedding.weight", "patch_embedding.conv.weight"),
        Rule("embeddings.patch_embedding.bias", "patch_embedding.conv.bias"),
        Rule("embeddings.position_embedding.weight", "patch_embedding.position_embedding", POSITIONS),
        *(
            Rule(f"{hub}.{part}", f"{ours}.{part}")
            for part in ("weight", "bias")
            for hub, ours in (
                ("encoder.layers.*.layer_norm1", "blocks.*.ln1"),
                ("encoder.layers.*.self_attn.out_proj", "blocks.*.attn.out_proj"),
                ("encoder.layers.*.layer_norm2", "blocks.*.ln2"),
                ("encoder.layers.*.mlp.fc1", "blocks.*.mlp.fc1"),
                ("encoder.layers.*.mlp.fc2", "blocks.*.mlp.fc2"),
                ("post_layernorm", "layer_norm"),
            )
        ),
        *(
            Rule(
                tuple(f"encoder.layers.*.self_attn.{x}_proj.{part}" for x in "qkv"),
                f"blocks.*.attn.qkv_proj.{part}",
                CONCAT,
            )
            for part in ("weight", "bias")
        ),
    )

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.dropout = cfg.vit_dropout
        self.patch_embedding = PatchEmbedding(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.vit_n_blocks))
        self.layer_norm = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.apply(draw_weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.dropout(self.patch_embedding(pixel_values), self.dropout, self.training)
        for block in self.blocks:
            x = self.through(block, x)
        return self.layer_norm(x)

    @torch.no_grad()
    def resize_positions(self, grid: int) -> None:
        """Interpolate the position table to ``grid`` patches a side, as loading does for another vit_img_size."""
        table = self.patch_embedding.position_embedding
        resized = _interpolated(table[0], grid * grid)
        self.patch_embedding.position_embedding = nn.Parameter(resized, requires_grad=table.requires_grad)

    @staticmethod
    def hub_fields(config: Mapping[str, Any]) -> dict[str, Any]:
        """VLMConfig fields that the Hub's config.json decides; sizes it leaves out are SigLIP-B/16's.

        Raises ConfigError for a variant that this file does not build.
        """
        config = config.get("vision_config", config)
        check_variant("SigLIP", config, {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3})
        return {
            "vit_hidden_dim": config.get("hidden_size", 768),
            "vit_inter_dim": config.get("intermediate_size", 3072),
            "vit_patch_size": config.get("patch_size", 16), "vit_img_size": config.get("image_size", 224),
            "vit_n_heads": config.get("num_attention_heads", 12),
            "vit_n_blocks": config.get("num_hidden_layers", 12),
            "vit_ln_eps": config.get("layer_norm_eps", 1e-6),
        }  # fmt: skip
