"""Cross entropy behind the vocabulary's matrix, without keeping a logit.

Unusual: the gradients are made in the forward pass, a chunk of labels at a time, while that chunk's logits are
at hand; what waits for the backward pass is one gradient of the hidden states and one of the matrix, which
becomes the parameter's own. The logits of a 49,152-word vocabulary would be the largest tensor of a step.

n labels, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 24  # logits in memory at once: 64 MB in float32


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of logits (n, V) in float32, a chunk of rows at a time."""
    rows = max(1, CHUNK // logits.shape[1])
    losses = [
        F.cross_entropy(part.float(), label, reduction="sum")
        for part, label in zip(logits.split(rows), labels.split(rows), strict=True)
    ]
    return torch.stack(losses).sum() / len(labels)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of ``hidden @ weight.T`` in float32: hidden (n, D), weight (V, D), labels (n,).

    Under autocast the products are in its dtype. It can be differentiated once.
    """
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with_grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, product, with_grad and hidden.requires_grad, with_grad and weight.requires_grad
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, for_hidden: bool, for_weight: bool
    ) -> Tensor:
        matrix = weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden) if for_hidden else None
        of_weight = None
        start = 0
        for x, label in zip(*(t.split(max(1, CHUNK // len(weight))) for t in (hidden, labels)), strict=True):
            x = x.to(dtype)
            logits = (x @ matrix.T).float()
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, label[:, None])).sum()
            if not (for_hidden or for_weight):
                continue
            # softmax minus one at the label, of the mean over all n
            logits.sub_(norm).exp_().scatter_add_(1, label[:, None], -torch.ones_like(norm)).div_(len(labels))
            errors = logits.to(dtype)
            del logits
            if of_hidden is not None:
                of_hidden[start : start + len(x)] = errors @ matrix
            if for_weight and of_weight is None:
                of_weight = (errors.T @ x).to(weight.dtype)
            elif of_weight is not None and of_weight.dtype == dtype:
                of_weight.addmm_(errors.T, x)
            elif of_weight is not None:
                of_weight += errors.T @ x
            start += len(x)
        ctx.gradients = of_hidden, of_weight
        return total / len(labels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated already; call forward again, or ask it for logits")
        gradients, ctx.gradients = ctx.gradients, None  # let go of: autograd may then keep them as .grad
        return *(None if each is None else each.mul_(scale) for each in gradients), None, None, None, None
