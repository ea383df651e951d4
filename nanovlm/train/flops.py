"""How much arithmetic a batch is, and so how much of a GPU's peak is used (MFU).

Unusual: a frozen part counts for less. A product is done once forward, once more for the gradient that flows on
to something that learns, once more for its own weights. What recomputation adds is not counted.
Source of the definition: https://arxiv.org/abs/2204.02311, appendix B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nanovlm.vlm import VisionLanguageModel

# Dense bfloat16, of the vendor's data sheets; the longest name that fits the device's counts.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "A40": 149.7e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """A second, of this device in bfloat16; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    fitting = [model for model in PEAK_FLOPS if model in name]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


class Flops:
    """Floating-point operations of a training step on a batch; made before the model is sharded."""

    def __init__(self, model: VisionLanguageModel) -> None:
        cfg = model.cfg
        vision, projector, decoder = (_learns(part) for part in (model.vision_encoder, model.MP, model.decoder))
        passes = {
            "vision": 1 + 2 * vision,
            "projector": 1 + vision + projector,
            "decoder": 1 + (vision or projector or decoder) + decoder,
        }
        self.cfg, self.patch_side = cfg, cfg.vit_patch_size
        self.patch = 2 * passes["vision"] * _weights(model.vision_encoder)
        self.patch_pair = 4 * passes["vision"] * cfg.vit_n_blocks * cfg.vit_hidden_dim
        self.feature = 2 * passes["projector"] * model.MP.proj.weight.numel()
        self.pooled = 2 * passes["projector"] * (_weights(model.MP) - model.MP.proj.weight.numel())
        self.token = 2 * passes["decoder"] * (_weights(model.decoder) - model.decoder.head.weight.numel())
        # half of the pairs: the mask is causal
        self.token_pair = 2 * passes["decoder"] * cfg.lm_n_blocks * cfg.lm_n_heads * cfg.lm_head_dim
        self.label = 2 * passes["decoder"] * model.decoder.head.weight.numel()

    def of(self, batch: dict[str, Any], tokens: list[int], labels: int) -> float:
        """Of one micro-batch; ``tokens``: of each row, without padding."""
        total = float(self.label * labels + sum(self.token * n + self.token_pair * n * n for n in tokens))
        for stack in (stack for row in batch["images"] for stack in row):
            count, _, height, width = stack.shape
            patches = height * width // self.patch_side**2
            squares = patches // self.cfg.mp_pixel_shuffle_factor**2
            first = self.cfg.pool_at == "vision"
            features = self.cfg.image_tokens(height, width) if first else squares
            pooled = self.pooled * (patches if first else squares)
            total += count * (self.patch * patches + self.patch_pair * patches**2 + self.feature * features + pooled)
        return total


def _weights(module: nn.Module) -> int:
    """Numbers in a module's matrices: each is used once a position."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
