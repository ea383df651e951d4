"""Gemma 3 decoder, text only.

Unusual: five layers of six see the last ``lm_sliding_window`` positions alone and rotate by a base of their
own, every sixth sees all; heads are wider than width over heads; q and k are normed before they are rotated;
a norm stands before and after each branch, and scales by 1 + weight in float32; embeddings are multiplied by
the root of the width as they are looked up, so image features stand among scaled ones and are not scaled.
The cache keeps every position in every layer: sliding layers mask what lies behind their window, which costs
memory past 512 positions and nothing else. No buffer is held, as the Hub's files have none.
Source: https://arxiv.org/abs/2503.19786; parity-checked against transformers.

B rows, T positions, S keys, D width, H query heads, K key/value heads, C head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.cache import KVCache
from nanovlm.config import VLMConfig
from nanovlm.errors import ConfigError
from nanovlm.layers import Linear, attend, draw_weights, gated, gelu_tanh, joined, rotate
from nanovlm.recompute import Stack, again
from nanovlm.weights import ROWS, Rule

SLIDING, FULL, GELU = "sliding_attention", "full_attention", "gelu_pytorch_tanh"


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last axis, in float32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(x)


def rotary(position_ids: Tensor, cfg: VLMConfig, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """position_ids (B, T) -> cos, sin (B, 1, T, C) of the rotation by position."""
    C = cfg.lm_head_dim
    # fp32: bf16 cannot tell positions apart beyond 256
    exponents = torch.arange(0, C, 2, dtype=torch.float32, device=position_ids.device) / C
    angles = position_ids[:, None, :, None].float() * (1.0 / base**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * cfg.lm_attn_scaling).to(dtype), (angles.sin() * cfg.lm_attn_scaling).to(dtype)


def window_mask(mask: Tensor | None, window: int, T: int, S: int, device: torch.device) -> Tensor | None:
    """What a sliding layer may see: the last ``window`` of all that ``mask`` lets a position see.

    mask (B or 1, 1, T, S) or None for causal -> the same kind. A position counts itself as one of the window.
    Counting what is seen, not slots, gives a row the window it would have alone, whatever the padding, the
    packing and the cache.
    """
    if S <= window:
        return mask
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    seen = mask.cumsum(-1, dtype=torch.int32)
    return mask & (seen > seen[..., -1:] - window)


class Attention(nn.Module):
    """Attention with H query heads over K key/value heads, q and k normed over the head's width."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = cfg.lm_head_dim, cfg.lm_dropout
        # attend divides by the root of the head's width; Gemma by the root of a number of its own
        self.q_scale = (self.head_dim / cfg.lm_query_pre_attn_scalar) ** 0.5
        self.q_proj = Linear(cfg.lm_hidden_dim, cfg.lm_n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(cfg.lm_hidden_dim, cfg.lm_n_kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(cfg.lm_hidden_dim, cfg.lm_n_kv_heads * self.head_dim, bias=False)
        self.out_proj = Linear(cfg.lm_n_heads * self.head_dim, cfg.lm_hidden_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, cfg.lm_rms_eps)
        self.k_norm = RMSNorm(self.head_dim, cfg.lm_rms_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            p(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if self.q_scale != 1:
            q = q * self.q_scale
        if cache is not None:
            k, v = cache.update(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        x = joined(attend(q, k, v, mask, dropout))
        return F.dropout(self.out_proj(x), dropout)


class MLP(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.up_proj = Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.down_proj = Linear(cfg.lm_inter_dim, cfg.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), gelu_tanh))


class Block(nn.Module):
    """Both branches are normed on the way in (norm1, norm2) and on the way out (attn_norm, mlp_norm)."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.attn = Attention(cfg)
        self.attn_norm = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.norm2 = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.mlp = MLP(cfg)
        self.mlp_norm = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        x = x + self.attn_norm(self.attn(again(self.norm1, x), cos, sin, mask, cache, layer))
        return x + self.mlp_norm(self.mlp(again(self.norm2, x)))


class Gemma3(Stack):
    """``embed(ids)``, then ``forward`` to hidden states, then ``head`` to logits (..., V)."""

    PREFIXES = ("",)
    IGNORED = ("*rotary_emb*.inv_freq",)
    RULES = (
        Rule("model.embed_tokens.weight", "token_embedding.weight", ROWS),
        *(
            Rule(f"model.layers.*.{hub}.weight", f"blocks.*.{ours}.weight")
            for hub, ours in (
                ("self_attn.q_proj", "attn.q_proj"),
                ("self_attn.k_proj", "attn.k_proj"),
                ("self_attn.v_proj", "attn.v_proj"),
                ("self_attn.o_proj", "attn.out_proj"),
                ("self_attn.q_norm", "attn.q_norm"),
                ("self_attn.k_norm", "attn.k_norm"),
                ("mlp.gate_proj", "mlp.gate_proj"),
                ("mlp.up_proj", "mlp.up_proj"),
                ("mlp.down_proj", "mlp.down_proj"),
                ("input_layernorm", "norm1"),
                ("post_attention_layernorm", "attn_norm"),
                ("pre_feedforward_layernorm", "norm2"),
                ("post_feedforward_layernorm", "mlp_norm"),
            )
        ),
        Rule("model.norm.weight", "norm.weight"),
        Rule("lm_head.weight", "head.weight", ROWS),
    )

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.lm_vocab_size, cfg.lm_hidden_dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.lm_n_blocks))
        self.norm = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.head = Linear(cfg.lm_hidden_dim, cfg.lm_vocab_size, bias=False)
        if cfg.lm_tie_weights:
            self.head.weight = self.token_embedding.weight
        self.apply(draw_weights)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D), multiplied by the root of D."""
        weight = self.token_embedding.weight
        # rounded to the weights' dtype, as the model was trained: 25.25 in bf16 for the 270M's 25.298
        return self.token_embedding(ids) * torch.tensor(self.cfg.lm_hidden_dim**0.5, dtype=weight.dtype)

    def forward(
        self, embeds: Tensor, position_ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """embeds (B, T, D), position_ids (B, T) -> hidden states (B, T, D), for ``head``.

        mask (B or 1, 1, T, S), True may be seen; None is causal. With a cache, S counts its positions too;
        the caller advances it by T afterwards.
        """
        cfg, T = self.cfg, embeds.shape[1]
        S = mask.shape[-1] if mask is not None else T + (cache.length if cache is not None else 0)
        near = window_mask(mask, cfg.lm_sliding_window, T, S, embeds.device)
        full = (*rotary(position_ids, cfg, cfg.lm_re_base, embeds.dtype), mask)
        sliding = (*rotary(position_ids, cfg, cfg.lm_re_base_local, embeds.dtype), near)
        x = embeds
        for layer, block in enumerate(self.blocks):
            seen = full if is_full(layer, cfg.lm_sliding_window_pattern) else sliding
            x = self.through(block, x, *seen, cache, layer)
        return self.norm(x)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``capacity`` positions."""
        weight = self.norm.weight
        return KVCache(len(self.blocks), batch, self.cfg.lm_n_kv_heads, capacity, self.cfg.lm_head_dim,
                       dtype=weight.dtype, device=weight.device)  # fmt: skip

    @staticmethod
    def hub_fields(config: Mapping[str, Any]) -> dict[str, Any]:
        """VLMConfig fields that the Hub's config.json decides; its defaults are Gemma3TextConfig's.

        Raises ConfigError for a variant that this file does not build.
        """
        config = config.get("text_config", config)
        rope = config.get("rope_parameters") or {}  # transformers 5 keeps both bases there
        full, sliding = (rope.get(kind) or {} for kind in (FULL, SLIDING))
        blocks = config.get("num_hidden_layers", 26)
        layers = config.get("layer_types")
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
        if layers:
            pattern = layers.index(FULL) + 1 if FULL in layers else blocks + 1
        regular = [FULL if is_full(layer, pattern) else SLIDING for layer in range(blocks)]
        for name, value, built in (
            ("layer_types", layers or regular, regular),
            ("attention_bias", config.get("attention_bias", False), False),
            ("attn_logit_softcapping", config.get("attn_logit_softcapping"), None),
            ("final_logit_softcapping", config.get("final_logit_softcapping"), None),
            ("hidden_activation", config.get("hidden_activation", GELU), GELU),
            ("rope_scaling", config.get("rope_scaling"), None),
            (f"the rope_type of {FULL}", full.get("rope_type", "default"), "default"),
            (f"the rope_type of {SLIDING}", sliding.get("rope_type", "default"), "default"),
            ("use_bidirectional_attention", bool(config.get("use_bidirectional_attention")), False),
        ):
            if value != built:
                raise ConfigError(f"Gemma 3 with {name}={value!r} is not built here, only {name}={built!r}")
        return {
            "lm_hidden_dim": config.get("hidden_size", 2304),
            "lm_inter_dim": config.get("intermediate_size", 9216),
            "lm_rms_eps": config.get("rms_norm_eps", 1e-6),
            "lm_re_base": full.get("rope_theta", config.get("rope_theta", 1e6)),
            "lm_re_base_local": sliding.get("rope_theta", config.get("rope_local_base_freq", 1e4)),
            "lm_max_position_embeddings": config.get("max_position_embeddings", 131072),
            "lm_base_vocab_size": config.get("vocab_size", 262208),
            "lm_n_heads": config.get("num_attention_heads", 8),
            "lm_n_kv_heads": config.get("num_key_value_heads", 4),
            "lm_head_dim": config.get("head_dim", 256),
            "lm_n_blocks": blocks,
            "lm_sliding_window": config.get("sliding_window", 4096),
            "lm_sliding_window_pattern": pattern,
            "lm_query_pre_attn_scalar": config.get("query_pre_attn_scalar", 256),
            "lm_tie_weights": config.get("tie_word_embeddings", True),
        }


def is_full(layer: int, pattern: int) -> bool:
    """Whether a layer sees all positions: the last of every ``pattern`` does."""
    return (layer + 1) % pattern == 0
