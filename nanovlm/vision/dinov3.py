"""DINOv3 vision transformer.

Unusual: no position table. Patches are rotated by where their centres lie between -1 and 1 of each side, so
any rectangular grid will do and twice the pixels show the same picture finer. CLS and four register tokens
stand before the patches, are not rotated and are dropped on output. The key projection has no bias (the
softmax would cancel it). LayerScale after each branch; SwiGLU in S+, plain GELU in B and L. In training only,
positions are shifted, jittered and rescaled at random. Source: https://arxiv.org/abs/2508.10104;
parity-checked against transformers.

N pictures, P patches, R registers, T = 1 + R + P tokens, D width, H heads, C head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.checks import check_variant
from nanovlm.config import VLMConfig
from nanovlm.errors import ConfigError, ImageError
from nanovlm.layers import draw_weights, gated, gelu_of, joined, rotate, spread
from nanovlm.recompute import Stack, again
from nanovlm.weights import Rule


def patch_centres(rows: int, cols: int, device: torch.device) -> Tensor:
    """(P, 2): row and column of each patch's centre in reading order; both sides run from -1 to 1."""
    y = (torch.arange(rows, dtype=torch.float32, device=device) + 0.5) / rows
    x = (torch.arange(cols, dtype=torch.float32, device=device) + 0.5) / cols
    return 2 * torch.cartesian_prod(y, x).view(-1, 2) - 1


class PatchRotary(nn.Module):
    """Cosines and sines of each token's rotation: half of a head's pairs turn by row, half by column.

    It holds no buffer: some thousand cosines a forward cost less than state that must follow casts and loads.
    """

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        head = cfg.vit_hidden_dim // cfg.vit_n_heads
        if head % 4:
            raise ConfigError(
                f"vit_hidden_dim={cfg.vit_hidden_dim} over vit_n_heads={cfg.vit_n_heads} makes heads of "
                f"{head}; turning by rows and by columns needs a multiple of 4"
            )
        self.quarter = head // 4
        self.base, self.prefix = cfg.vit_rope_base, 1 + cfg.vit_n_registers
        self.shift, self.jitter, self.rescale = cfg.vit_rope_shift, cfg.vit_rope_jitter, cfg.vit_rope_rescale

    def forward(self, rows: int, cols: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (T, C) in the dtype and on the device of ``like``."""
        centres = patch_centres(rows, cols, like.device)
        if self.training:
            centres = self.augmented(centres)
        # fp32: bf16 cannot tell neighbouring centres of a long side apart
        turns = self.base ** -(
            torch.arange(self.quarter, dtype=torch.float32, device=like.device) / self.quarter
        )
        angles = (2 * math.pi * centres[:, :, None] * turns).flatten(1)
        angles = F.pad(torch.cat((angles, angles), dim=1), (0, 0, self.prefix, 0))  # angle 0: not turned
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def augmented(self, centres: Tensor) -> Tensor:
        """Centres moved at random, once for the whole batch; a strength of None leaves its step out."""

        def drawn(count: int, low: float, high: float) -> Tensor:
            return torch.empty(count, device=centres.device).uniform_(low, high)

        if self.shift is not None:
            centres = centres + drawn(2, -self.shift, self.shift)
        if self.jitter is not None:
            centres = centres * drawn(2, -math.log(self.jitter), math.log(self.jitter)).exp()
        if self.rescale is not None:
            centres = centres * drawn(1, -math.log(self.rescale), math.log(self.rescale)).exp()
        return centres


class PatchEmbedding(nn.Module):
    """Pixels (N, 3, H, W) -> CLS, registers and patches (N, T, D), and the grid (rows, columns)."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.patch = cfg.vit_patch_size
        self.conv = nn.Conv2d(3, cfg.vit_hidden_dim, self.patch, stride=self.patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.vit_hidden_dim))
        self.register_tokens = nn.Parameter(torch.empty(1, cfg.vit_n_registers, cfg.vit_hidden_dim))
        # for pretraining alone; kept so that a file of the Hub goes back whole
        self.register_buffer("mask_token", self.computed_buffers()["mask_token"])
        nn.init.normal_(self.cls_token, std=spread(cfg.vit_hidden_dim))
        nn.init.normal_(self.register_tokens, std=spread(cfg.vit_hidden_dim))

    def computed_buffers(self) -> dict[str, Tensor]:
        """The buffers' values where no file has them."""
        return {"mask_token": torch.zeros(1, 1, self.conv.out_channels)}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        N, _, height, width = pixel_values.shape
        if height % self.patch or width % self.patch:
            raise ImageError(
                f"a picture of {height}x{width} pixels is no whole number of patches of {self.patch}"
            )
        x = self.conv(pixel_values)
        before = torch.cat((self.cls_token, self.register_tokens), dim=1).expand(N, -1, -1)
        return torch.cat((before, x.flatten(2).transpose(1, 2)), dim=1), (x.shape[2], x.shape[3])


