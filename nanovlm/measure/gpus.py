"""GPUs by name: what of their memory a process can use, and the scratch space that libraries take on them.

Unusual: ``capacity`` is the total that torch itself reports (the data sheet's figure is larger), as users' error
messages have printed it; the CUDA context takes CONTEXT of it before the first tensor. In such messages what a
process uses and torch did not allocate or reserve is 0.49 GiB (A100) and 0.50 GiB (L40).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from nanovlm.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20
CONTEXT = GIB // 2


@dataclass(frozen=True)
class Gpu:
    """``capacity`` in bytes, ``compute`` the CUDA compute capability."""

    name: str
    capacity: int
    compute: tuple[int, int]

    @property
    def usable(self) -> int:
        """Bytes that the allocator can have."""
        return self.capacity - CONTEXT

    @property
    def workspace(self) -> int:
        """Bytes of cuBLAS's workspace, of each thread that multiplies: the forward's and the backward's.

        Source: CUBLAS_WORKSPACE_CONFIG's defaults, https://docs.nvidia.com/cuda/cublas/#cublassetworkspace, as torch
        sets them: 32 MiB from Hopper on, :4096:2:16:8 before.
        """
        return 32 * MIB if self.compute >= (9, 0) else 2 * 4 * MIB + 8 * 16 * 1024

    @property
    def bias_workspace(self) -> int:
        """Bytes that a linear layer with bias takes while it runs (cublasLt).

        Source: https://github.com/pytorch/pytorch/pull/120925.
        """
        if self.compute >= (9, 0):
            return 32 * MIB
        return 4 * MIB if self.compute >= (8, 0) and self.capacity >= 23 * GIB else MIB


GPUS = {
    # https://github.com/vllm-project/vllm/issues/27508
    "h100-80gb": Gpu("h100-80gb", int(79.11 * GIB), (9, 0)),
    # https://github.com/wbfwonderful/Vad-R1/issues/11
    "a100-80gb": Gpu("a100-80gb", int(79.25 * GIB), (8, 0)),
    # https://github.com/TianheWu/CoSeR/issues/10
    "a100-40gb": Gpu("a100-40gb", int(39.50 * GIB), (8, 0)),
    # https://github.com/QwenLM/Qwen3-VL/issues/2097
    "l40-48gb": Gpu("l40-48gb", int(44.40 * GIB), (8, 9)),
    # https://github.com/ali-vilab/VGen/issues/104
    "rtx4090-24gb": Gpu("rtx4090-24gb", int(23.64 * GIB), (8, 9)),
    # https://github.com/hpcaitech/Open-Sora/issues/697
    "t4-16gb": Gpu("t4-16gb", int(14.75 * GIB), (7, 5)),
}


def gpu(name: str) -> Gpu:
    """The GPU of this name. Raises ConfigError."""
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no GPU {name!r}{hint} There are: {', '.join(GPUS)}")
    return GPUS[name]


def parse_size(text: str) -> int:
    """Bytes of "24gb" or "512mb", units of 1024. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([gm])i?b", text.strip().lower())
    size = int(float(match[1]) * (GIB if match[2] == "g" else MIB)) if match else 0
    if not size:
        raise ConfigError(f"{text!r} is no size of memory; write it as 24gb or 512mb")
    return size
