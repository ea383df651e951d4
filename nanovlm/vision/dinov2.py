"""DINOv2 vision transformer.

Unusual: a CLS token goes through the layers and is dropped on output; the learned position table keeps the
size it was trained at and is interpolated to each picture's own grid, so any rectangle of patches will do;
each branch is scaled by a learned vector (LayerScale) before it is added. The published patch is 14 and the
published size 518, whose 37 patches a side no pixel shuffle divides. Source:
https://arxiv.org/abs/2304.07193; parity-checked against transformers.

N pictures, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.checks import check_variant
from nanovlm.config import VLMConfig
from nanovlm.errors import ImageError
from nanovlm.layers import draw_weights, gelu_of, joined, spread
from nanovlm.recompute import Stack, again
from nanovlm.weights import CONCAT, Rule


class PatchEmbedding(nn.Module):
    """Pixels (N, 3, H, W) -> CLS and patches with their positions (N, 1 + P, D)."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.patch, self.side = cfg.vit_patch_size, cfg.vit_position_grid or cfg.vit_grid
        self.conv = nn.Conv2d(3, cfg.vit_hidden_dim, self.patch, stride=self.patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.vit_hidden_dim))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + self.side**2, cfg.vit_hidden_dim))
        # for pretraining alone; kept so that a file of the Hub goes back whole
        self.register_buffer("mask_token", self.computed_buffers()["mask_token"])
        nn.init.normal_(self.cls_token, std=spread(cfg.vit_hidden_dim))
        nn.init.normal_(self.position_embedding, std=spread(cfg.vit_hidden_dim))

    def computed_buffers(self) -> dict[str, Tensor]:
        """The buffers' values where no file has them."""
        return {"mask_token": torch.zeros(1, self.conv.out_channels)}

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ImageError(
                f"a picture of {height}x{width} pixels is no whole number of patches of {self.patch}"
            )
        x = self.conv(pixel_values)
        positions = self.positions(x.shape[2], x.shape[3])
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        return x + positions

    def positions(self, rows: int, cols: int) -> Tensor:
        """The table at a grid (1, 1 + rows * cols, D); the CLS token's own row comes first."""
        if rows == cols == self.side:
            return self.position_embedding
        cls, table = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        square = table.transpose(1, 2).unflatten(2, (self.side, self.side))
        # fp32: bicubic weights in half precision shift the table; no antialias, as the model was trained
        square = F.interpolate(square.float(), size=(rows, cols), mode="bicubic", align_corners=False)
        return torch.cat((cls, square.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


class Attention(nn.Module):
    """Every token sees every token."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = cfg.vit_n_heads, cfg.vit_dropout
        self.qkv_proj = nn.Linear(cfg.vit_hidden_dim, 3 * cfg.vit_hidden_dim)
        self.out_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        dropout = self.dropout if self.training else 0.0
        q, k, v = self.qkv_proj(x).view(N, T, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        x = joined(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout))
        return F.dropout(self.out_proj(x), dropout)


class MLP(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.dropout = cfg.vit_dropout
        self.fc1 = nn.Linear(cfg.vit_hidden_dim, cfg.vit_inter_dim)
        self.fc2 = nn.Linear(cfg.vit_inter_dim, cfg.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc2(gelu_of(self.fc1, x)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.attn = Attention(cfg)
        self.scale1 = nn.Parameter(torch.ones(cfg.vit_hidden_dim))
        self.ln2 = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.mlp = MLP(cfg)
        self.scale2 = nn.Parameter(torch.ones(cfg.vit_hidden_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attn(again(self.ln1, x))
        return x + self.scale2 * self.mlp(again(self.ln2, x))


class Dinov2(Stack):
    """pixel_values (N, 3, H, W), H and W multiples of the patch -> patch features (N, P, D) in reading order.

    Raises ImageError for a size that is no multiple.
    """

    PREFIXES = ("", "dinov2.")
    IGNORED = ("pooler.*", "classifier.*")
    RULES = (
        Rule("embeddings.cls_token", "patch_embedding.cls_token"),
        Rule("embeddings.mask_token", "patch_embedding.mask_token"),
        Rule("embeddings.position_embeddings", "patch_embedding.position_embedding"),
        Rule("embeddings.patch_embeddings.projection.weight", "patch_embedding.conv.weight"),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embedding.conv.bias"),
        Rule("encoder.layer.*.layer_scale1.lambda1", "blocks.*.scale1"),
        Rule("encoder.layer.*.layer_scale2.lambda1", "blocks.*.scale2"),
        *(
            Rule(f"{hub}.{part}", f"{ours}.{part}")
            for part in ("weight", "bias")
            for hub, ours in (
                ("encoder.layer.*.norm1", "blocks.*.ln1"),
                ("encoder.layer.*.attention.output.dense", "blocks.*.attn.out_proj"),
                ("encoder.layer.*.norm2", "blocks.*.ln2"),
                ("encoder.layer.*.mlp.fc1", "blocks.*.mlp.fc1"),
                ("encoder.layer.*.mlp.fc2", "blocks.*.mlp.fc2"),
                ("layernorm", "layer_norm"),
            )
        ),
        *(
            Rule(
                tuple(f"encoder.layer.*.attention.attention.{x}.{part}" for x in ("query", "key", "value")),
                f"blocks.*.attn.qkv_proj.{part}",
                CONCAT,
            )  # fmt: skip
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
        return self.layer_norm(x[:, 1:])

    @staticmethod
    def hub_fields(config: Mapping[str, Any]) -> dict[str, Any]:
        """VLMConfig fields that the Hub's config.json decides; what it leaves out is Dinov2Config's default.

        Raises ConfigError for a variant that this file does not build.
        """
        variant = {"use_swiglu_ffn": False, "qkv_bias": True, "hidden_act": "gelu", "num_channels": 3}
        check_variant("DINOv2", config, variant)
        width, patch = config.get("hidden_size", 768), config.get("patch_size", 14)
        image = config.get("image_size", 224)
        return {
            "vit_hidden_dim": width, "vit_inter_dim": int(width * config.get("mlp_ratio", 4)),
            "vit_patch_size": patch, "vit_img_size": image, "vit_position_grid": image // patch,
            "vit_n_heads": config.get("num_attention_heads", 12), "vit_cls_flag": True,
            "vit_n_blocks": config.get("num_hidden_layers", 12),
            "vit_ln_eps": config.get("layer_norm_eps", 1e-6),
        }  # fmt: skip
