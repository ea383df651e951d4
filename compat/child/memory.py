"""Peak memory of a step, on CUDA from its allocator, on a CPU from the tensors themselves.

Unusual: the CPU figure counts the bytes of live storages after every operator, so it is exact and the same
on every machine; it sees neither the allocator's rounding nor scratch space inside an operator.
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .optim import adam
from .protocol import theirs


class LiveBytes(TorchDispatchMode):
    """Tracks bytes of storages that are alive; ``peak`` is the most at once."""

    def __init__(self, already=()):
        super().__init__()
        self.seen = {}
        self.live = self.peak = 0
        for tensor in already:
            self.add(tensor)

    @classmethod
    def _should_skip_dynamo(cls):
        """Not unless the target compiles: torch's wrapper would import the compiler, over a second for nothing."""
        return "torch._dynamo" in sys.modules

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.seen:
            size = storage.nbytes()
            self.seen[key] = weakref.finalize(storage, self.drop, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def drop(self, key, size):
        if self.seen.pop(key, None) is not None:
            self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return out


def peak(adapter, batch, step):
    """(bytes, how) at the peak of ``step``: "forward" without gradients, or "train" (forward, backward, Adam)."""
    if adapter.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run(adapter, batch, step)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), "CUDA allocator"
    with LiveBytes([*adapter.model.parameters(), *adapter.model.buffers()]) as tracker:
        run(adapter, batch, step)
    return tracker.peak, "live CPU tensors"


def run(adapter, batch, step):
    """One step, once."""
    if step == "forward":
        with torch.no_grad():
            adapter.logits(batch)
        return
    adapter.model.train()
    trained, state = [p for p in adapter.model.parameters() if p.requires_grad], {}
    for _ in range(2):  # the optimizer's state exists from the second step on
        adapter.model.zero_grad(set_to_none=True)
        with theirs():
            adapter.loss(batch).backward()
        adam(trained, state, lr=1e-4)
