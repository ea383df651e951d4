"""One thread: to wake a second costs models of this size more than it brings."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_seeded) -> None:
    torch.set_num_threads(1)
