"""From vision width to language width: pixel shuffle, then one linear layer without bias.

Unusual: "pixel shuffle" here goes from space to depth: each square of f x f neighbouring patches becomes
one token f*f times as wide, so nothing is averaged away. Where the config asks for fewer image tokens, they are
pooled or dropped here (pooling.py), in front of the linear layer or behind it. Source: Idefics3, https://arxiv.org/abs/2408.12637.
"""

from __future__ import annotations

from torch import Tensor, nn

from nanovlm.config import VLMConfig
from nanovlm.layers import draw_weights
from nanovlm.pooling import TokenPooling, pooling


def pixel_shuffle(x: Tensor, factor: int, grid: tuple[int, int] | None = None) -> Tensor:
    """x (N, h*w, D) -> (N, h*w / f**2, D * f**2): rows of an f x f square join the width from top to bottom.

    grid: (h, w), a square when not given. Raises ValueError where it does not fit.
    """
    N, P, D = x.shape
    rows, columns = grid or (int(P**0.5), int(P**0.5))
    if rows * columns != P or rows % factor or columns % factor:
        shape = f"a grid of {rows}x{columns}" if grid else "a square"
        raise ValueError(f"{P} patches do not form {shape} whose sides {factor} divides")
    x = x.view(N, rows // factor, factor, columns // factor, factor, D)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(N, P // factor**2, D * factor**2)


class ModalityProjector(nn.Module):
    """(N, P, Dv) -> (N, K, D), K = P / factor**2, or fewer where tokens are pooled or dropped."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.factor = cfg.mp_pixel_shuffle_factor
        self.proj = nn.Linear(cfg.vit_hidden_dim * self.factor**2, cfg.lm_hidden_dim, bias=False)
        self.apply(draw_weights)
        self.pool, self.pool_first = pooling(cfg), cfg.pool_at == "vision"

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if self.pool is None:
            return self.proj(pixel_shuffle(x, self.factor, grid))
        pool, factor = self.pool, self.factor
        rows, columns = grid or (int(x.shape[1] ** 0.5), int(x.shape[1] ** 0.5))
        if not isinstance(pool, TokenPooling):
            x = pixel_shuffle(x, factor, (rows, columns))
            return self.proj(pool(x)) if self.pool_first else pool(self.proj(x))
        if self.pool_first:
            window = pool.factor
            return self.proj(pixel_shuffle(pool(x, (rows, columns)), factor, (rows // window, columns // window)))
        return pool(self.proj(pixel_shuffle(x, factor, (rows, columns))), (rows // factor, columns // factor))
