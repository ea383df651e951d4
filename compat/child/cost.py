"""FLOPs by operator class, counted as they are dispatched; formulas from torch's own registry, and attention's.

Unusual: torch counts no fused attention on a CPU, so the formulas are here. Queries count with all their heads,
grouped or not, and a causal mask saves nothing: what is counted is the shape, not what a kernel skips. Attention
without a formula gives no count at all rather than one that is too low.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .protocol import NotSupported

CLASSES = {
    "mm": "matmul", "addmm": "matmul", "bmm": "batched_matmul", "baddbmm": "batched_matmul",
    "convolution": "convolution", "_convolution": "convolution", "convolution_backward": "convolution",
}  # fmt: skip
NO_WORK = {"_fused_sdp_choice"}  # chooses a kernel


def attention_flops(query, key, value, *args, **kwargs):
    """Scores and weighted sum: query (B, H, T, D), key (B, G, S, D), value (B, G, S, E)."""
    B, H, T, D = query.shape
    return 2 * B * H * T * key.shape[2] * (D + value.shape[3])


def attention_backward_flops(grad_out, query, key, value, *args, **kwargs):
    """Scores once more, then gradients of weights, value, query and key."""
    B, H, T, D = query.shape
    return 2 * B * H * T * key.shape[2] * (3 * D + 2 * value.shape[3])


def formulas():
    """{operator packet: function of the operator's arguments}."""
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    ours = {}
    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", attention_flops),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", attention_backward_flops),
    ):
        if hasattr(aten, name):
            # torch's own take shapes and the result; these take the tensors
            ours[getattr(aten, name)] = lambda *args, out_val=None, formula=formula, **k: formula(*args, **k)
    return {**flop_registry, **ours}


class Counter(TorchDispatchMode):
    """Counts operators, and FLOPs by class; ``uncounted`` names attention that no formula covers."""

    def __init__(self):
        super().__init__()
        self.formulas, self.flops, self.operators, self.uncounted = formulas(), {}, 0, set()

    @classmethod
    def _should_skip_dynamo(cls):
        """As memory.LiveBytes: torch's wrapper would import the compiler for nothing."""
        return "torch._dynamo" in sys.modules

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in self.formulas:
            with self:  # in inference mode composite operators arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.operators += 1
        name = packet.__name__
        if packet in self.formulas:
            kind = CLASSES.get(name, "attention" if "attention" in name else "other")
            self.flops[kind] = self.flops.get(kind, 0) + int(self.formulas[packet](*args, **kwargs, out_val=out))
        elif is_attention(name):
            self.uncounted.add(f"{packet}")
        return out


def generation_flops(adapter, batch, max_new_tokens):
    """{"flops.generate.CLASS"}: without a cache each token costs as much as all before it."""
    with Counter() as counter:
        ids = adapter.generate(batch, max_new_tokens)
    if counter.uncounted:
        raise NotSupported(f"no formula for the FLOPs of {', '.join(sorted(counter.uncounted))}")
    if len(ids[0]) < max_new_tokens:
        raise NotSupported(f"the text ended after {len(ids[0])} tokens")
    facts = {f"flops.generate.{kind}": count for kind, count in counter.flops.items()}
    return {**facts, "flops.generate.total": sum(counter.flops.values())}


def is_attention(name):
    return ("attention" in name or "_sdp" in name) and name not in NO_WORK


def flops(adapter, batch):
    """{"flops.forward.CLASS", "flops.backward.CLASS", "operators"}; CLASS "total" is their sum."""
    with torch.no_grad(), Counter() as forward:
        adapter.logits(batch)
    adapter.model.train()
    loss = adapter.loss(batch)
    with Counter() as backward:
        loss.backward()
    uncounted = sorted(forward.uncounted | backward.uncounted)
    if uncounted:
        raise NotSupported(f"no formula for the FLOPs of {', '.join(uncounted)}")
    facts = {"operators": forward.operators}
    for name, counter in (("forward", forward), ("backward", backward)):
        facts.update({f"flops.{name}.{kind}": count for kind, count in counter.flops.items()})
        facts[f"flops.{name}.total"] = sum(counter.flops.values())
    return facts
