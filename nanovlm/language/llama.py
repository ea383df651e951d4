"""Llama-style decoder, as SmolLM2 uses it.

Unusual: it takes embeddings, not ids, so that image features can stand among them; the head is tied to the
embedding in the published models; a vocabulary extended by extra tokens keeps the file's rows first. A block
is written twice: as modules, and as the function ``layer_step`` for one token behind a cache, where calling
modules costs a small model more than its attention does. It is also what ``compile_step`` compiles.
Source: https://arxiv.org/abs/2502.02737; parity-checked against transformers.

B rows, T positions, D width, H query heads, K key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.cache import KVCache
from nanovlm.checks import check_variant
from nanovlm.config import VLMConfig
from nanovlm.layers import (
    PACKS,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    attend,
    draw_weights,
    gated,
    joined,
    linear,
    packed,
)
from nanovlm.recompute import Stack, again
from nanovlm.weights import ROWS, Rule


class Attention(nn.Module):
    """Causal attention with H query heads over K key/value heads."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = cfg.lm_n_heads, cfg.lm_n_kv_heads, cfg.lm_head_dim
        self.dropout = cfg.lm_dropout
        self.q_proj = Linear(cfg.lm_hidden_dim, cfg.lm_n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(cfg.lm_hidden_dim, cfg.lm_n_kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(cfg.lm_hidden_dim, cfg.lm_n_kv_heads * self.head_dim, bias=False)
        self.out_proj = Linear(cfg.lm_n_heads * self.head_dim, cfg.lm_hidden_dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.n_heads, self.n_kv_heads, self.head_dim
        # q and k are turned as one tensor: a token costs a small model as much in calls as in arithmetic
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1).view(B, T, H + K, D).transpose(1, 2)
        q, k = (qk * cos + qk.roll(D // 2, -1) * sin).split((H, K), dim=1)
        v = self.v_proj(x).view(B, T, K, D).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        x = self.out_proj(joined(attend(q, k, v, mask, dropout)))
        return F.dropout(x, dropout) if dropout else x


class MLP(nn.Module):
    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.up_proj = Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.down_proj = Linear(cfg.lm_inter_dim, cfg.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), F.silu))


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
        x = x + self.attn(again(self.norm1, x), cos, sin, mask, cache, layer)
        return x + self.mlp(again(self.norm2, x))


PLAIN = (nn.ModuleList, Block, Attention, MLP, RMSNorm, Linear)


class Weights(NamedTuple):
    """What ``layer_step`` takes of a layer; qkv and gate_up are several matrices, or one of all their rows."""

    norm1: Tensor
    qkv: tuple[Tensor, ...]
    out: Tensor
    norm2: Tensor
    gate_up: tuple[Tensor, ...]
    down: Tensor

    def packed(self) -> Weights:
        """Copies of the matrices for ``product``, joined where they multiply the same."""
        qkv, gate_up = (packed(torch.cat(several)) for several in (self.qkv, self.gate_up))
        return Weights(self.norm1, (qkv,), packed(self.out), self.norm2, (gate_up,), packed(self.down))


def layer_weights(blocks: Any) -> list[Weights] | None:
    """The Weights of every layer; None where a module was replaced or is hooked."""
    if any(type(m) not in PLAIN or m._forward_hooks or m._forward_pre_hooks for m in blocks.modules()):
        return None
    return [
        Weights(
            block.norm1.weight,
            tuple(p.weight for p in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)),
            block.attn.out_proj.weight,
            block.norm2.weight,
            (block.mlp.gate_proj.weight, block.mlp.up_proj.weight),
            block.mlp.down_proj.weight,
        )
        for block in blocks
    ]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, D), weight (O, D) -> (B, O)."""
    if len(x) == 1 and x.device.type == "cpu" and torch.compiler.is_compiling():
        # the loop that the compiler makes of this reads weights faster than a BLAS's matrix times vector
        return (x.float()[:, None] * weight.float()).sum(-1).to(x.dtype)
    return linear(x, weight)


def products(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """x (B, D) by several matrices, their outputs side by side."""
    return product(x, weights[0]) if len(weights) == 1 else torch.cat([product(x, w) for w in weights], dim=-1)


def layer_step(
    x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, at: Tensor, eps: float,
    weights: Weights,
) -> Tensor:  # fmt: skip
    """Block.forward of one token a row: x (B, D), cos and sin (B, 1, C) -> (B, D).

    Its key and value go into keys and values (B, K, S, C) at position ``at`` (1,); mask (B or 1, 1, 1, S).
    """
    B, (K, C) = len(x), (keys.shape[1], keys.shape[3])
    y = F.rms_norm(x, weights.norm1.shape, weights.norm1, eps)
    qk, v = products(y, weights.qkv).view(B, -1, C).tensor_split((-K,), dim=1)
    qk = qk * cos + qk.roll(C // 2, -1) * sin
    keys.index_copy_(2, at, qk[:, -K:, None])
    values.index_copy_(2, at, v[:, :, None])
    x = x + product(attend(qk[:, :-K, None], keys, values, mask).reshape(B, -1), weights.out)
    y = F.rms_norm(x, weights.norm2.shape, weights.norm2, eps)
    gate, up = products(y, weights.gate_up).chunk(2, dim=-1)
    return x + product(F.silu(gate) * up, weights.down)


PACKING_PAYS = 10  # tokens: what packed weights save in so many is most of what packing takes


class Cache(KVCache):
    """It keeps the layers' weights at hand, too: to look them up again at every token takes a while.

    On a CPU, weights in bfloat16 are packed once an answer has some length. A cache lives as long as its answer, so
    no packed weight outlives a change of the model's.
    """

    weights: list[Weights] | None = None
    steps = 0

    def step(self) -> list[Weights]:
        """The weights for the next token; the matrices are packed when as many tokens are written as that takes."""
        weights = self.weights or []
        if self.steps == PACKING_PAYS and self.capacity - self.length >= PACKING_PAYS:
            first = weights[0].norm1
            if first.dtype == torch.bfloat16 and first.device.type == "cpu" and PACKS:
                weights = self.weights = [layer.packed() for layer in weights]
        self.steps += 1
        return weights


class Llama(Stack):
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
        self.head = Linear(cfg.lm_hidden_dim, cfg.lm_vocab_size, bias=False)
        if cfg.lm_tie_weights:
            self.head.weight = self.token_embedding.weight
        self.apply(draw_weights)
        self.compiled_step: Callable[..., Tensor] | None = None

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
        low, high = sin.chunk(2, dim=-1)
        sin = torch.cat((-low, high), dim=-1)  # rotate's minus sign, taken once for all layers
        if embeds.shape[1] == 1 and isinstance(cache, Cache) and cache.weights and not torch.is_grad_enabled():
            return self._step(embeds, cos, sin, mask, cache, cache.weights)
        x = embeds
        for layer, block in enumerate(self.blocks):
            x = self.through(block, x, cos, sin, mask, cache, layer)
        return self.norm(x)

    def _step(
        self, embeds: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache, weights: list[Weights]
    ) -> Tensor:
        """``forward`` of one token a row."""
        x, cos, sin, end = embeds[:, 0], cos[:, 0], sin[:, 0], cache.length + 1
        at = torch.tensor([cache.length], device=x.device)
        layers: Iterable[tuple[Tensor, Tensor]] = cache.layers
        compiled = self.compiled_step if len(x) == 1 or x.device.type != "cpu" else None  # several rows gain nothing
        if compiled is None:
            weights = cache.step()
            step, layers = layer_step, ((k.narrow(2, 0, end), v.narrow(2, 0, end)) for k, v in layers)
        else:
            # the whole cache, whose shape never changes, and a mask over what is in use
            step, seen = compiled, torch.arange(cache.capacity, device=x.device) < end
            mask = seen[None, None, None] if mask is None else F.pad(mask, (0, cache.capacity - end))
        for (keys, values), tensors in zip(layers, weights, strict=True):
            x = step(x, cos, sin, mask, keys, values, at, self.cfg.lm_rms_eps, tensors)
        return self.norm(x)[:, None]

    def compile_step(self) -> None:
        """Compile what one token goes through; the first one then takes half a minute. On a CPU, of one row alone.

        Each batch size and each 256 positions of cache compile anew, a token or a layer does not.
        """
        self.compiled_step = torch.compile(layer_step, dynamic=False, fullgraph=True)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of at least ``capacity`` positions."""
        weight = self.norm.weight
        if self.compiled_step is not None and (batch == 1 or weight.device.type != "cpu"):
            capacity = -(-capacity // 256) * 256
        cache = Cache(
            len(self.blocks),
            batch,
            self.cfg.lm_n_kv_heads,
            capacity,
            self.cfg.lm_head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
        if not (self.training and self.cfg.lm_dropout):
            cache.weights = layer_weights(self.blocks)
        return cache

    @staticmethod
    def hub_fields(config: Mapping[str, Any]) -> dict[str, Any]:
        """VLMConfig fields that the Hub's config.json decides; its defaults are LlamaConfig's.

        Raises ConfigError for a variant that this file does not build.
        """
        config = config.get("text_config", config)
        rope = config.get("rope_parameters") or {}  # transformers 5 keeps the base there
        check_variant("Llama", config, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
        for scaling in (rope, config.get("rope_scaling") or {}):
            check_variant("Llama", scaling, {"rope_type": "default", "type": "default"})
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
