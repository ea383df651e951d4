"""Pieces that several backbones share: RMS norm, rotary positions, attention over grouped heads.

Unusual: rotary frequencies are a persistent buffer, because nanoVLM's checkpoints hold them, and stay in
float32 whatever the model is cast to; ``Linear`` multiplies bfloat16 in float32 on processors that have no
arithmetic for it.

B rows, T positions, S keys, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Without AVX-512 or the like, torch multiplies bf16 matrices element by element, 8 times slower than float32.
SLOW_BF16 = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
PIECE = 1 << 18  # weights turned into float32 at once: 1 MB, which stays in the cache until it is used


class Linear(nn.Linear):
    """nn.Linear by way of ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, and fast for several rows of bfloat16 on a CPU; sums and the result are rounded only once.

    One row is left to torch, whose product of a matrix and a vector reads each weight once as it is. So is
    training: the float32 pieces would all be kept for the backward pass.
    """
    if not (SLOW_BF16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"):
        return F.linear(x, weight, bias)
    if x.numel() == weight.shape[1] or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    x = x.float()
    y = torch.cat(
        [F.linear(x, piece.float()) for piece in weight.split(max(1, PIECE // weight.shape[1]))], dim=-1
    )
    return (y if bias is None else y + bias).bfloat16()


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation by position; both halves of a head share the frequencies.

    Source: https://arxiv.org/abs/2104.09864, in the half-split layout of Llama.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, base: float, scaling: float = 1.0) -> None:
        super().__init__()
        self.head_dim, self.base, self.scaling = head_dim, base, scaling
        self.register_buffer("inv_freq", self.computed_buffers()["inv_freq"])

    def computed_buffers(self) -> dict[str, Tensor]:
        """The buffers' values where no file has them."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return {"inv_freq": 1.0 / self.base**exponents}

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids (B, T) -> cos, sin (B, 1, T, D)."""
        # fp32: bf16 cannot tell positions apart beyond 256
        angles = position_ids[:, None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def _apply(self, fn, recurse: bool = True):
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != kept.dtype:  # model.bfloat16() casts buffers too
            self.inv_freq = kept.to(self.inv_freq.device)
        return self


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D), H a multiple of K -> (B, H, T, D).

    mask (B or 1, 1, T, S): True may be seen. None is causal, and then T is S or 1.
    """
    (B, H, T, D), K = q.shape, k.shape[1]
    if T == 1 and H != K:
        # One query a head: the heads that share keys become the queries of one head, and no key is copied.
        out = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, attn_mask=mask, dropout_p=dropout)
        return out.reshape(B, H, 1, D)
    if H != K:
        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1
    )


def causal_mask(documents: Tensor) -> Tensor:
    """documents (B, T), the number of each position's document, 0 (or False) at padding -> (B, 1, T, T).

    Each position sees its own document up to itself. Padding sees padding: a row of the softmax without any
    key would be NaN, and 0 * NaN would spread.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


class Stack(nn.Module):
    """A backbone, with ``recompute``: whether training keeps the inputs of a block alone.

    The rest is computed again in the backward pass: a third more time, for a fraction of the activations.
    """

    recompute = False

    def through(self, block: nn.Module, *inputs: Any) -> Tensor:
        """block(*inputs)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def draw_weights(module: nn.Module) -> None:
    """Initial values of one module's own parameters: normal with std 0.02, biases 0. For ``Module.apply``."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)
