"""One thread for tiny models: waking a second one costs more than its half of the work."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(request, _seeded):
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
