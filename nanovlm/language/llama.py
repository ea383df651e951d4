"""Llama-style decoder, as SmolLM2 uses it.

Unusual: it takes embeddings, not ids, so that image features can stand among them; the head is tied to the
embedding in the published models; a vocabulary extended by extra tokens keeps the file's rows first.
Source: https://arxiv.org/abs/2502.02737; parity-checked against transformers.

B rows, T positions, D width, H query heads, K key/value heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.cache import KVCache
from nanovlm.config import VLMConfig
from nanovlm.layers import RMSNorm, RotaryEmbedding, attend, draw_weights, rotate
from nanovlm.weights import ROWS, Rule


class Attention(nn.Module):
    """Causal attention with H query heads over K key/value heads."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = cfg.lm_head_dim, cfg.lm_dropout
        self.q_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_n_kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(cfg.lm_n_heads * self.head_dim, cfg.lm_hidden_dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            p(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        x = attend(q, k, v, mask, dropout).transpose(1, 2).reshape(B, T, -1)
        return F.dropout(self.out_proj(x), dropout)


class MLP(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.up_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(cfg.lm_inter_dim, cfg.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.attn = Attention(cfg)
        self.norm2 = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.mlp = MLP(cfg)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """``embed(ids)``, then ``forward`` to hidden states, then ``head`` to logits (..., V)."""

    PREFIXES = ("",)
    IGNORED = ("*rotary_emb.inv_freq",)
    RULES = (
        Rule("model.embed_tokens.weight", "token_embedding.weight", ROWS),
        *(
            Rule(f"model.layers.*.{hub}.weight", f"blocks.*.{ours}.weight")
            for hub, ours in (
                ("self_attn.q_proj", "attn.q_proj"),
                ("self_attn.k_proj", "attn.k_proj"),
                ("self_attn.v_proj", "attn.v_proj"),
                ("self_attn.o_proj", "attn.out_proj"),
                ("mlp.gate_proj", "mlp.gate_proj"),
                ("mlp.up_proj", "mlp.up_proj"),
                ("mlp.down_proj", "mlp.down_proj"),
                ("input_layernorm", "norm1"),
                ("post_attention_layernorm", "norm2"),
            )
        ),
        Rule("model.norm.weight", "norm.weight"),
        Rule("lm_head.weight", "head.weight", ROWS),
    )

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.lm_vocab_size, cfg.lm_hidden_dim)
        self.rotary_embd = RotaryEmbedding(cfg.lm_head_dim, cfg.lm_re_base, cfg.lm_attn_scaling)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.lm_n_blocks))
        self.norm = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.head = nn.Linear(cfg.lm_hidden_dim, cfg.lm_vocab_size, bias=False)
        if cfg.lm_tie_weights:
            self.head.weight = self.token_embedding.weight
        self.apply(draw_weights)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D)."""
        return self.token_embedding(ids)

    def forward(
        self, embeds: Tensor, position_ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """embeds (B, T, D), position_ids (B, T) -> hidden states (B, T, D), for ``head``.

        mask (B or 1, 1, T, S), True may be seen; None is causal. With a cache, S counts its positions too;
        the caller advances it by T afterwards.
        """
        cos, sin = self.rotary_embd(position_ids, embeds.dtype)
        x = embeds
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, cache, layer)
        return self.norm(x)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``capacity`` positions."""
        weight = self.norm.weight
        return KVCache(
            len(self.blocks),
            batch,
            self.cfg.lm_n_kv_heads,
            capacity,
            self.cfg.lm_head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    @staticmethod
    def hub_fields(config: Mapping[str, Any]) -> dict[str, Any]:
        """VLMConfig fields that the Hub's config.json decides; its defaults are LlamaConfig's."""
        config = config.get("text_config", config)
        rope = config.get("rope_parameters") or {}  # transformers 5 keeps the base there
        width, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
        return {
            "lm_hidden_dim": width, "lm_head_dim": config.get("head_dim") or width // heads,
            "lm_inter_dim": config.get("intermediate_size", 11008),
            "lm_rms_eps": config.get("rms_norm_eps", 1e-6),
            "lm_re_base": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            "lm_max_position_embeddings": config.get("max_position_embeddings", 2048),
            "lm_base_vocab_size": config.get("vocab_size", 32000), "lm_n_heads": heads,
            "lm_n_kv_heads": config.get("num_key_value_heads") or heads,
            "lm_n_blocks": config.get("num_hidden_layers", 32),
            "lm_tie_weights": config.get("tie_word_embeddings", False),
        }  # fmt: skip
