"""What a CUDA device would run where tensors are on torch's meta device, which has shapes and no values.

Unusual: only the choice of the fused kernels is made here, because torch makes it by device: attention without
a mask is the flash kernel, with one the memory-efficient one (cuDNN's, which newer versions prefer, keeps the same
tensors), and RMS norm is one kernel. Everything else is the same operator on every device.
Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class CudaKernels(TorchFunctionMode):
    """Calls of fused functions on meta tensors go to the operators that CUDA would run."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return fused(func, args, dict(kwargs or {}))


def fused(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), by the kernel of a CUDA device where the first argument is on meta."""
    ours = FUSED.get(getattr(func, "__name__", ""))
    if ours is not None and args and isinstance(args[0], Tensor) and args[0].device.type == "meta":
        return ours(*args, **kwargs)
    return func(*args, **kwargs)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention: query (B, H, T, D), key and value (B, H, S, D)."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = attn_mask
    if bias.dtype == torch.bool:  # becomes 0 and -inf in the query's dtype
        bias = torch.zeros_like(bias, dtype=query.dtype, device="meta")
    spare = -bias.shape[-1] % 8  # rows of the bias are padded to 16 bytes
    if spare:
        bias = torch.nn.functional.pad(bias, (0, spare))[..., : bias.shape[-1]]
    bias = bias.to("meta").expand(*query.shape[:3], key.shape[2])
    keep = torch.is_grad_enabled()
    run = aten._scaled_dot_product_efficient_attention
    return run(query, key, value, bias, keep, dropout_p, is_causal, scale=scale)[0]


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """F.rms_norm over the last axes."""
    return aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]


FUSED = {"scaled_dot_product_attention": attention, "rms_norm": rms_norm}
