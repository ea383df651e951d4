"""From vision width to language width: pixel shuffle, then one linear layer without bias.

Unusual: "pixel shuffle" here goes from space to depth: each square of f x f neighbouring patches becomes
one token f*f times as wide, so nothing is averaged away. Source: Idefics3, https://arxiv.org/abs/2408.12637.
"""

from __future__ import annotations

from torch import Tensor, nn

from nanovlm.config import VLMConfig
from nanovlm.layers import draw_weights


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
    """(N, P, Dv) -> (N, K, D), K = P / factor**2."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.factor = cfg.mp_pixel_shuffle_factor
        self.proj = nn.Linear(cfg.vit_hidden_dim * self.factor**2, cfg.lm_hidden_dim, bias=False)
        self.apply(draw_weights)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.proj(pixel_shuffle(x, self.factor, grid))
