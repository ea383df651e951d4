"""One thread, as with all tiny models; a tiny model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.helpers import tiny_model


@pytest.fixture(autouse=True)
def _one_thread(_seeded) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model with 4 x 4 image tokens a tile."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model(vit_img_size=128).save_pretrained(folder)
    return folder
