"""Fewer image tokens: squares of neighbours become one, or those of the lowest norm are left out.

Unusual: the adaptive pooling starts as the average (its last layer is zero), so that a trained model begins
where plain pooling would put it. Dropping in front of the projector drops whole squares of the pixel shuffle,
never single patches: a token's patches stay neighbours.

N tiles, P tokens on a grid of h x w, D width, f pooling factor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovlm.checks import kept_tokens
from nanovlm.config import VLMConfig
from nanovlm.layers import draw_weights

REDUCTION = 4  # of the width inside the channel attention


class TokenPooling(nn.Module):
    """(N, h*w, D) -> (N, h*w / f**2, D): the mean, the maximum or a learned mean of each f x f square.

    method: "pool_avg", "pool_max" or "pool_adaptive". The learned mean weighs each channel of each token by
    two linear layers and a softmax over the square: D * D / 2 + 5 * D / 4 parameters, 295,872 at width 768.
    """

    def __init__(self, method: str, factor: int, width: int) -> None:
        super().__init__()
        self.method, self.factor = method, factor
        if method == "pool_adaptive":
            inner = max(1, width // REDUCTION)
            last = nn.Linear(inner, width)
            self.attention = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), last)
            self.apply(draw_weights)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """grid: (h, w) of x. Raises ValueError where the factor does not divide it."""
        (N, P, D), (rows, columns), f = x.shape, grid, self.factor
        if rows * columns != P or rows % f or columns % f:
            raise ValueError(f"{P} tokens do not form a grid of {rows}x{columns} whose sides {f} divides")
        x = x.view(N, rows // f, f, columns // f, f, D).transpose(2, 3).reshape(N, P // f**2, f**2, D)
        if self.method == "pool_max":
            return x.amax(2)
        if self.method == "pool_adaptive":
            return (self.attention(x).softmax(2) * x).sum(2)
        return x.mean(2)


class NormBasedTokenDropping(nn.Module):
    """(N, P, D) -> (N, K, D): the share ``keep_ratio`` of each picture's tokens, those of the largest L2 norm.

    They stay in reading order. K is the same for every tile, so that a prompt's length follows from the grid.
    """

    def __init__(self, keep_ratio: float) -> None:
        super().__init__()
        self.keep_ratio = keep_ratio

    def forward(self, x: Tensor) -> Tensor:
        # fp32: in half precision many norms of wide tokens are equal
        norms = x.detach().float().norm(dim=2)
        kept = norms.topk(kept_tokens(x.shape[1], self.keep_ratio), dim=1).indices.sort(dim=1).values
        return torch.gather(x, 1, kept[..., None].expand(-1, -1, x.shape[2]))


def pooling(cfg: VLMConfig) -> TokenPooling | NormBasedTokenDropping | None:
    """What the config asks for; None where every token stays."""
    if cfg.pool == "none":
        return None
    if cfg.pool == "drop_norm":
        return NormBasedTokenDropping(cfg.keep_ratio)
    width = cfg.vit_hidden_dim if cfg.pool_at == "vision" else cfg.lm_hidden_dim
    return TokenPooling(cfg.pool, cfg.pool_factor, width)
