"""Pieces that several backbones share: RMS norm, rotary positions, attention over grouped heads.

Unusual: rotary frequencies are a persistent buffer, because nanoVLM's checkpoints hold them, and stay in
float32 whatever the model is cast to; ``Linear`` multiplies bfloat16 in float32 on processors that have no
arithmetic for it.

B rows, T positions, S keys, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.recompute import LINEAR, again, plain_linear

# Without AVX-512 or the like, torch multiplies bf16 matrices element by element, 8 times slower than float32.
SLOW_BF16 = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
PACKS = torch.backends.mkldnn.is_available() and not SLOW_BF16
FEW = 8
MKL = torch.backends.mkl.is_available()
PIECE = 1 << 18  # weights turned into float32 at once: 1 MB, which stays in the cache until it is used


class Linear(nn.Linear):
    """nn.Linear by way of ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


LINEAR.append(Linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, and fast on a CPU for a few rows of float32 and, where it is slow there, several of bfloat16.

    Sums and the result are rounded only once. Training is left to torch: the float32 pieces would all be kept
    for the backward pass.
    """
    few = x.dtype == torch.float32 and x.numel() <= FEW * weight.shape[1]
    if few and bias is None and not torch.is_grad_enabled():
        return few_rows(x, weight)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if not (SLOW_BF16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"):
        return F.linear(x, weight, bias)
    if x.numel() == weight.shape[1] or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    x = x.float()
    y = torch.cat(
        [F.linear(x, piece.float()) for piece in weight.split(max(1, PIECE // weight.shape[1]))], dim=-1
    )
    return (y if bias is None else y + bias).bfloat16()


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., D), few rows, @ weight (O, D).T as a batch of products with a part of the weights each, one a thread.

    For a row or a few, MKL reads memory at a third of its speed on AMD's processors; its batched product of the
    same numbers reads at all of it (docs/performance.md). Other libraries have no such batch.
    """
    out, width = weight.shape
    if not (MKL and x.device.type == "cpu" and weight.is_contiguous()) or torch.compiler.is_compiling():
        return F.linear(x, weight)
    if out < width < x.numel():  # measured: long sums of several rows gain nothing
        return F.linear(x, weight)
    parts = math.gcd(out, torch.get_num_threads())
    y = torch.bmm(weight.view(parts, -1, width), x.reshape(-1, width).T.expand(parts, -1, -1))
    return y.flatten(0, 1).T.reshape(*x.shape[:-1], out)


def packed(weight: Tensor) -> Tensor:
    """A copy of a bfloat16 weight in the order in which the CPU's product reads it, for ``linear``. Needs PACKS."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


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
        k, v = again(torch.repeat_interleave, k, H // K, 1), again(torch.repeat_interleave, v, H // K, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1
    )


def gelu_of(module: nn.Linear, x: Tensor, activation: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    """activation(module(x)), F.gelu or gelu_tanh. In bfloat16 on a CPU one operator does both, and rounds once."""
    if (
        not PACKS or not plain_linear(module) or torch.is_grad_enabled() or torch.compiler.is_compiling()
        or not x.dtype == module.weight.dtype == torch.bfloat16 or {x.device.type, module.weight.device.type} != {"cpu"}
    ):  # fmt: skip
        return again(activation, module(x))
    form = "tanh" if activation is gelu_tanh else "none"
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "gelu", [], form)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def joined(heads: Tensor) -> Tensor:
    """Attention's output (B, H, T, D) -> (B, T, H * D), for the product behind it."""
    return again(_joined, heads)


def _joined(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def gated(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up, for the product behind it."""
    return again(torch.mul, again(activation, gate), up)


def causal_mask(documents: Tensor) -> Tensor:
    """documents (B, T), the number of each position's document, 0 (or False) at padding -> (B, 1, T, T).

    Each position sees its own document up to itself. Padding sees padding: a row of the softmax without any
    key would be NaN, and 0 * NaN would spread.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def spread(inputs: int) -> float:
    """Std of initial values: upstream's 0.02, or what keeps a signal's size where its inputs are few.

    With 0.02 a model 64 wide answers every picture alike for hundreds of steps before it begins to look.
    """
    return max(0.02, inputs**-0.5)


def draw_weights(module: nn.Module) -> None:
    """Initial values of one module's own parameters: normal, biases 0. For ``Module.apply``."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        inputs = module.embedding_dim if isinstance(module, nn.Embedding) else module.weight[0].numel()
        nn.init.normal_(module.weight, std=spread(inputs))
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)
