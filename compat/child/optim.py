"""Two optimizers as plain arithmetic, for parameters with gradients.

Unusual: torch.optim is not used, because its first step imports the compiler (seconds in a fresh process).
AdamW without weight decay is Adam; the defaults are torch's. Source: arXiv 1412.6980.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def sgd(parameters, state, lr):
    """One step of plain gradient descent."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.sub_(parameter.grad, alpha=lr)


@torch.no_grad()
def adam(parameters, state, lr, betas=(0.9, 0.999), eps=1e-8):
    """One step of Adam; ``state`` is a dict that the caller keeps between steps."""
    state["step"] = step = state.get("step", 0) + 1
    for parameter in parameters:
        if parameter.grad is None:
            continue
        mean, square = state.setdefault(parameter, (torch.zeros_like(parameter), torch.zeros_like(parameter)))
        mean.lerp_(parameter.grad, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(parameter.grad, parameter.grad, value=1 - betas[1])
        scale = (square / (1 - betas[1] ** step)).sqrt_().add_(eps)
        parameter.addcdiv_(mean, scale, value=-lr / (1 - betas[0] ** step))
