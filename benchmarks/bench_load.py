"""from_pretrained of the default preset (460M): its time, and how far a process grows by it.

Unusual: every load is a process of its own, whose resident memory the kernel counts; what is compared is not
another library but the bytes of the weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.sides import DTYPES, our_model
from nanovlm import preset

ROOT = Path(__file__).parents[1]
CHILD = """
import json, sys, time
import torch
from nanovlm import VisionLanguageModel, preset

def resident():
    with open("/proc/self/status") as file:
        kibibytes = dict(line.split(":", 1) for line in file)
    return int(kibibytes["VmRSS"].split()[0]) * 1024

VisionLanguageModel(preset("tiny"), load_backbone=False)  # code that stays, whatever is loaded
before, start = resident(), time.perf_counter()
model = VisionLanguageModel.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
seconds, grown = time.perf_counter() - start, resident() - before
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"seconds": seconds, "grown_bytes": grown, "weight_bytes": weights}))
"""


def load(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """seconds, grown_bytes and weight_bytes of one load in a new process."""
    command = [sys.executable, "-c", CHILD, str(folder), str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("dtype", DTYPES)
def test_load(benchmark, tmp_path, dtype):
    our_model(preset("default"), DTYPES[dtype]).save_pretrained(tmp_path)
    facts = benchmark.pedantic(load, (tmp_path, DTYPES[dtype]), rounds=3)
    (tmp_path / "model.safetensors").unlink()
    growth = facts["grown_bytes"] / facts["weight_bytes"]
    benchmark.extra_info.update(
        ours=f"{facts['grown_bytes'] / 1e6:.0f} MB",
        theirs=f"{facts['weight_bytes'] / 1e6:.0f} MB of weights",
        ratio=f"{growth:.3f}",
        seconds=f"{facts['seconds']:.1f}",
    )
    assert growth <= 1.15
