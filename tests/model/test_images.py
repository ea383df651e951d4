"""Pictures to tiles: the plain formulas, every PIL mode, and files that are no pictures."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm import get_image_processor, preset
from nanovlm.errors import ConfigError, ImageError
from nanovlm.images import open_picture, to_rgb
from tests.model.helpers import tiny_config


def photograph(width, height, seed=0):
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain_tiles(picture, side, longest, always):
    """Upstream's steps written one after the other: resize, scale, cut, put the global view first."""
    width, height = picture.size
    long, short = max(width, height), min(width, height)
    new_long = longest if always else min(longest, math.ceil(long / side) * side)
    new_short = max(math.ceil(short * (new_long / long) / side) * side, side)
    size = (new_long, new_short) if width >= height else (new_short, new_long)
    resized = np.asarray(picture.resize(size, Image.BICUBIC), dtype=np.float32) / 255
    tensor = torch.tensor(resized.transpose(2, 0, 1))
    rows, columns = size[1] // side, size[0] // side
    cut = [
        tensor[:, r * side : (r + 1) * side, c * side : (c + 1) * side]
        for r in range(rows)
        for c in range(columns)
    ]
    if len(cut) > 1:
        view = F.interpolate(tensor[None], (side, side), mode="bilinear", antialias=True, align_corners=False)
        cut = [view[0], *cut]
    return torch.stack(cut), (rows, columns)


SIZES = [(64, 64), (100, 40), (40, 100), (64, 65), (1, 1), (3, 700), (800, 100), (129, 128), (500, 500)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("always", [True, False])
def test_tiles_are_those_of_the_plain_formulas(size, always):
    picture = photograph(*size)
    got, grid = get_image_processor(256, 64, always)(picture)
    want, want_grid = plain_tiles(picture, 64, 256, always)
    assert grid == want_grid and got.shape == want.shape
    assert (got - want).abs().max() <= 1e-6
    assert got.dtype == torch.float32 and 0 <= got.min() and got.max() <= 1


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    tile=st.sampled_from([16, 32]),
    count=st.integers(1, 4),
)
def test_any_size_fits_its_tiles(width, height, tile, count):
    tiles, (rows, columns) = get_image_processor(tile * count, tile)(photograph(width, height))
    assert tiles.shape == (rows * columns + (rows * columns > 1), 3, tile, tile)
    assert 1 <= rows <= count and 1 <= columns <= count
    assert (columns >= rows) if width > height else (rows >= columns) if height > width else rows == columns


def test_a_config_and_upstreams_three_arguments_make_the_same_processor():
    cfg = preset("tiny")
    picture = photograph(90, 50)
    by_config, by_numbers = get_image_processor(cfg)(picture), get_image_processor(128, 64, True)(picture)
    assert torch.equal(by_config[0], by_numbers[0]) and by_config[1] == by_numbers[1] == (2, 2)


@pytest.mark.parametrize("generation", ["v0.1", "v0.2"])
def test_older_generations_see_one_square(generation):
    picture = photograph(90, 50)
    tiles, grid = get_image_processor(tiny_config(generation))(picture)
    want = np.asarray(picture.resize((64, 64), Image.BILINEAR), dtype=np.float32).transpose(2, 0, 1) / 255
    assert grid == (1, 1) and (tiles - torch.tensor(want)[None]).abs().max() <= 1e-6


def test_without_a_global_token_there_is_no_global_view():
    tokens = {"image_token": "<i>", "r1c1": "<1>", "r1c2": "<2>", "r2c1": "<3>", "r2c2": "<4>"}
    cfg = preset("tiny", vlm_extra_tokens=tokens, lm_vocab_size=264, extra_token_amount=5)
    tiles, grid = get_image_processor(cfg)(photograph(128, 128))
    assert grid == (2, 2) and len(tiles) == 4


def test_a_longest_side_that_is_no_multiple_of_the_tile_is_refused():
    with pytest.raises(ConfigError, match="max_img_size=100 is not a multiple of the tile of 64"):
        get_image_processor(100, 64)


# -- modes --------------------------------------------------------------------------------------------------


def pixel(picture, x=0, y=0):
    return to_rgb(picture).getpixel((x, y))


def test_grey_and_one_bit_pictures_become_rgb():
    assert pixel(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)


def test_transparency_is_laid_on_white():
    assert pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (2, 2), (10, 20, 30, 255))) == (10, 20, 30)
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 8, 7] * 256)
    assert pixel(palette) == (9, 8, 7)
    palette.info["transparency"] = 0
    assert pixel(palette) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I", "I;16B"])
def test_sixteen_bits_are_scaled_to_eight(mode):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.int32 if mode == "I" else np.uint16)
    picture = (
        Image.fromarray(values)
        if mode != "I;16B"
        else Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    )
    assert picture.mode == mode
    assert [pixel(picture, x, y)[0] for y in (0, 1) for x in (0, 1)] == [0, 100, 200, 255]


def test_float_pictures_are_taken_as_shares_or_as_bytes():
    assert pixel(Image.fromarray(np.array([[0.0, 1.0], [0.5, 1.0]], dtype=np.float32)), 0, 1) == (
        128,
        128,
        128,
    )
    assert pixel(Image.fromarray(np.array([[0.0, 200.0]], dtype=np.float32)), 1, 0) == (200, 200, 200)
    with pytest.raises(ImageError, match="NaN"):
        to_rgb(Image.fromarray(np.array([[float("nan")]], dtype=np.float32)))


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    photograph(40, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert to_rgb(open_picture(tmp_path / "turned.jpg")).size == (20, 40)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F"]
)
def test_every_mode_makes_tiles(mode):
    grey = photograph(20, 10).convert("L")
    picture = (
        photograph(20, 10).convert("RGB").convert("LA" if mode == "PA" else mode)
        if "I" not in mode
        else grey.convert("I")
    )
    if mode == "I;16":
        picture = picture.convert("I;16")
    tiles, _ = get_image_processor(64, 64)(picture.convert("PA") if mode == "PA" else picture)
    assert tiles.shape == (1, 3, 64, 64) and 0 <= tiles.min() and tiles.max() <= 1


# -- what is no picture -------------------------------------------------------------------------------------


def test_files_that_are_no_pictures_are_named(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("hello")
    cut = tmp_path / "cut.png"
    photograph(64, 64).save(cut)
    cut.write_bytes(cut.read_bytes()[:500])
    for path, reason in (
        (text, "no picture"),
        (cut, "cannot be read"),
        (tmp_path / "none.png", "does not exist"),
        (tmp_path, "is a folder; name the picture files in it"),
    ):
        with pytest.raises(ImageError) as caught:
            open_picture(path)
        assert str(path) in str(caught.value) and reason in str(caught.value)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    bomb = tmp_path / "bomb.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("1", (30_000, 30_000)).save(bomb)
    assert bomb.stat().st_size < 2_000_000
    with pytest.raises(ImageError, match="bomb"):
        open_picture(bomb)


def test_something_else_than_a_picture_is_refused():
    with pytest.raises(ImageError, match="expected a PIL picture, got str"):
        get_image_processor(64, 64)("cat.png")