class Attention(nn.Module):
    """Every token sees every token; queries and keys are rotated."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = cfg.vit_n_heads, cfg.vit_dropout
        self.q_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_hidden_dim)
        self.k_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_hidden_dim, bias=False)
        self.v_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_hidden_dim)
        self.out_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_hidden_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        N, T, D = x.shape
        dropout = self.dropout if self.training else 0.0
        q, k, v = (
            p(x).view(N, T, self.n_heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = joined(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout))
        return F.dropout(self.out_proj(x), dropout)


class MLP(nn.Module):
    """down(gelu(up(x))), or SwiGLU: down(silu(gate(x)) * up(x)). All with bias."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.dropout = cfg.vit_dropout
        self.gate_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_inter_dim) if cfg.vit_gated_mlp else None
        self.up_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_inter_dim)
        self.down_proj = nn.Linear(cfg.vit_inter_dim, cfg.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            x = gelu_of(self.up_proj, x)
        else:
            up = self.up_proj(x)
            x = gated(self.gate_proj(x), up, F.silu)
        return F.dropout(self.down_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.attn = Attention(cfg)
        self.scale1 = nn.Parameter(torch.ones(cfg.vit_hidden_dim))
        self.ln2 = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.mlp = MLP(cfg)
        self.scale2 = nn.Parameter(torch.ones(cfg.vit_hidden_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.scale1 * self.attn(again(self.ln1, x), cos, sin)
        return x + self.scale2 * self.mlp(again(self.ln2, x))


class Dinov3(Stack):
    """pixel_values (N, 3, H, W), H and W multiples of the patch -> patch features (N, P, D) in reading order.

    Raises ImageError for a size that is no multiple.
    """

    PREFIXES = ("",)
    IGNORED = ()
    RULES = (
        Rule("embeddings.cls_token", "patch_embedding.cls_token"),
        Rule("embeddings.mask_token", "patch_embedding.mask_token"),
        Rule("embeddings.register_tokens", "patch_embedding.register_tokens"),
        Rule("layer.*.layer_scale1.lambda1", "blocks.*.scale1"),
        Rule("layer.*.layer_scale2.lambda1", "blocks.*.scale2"),
        Rule("layer.*.attention.k_proj.weight", "blocks.*.attn.k_proj.weight"),
        *(
            Rule(f"{hub}.{part}", f"{ours}.{part}")
            for part in ("weight", "bias")
            for hub, ours in (
                ("embeddings.patch_embeddings", "patch_embedding.conv"),
                ("layer.*.norm1", "blocks.*.ln1"),
                ("layer.*.attention.q_proj", "blocks.*.attn.q_proj"),
                ("layer.*.attention.v_proj", "blocks.*.attn.v_proj"),
                ("layer.*.attention.o_proj", "blocks.*.attn.out_proj"),
                ("layer.*.norm2", "blocks.*.ln2"),
                ("layer.*.mlp.gate_proj", "blocks.*.mlp.gate_proj"),
                ("layer.*.mlp.up_proj", "blocks.*.mlp.up_proj"),
                ("layer.*.mlp.down_proj", "blocks.*.mlp.down_proj"),
                ("norm", "layer_norm"),
            )
        ),
    )

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.dropout, self.prefix = cfg.vit_dropout, 1 + cfg.vit_n_registers
        self.patch_embedding = PatchEmbedding(cfg)
        self.rotary = PatchRotary(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.vit_n_blocks))
        self.layer_norm = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.apply(draw_weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, (rows, cols) = self.patch_embedding(pixel_values)
        x = F.dropout(x, self.dropout, self.training)
        cos, sin = self.rotary(rows, cols, x)
        for block in self.blocks:
            x = self.through(block, x, cos, sin)
        return self.layer_norm(x[:, self.prefix :])

    @staticmethod
    def hub_fields(config: Mapping[str, Any]) -> dict[str, Any]:
        """VLMConfig fields that the Hub's config.json decides; it leaves out DINOv3ViTConfig's defaults.

        Raises ConfigError for a variant that this file does not build.
        """
        gated = config.get("use_gated_mlp", False)
        if gated:
            config = {"hidden_act": "gelu", **config}  # what DINOv3's own config says of an activation left out
        check_variant("DINOv3", config, {
            "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True,
            "num_channels": 3, "hidden_act": "silu" if gated else "gelu",
        })  # fmt: skip
        return {
            "vit_hidden_dim": config.get("hidden_size", 384), "vit_cls_flag": True, "vit_gated_mlp": gated,
            "vit_inter_dim": config.get("intermediate_size", 1536),
            "vit_patch_size": config.get("patch_size", 16), "vit_img_size": config.get("image_size", 224),
            "vit_n_heads": config.get("num_attention_heads", 6),
            "vit_n_blocks": config.get("num_hidden_layers", 12),
            "vit_ln_eps": config.get("layer_norm_eps", 1e-5),
            "vit_n_registers": config.get("num_register_tokens", 0),
            "vit_rope_base": config.get("rope_theta", 100.0), "vit_rope_shift": config.get("pos_embed_shift"),
            "vit_rope_jitter": config.get("pos_embed_jitter"),
            "vit_rope_rescale": config.get("pos_embed_rescale", 2.0),
        }  # fmt: skip
