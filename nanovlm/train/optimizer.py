"""What is trained, how fast, and by what: frozen parts, one AdamW group a part, cosine with warm-up.

Unusual: a frozen part (learning rate 0) has no gradient and no optimizer state, and stays in eval mode, so its
dropout and its jittered positions stay off. The schedule is a function of the step alone: nothing of it is saved.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from nanovlm.config import TrainConfig


def freeze(model: nn.Module, cfg: TrainConfig) -> None:
    """Take the gradient from parts whose learning rate is 0, and give it to the others."""
    for part, rate in cfg.learning_rates.items():
        getattr(model, part).requires_grad_(rate > 0)


def train_mode(model: nn.Module, cfg: TrainConfig) -> None:
    """Training mode, but for frozen parts."""
    model.train()
    for part, rate in cfg.learning_rates.items():
        if not rate:
            getattr(model, part).eval()


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW with a group for each part that learns; ``group["part"]`` names it."""
    groups = [
        {"params": list(getattr(model, part).parameters()), "lr": rate, "part": part}
        for part, rate in cfg.learning_rates.items()
        if rate
    ]
    return torch.optim.AdamW(groups, betas=(0.9, cfg.adam_beta2), weight_decay=cfg.weight_decay, fused=True)


def learning_rate(step: int, peak: float, cfg: TrainConfig) -> float:
    """Of the step after ``step`` steps: a line up to ``peak``, then half a cosine down to its floor."""
    warmup = cfg.max_training_steps * cfg.warmup_ratio
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    floor = peak * cfg.min_lr_ratio
    done = (step - warmup) / max(1.0, cfg.max_training_steps - warmup)
    return floor + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (peak - floor)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, cfg: TrainConfig) -> dict[str, float]:
    """Give every group its rate at this step; {part: rate}."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg.learning_rates[group["part"]], cfg)
    return {group["part"]: group["lr"] for group in optimizer.param_groups}
