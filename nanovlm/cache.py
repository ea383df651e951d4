"""Key/value cache, allocated once for the longest sequence. The caller advances it.

Unusual: ``update`` writes behind ``length`` and does not move it, so that every layer of one forward pass
writes to the same place; ``advance`` follows once the pass is done.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values (B, K, capacity, D) of every layer; ``length`` positions are in use."""

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
        # zeros: compiled code weighs what is not in use yet by 0, and 0 * NaN would spread
        store = torch.zeros(layers, 2, batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.layers = [(keys, values) for keys, values in store]
        self.capacity = capacity
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, D) behind the positions in use; views of all keys and values up to there."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise IndexError(f"the cache holds {self.capacity} positions, {end} are wanted")
        keys, values = self.layers[layer]
        # narrow, not slices: each step of a slice is a call, and one token makes these 30 times
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, k.shape[2]).copy_(v)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, steps: int) -> None:
        """Count the last ``steps`` positions written as in use."""
        self.length += steps
