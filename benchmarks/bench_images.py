"""Pictures into tiles of the default preset, against the same written the plain way, twice.

Unusual: time does not depend on what a picture shows, only on its size, so a drawn one will do; any files in
the folder that PICTURES names are timed instead.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.sides import against
from nanovlm import get_image_processor, preset
from nanovlm.images import open_picture, to_rgb

FOLDER = os.environ.get("PICTURES")
PICTURES = sorted(Path(FOLDER).glob("*.jpg")) if FOLDER else [(640, 427), (600, 400), (288, 512), (1600, 1200)]


def with_torch(picture: Image.Image, size: tuple[int, int], side: int) -> Tensor:
    """Resize, array, float tensor of the whole, rearranged, the view in front: a step a line."""
    pixels = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC)))
    pixels = pixels.permute(2, 0, 1).contiguous().float() / 255
    rows, columns = size[1] // side, size[0] // side
    tiles = pixels.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    view = F.interpolate(pixels[None], size=(side, side), mode="bilinear", antialias=True)
    return torch.cat((view, tiles))


def with_numpy(picture: Image.Image, size: tuple[int, int], side: int) -> Tensor:
    """The same with numpy's arrays up to the view."""
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).astype(np.float32) / 255
    rows, columns = size[1] // side, size[0] // side
    tiles = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    view = F.interpolate(whole, size=(side, side), mode="bilinear", antialias=True)
    return torch.cat((view, torch.from_numpy(tiles)))


@pytest.mark.parametrize("plain", [with_torch, with_numpy])
@pytest.mark.parametrize("source", PICTURES, ids=str)
def test_tiles(benchmark, picture, source, plain):
    image = to_rgb(open_picture(source)) if FOLDER else picture(*source)
    cfg = preset("default")
    processor = get_image_processor(cfg)
    tiles, (rows, columns) = processor(image)
    size = columns * cfg.vit_img_size, rows * cfg.vit_img_size
    assert torch.allclose(tiles, plain(image, size, cfg.vit_img_size), atol=1e-6, rtol=0)
    turns = against(
        benchmark,
        lambda: processor(image),
        rounds=15,
        theirs=lambda: plain(image, size, cfg.vit_img_size),
        resize=lambda: image.resize(size, Image.Resampling.BICUBIC),
    )
    benchmark.extra_info.update(
        ours=f"{turns.median('ours') * 1e3:.0f} ms",
        theirs=f"{turns.median('theirs') * 1e3:.0f} ms",
        ratio=f"{turns.median('theirs') / turns.median('ours'):.2f}",
        resize_alone=f"{turns.median('resize') * 1e3:.0f} ms",
    )
