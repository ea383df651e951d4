"""Key/value cache, allocated once for the longest sequence. The caller advances it.

Unusual: ``update`` writes behind ``length`` and does not move it, so that every layer of one forward pass
writes to the same place; ``advance`` follows once the pass is done.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers (layers, 2, B, K, capacity, D); ``length`` positions are in use."""

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.store = torch.empty(layers, 2, batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, D) behind the positions in use; views of all keys and values up to there."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise IndexError(f"the cache holds {self.capacity} positions, {end} are wanted")
        keys, values = self.store[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, steps: int) -> None:
        """Count the last ``steps`` positions written as in use."""
        self.length += steps
