"""A PIL picture in any mode -> tiles in [0, 1], exactly as upstream nanoVLM makes them, without torchvision.

Unusual: the long side goes to at most ``max_img_size`` (or exactly there with ``resize_to_max_side_len``),
both sides to multiples of the tile, the short one rounded up; when more than one tile results, a global view
comes first, made from the resized tensor, not from the picture. A model without tiles sees the picture
squeezed into one square, or, if it is dynamic, whole in its own shape. Pixels are normalised where the config
gives a mean and a deviation: upstream's checkpoints were trained without. A model of another family may bring
its own tiles (registry.TILINGS).

Transparent pictures are laid on white and EXIF rotation is applied, which upstream does not do.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nanovlm import registry
from nanovlm.checks import kept_tokens
from nanovlm.config import VLMConfig
from nanovlm.errors import ConfigError, ImageError

MAX_PIXELS = 178_956_970  # where PIL itself stops: twice Image.MAX_IMAGE_PIXELS as shipped


class Processor(Protocol):
    """What turns a picture into tiles."""

    def __call__(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int]]: ...

    def grid(self, width: int, height: int) -> tuple[int, int]: ...


def get_image_processor(
    max_img_size: int | VLMConfig,
    splitted_image_size: int | None = None,
    resize_to_max_side_len: bool = False,
) -> Processor:
    """A function picture -> (pixel_values (N, 3, H, W) in [0, 1], or normalised, and (rows, columns)).

    Takes a VLMConfig, or upstream's three arguments: longest side, tile side, and whether every long side
    becomes ``max_img_size``. A cell of the grid is a tile (H = W), or, of a dynamic config, one image token.
    """
    if isinstance(max_img_size, VLMConfig):
        processor = _cutter(max_img_size)
        cfg = max_img_size
        return Normalised(processor, cfg.image_mean, cfg.image_std) if cfg.image_mean else processor
    return Tiles(splitted_image_size or max_img_size, max_img_size, resize_to_max_side_len)


def _cutter(cfg: VLMConfig) -> Processor:
    """What turns a picture into tiles in [0, 1] for this config."""
    other = registry.tiling(cfg.vlm_extra_tokens)
    if other is not None:
        return other.of(cfg)
    if cfg.dynamic:
        return Dynamic(cfg.token_side, cfg.max_img_size, cfg.resize_to_max_side_len, cfg.token_share)
    if cfg.generation != "main":
        return Square(cfg.vit_img_size)
    global_view = "global_image_token" in cfg.vlm_extra_tokens
    return Tiles(cfg.vit_img_size, cfg.max_img_size, cfg.resize_to_max_side_len, global_view)


@dataclass(frozen=True)
class Normalised:
    """Another processor's tiles with the mean taken from each colour, then divided by its deviation."""

    processor: Processor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        tiles, grid = self.processor(picture)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (tiles - mean) / std, grid

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of a picture of this size, as with every processor here."""
        return self.processor.grid(width, height)


@dataclass(frozen=True)
class Square:
    """One square of ``side`` pixels, whatever the picture's shape."""

    side: int

    def __call__(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        resized = to_rgb(picture).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return to_tensor(resized)[None], (1, 1)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        return (1, 1)


@dataclass(frozen=True)
class Dynamic:
    """The whole picture in its own shape; the grid counts squares of ``side`` pixels, an image token each.

    The long side becomes the multiple of ``side`` nearest to its length, within ``max_side``; the short one
    the multiple that keeps the aspect best. Where only a share of the tokens is kept, the grid is one row of them.
    """

    side: int
    max_side: int
    always_to_max: bool = False
    share: float = 1.0

    def __call__(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        picture = to_rgb(picture)
        size = self.resized_size(*picture.size)
        pixels = to_tensor(picture.resize(size, Image.Resampling.BICUBIC))
        return pixels[None], self.cells(*size)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        return self.cells(*self.resized_size(width, height))

    def cells(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of image tokens of a picture that is resized."""
        rows, columns = height // self.side, width // self.side
        return (rows, columns) if self.share == 1 else (1, kept_tokens(rows * columns, self.share))

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing, multiples of the side, each at least one."""
        long, most = max(width, height), self.max_side // self.side
        cells = most if self.always_to_max else min(most, max(1, round(long / self.side)))
        across, down = (max(1, round(cells * length / long)) for length in (width, height))
        return across * self.side, down * self.side


@dataclass(frozen=True)
class Tiles:
    """Tiles of ``side`` pixels in reading order, behind a global view when there are several."""

    side: int
    max_side: int
    always_to_max: bool = False
    global_view: bool = True

    def __post_init__(self) -> None:
        if self.side < 1 or self.max_side % self.side:
            raise ConfigError(f"max_img_size={self.max_side} is not a multiple of the tile of {self.side}")

    def __call__(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        picture = to_rgb(picture)
        size = self.resized_size(*picture.size)
        rows, columns = size[1] // self.side, size[0] // self.side
        resized = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC)))
        first = int(self.global_view and rows * columns > 1)
        tiles = empty(first + rows * columns, 3, self.side, self.side)
        cells = tiles[first:].view(rows, columns, 3, self.side, self.side)
        pixels = empty(size[1], size[0])
        for colour, whole in enumerate(resized.permute(2, 0, 1).contiguous()):
            pixels.copy_(whole).div_(255)
            cells[:, :, colour] = pixels.view(rows, self.side, columns, self.side).transpose(1, 2)
            if first:
                tiles[0, colour] = F.interpolate(
                    pixels[None, None], size=(self.side, self.side), mode="bilinear", antialias=True
                )[0, 0]
        return tiles, (rows, columns)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        width, height = self.resized_size(width, height)
        return height // self.side, width // self.side

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing, multiples of the tile."""
        long, short = max(width, height), min(width, height)
        new_long = (
            self.max_side
            if self.always_to_max
            else min(self.max_side, math.ceil(long / self.side) * self.side)
        )
        # one float product, then the ceiling: exactly upstream's order, so that ties round the same way
        new_short = max(self.side, math.ceil(short * (new_long / long) / self.side) * self.side)
        return (new_long, new_short) if width >= height else (new_short, new_long)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB: upright, transparency on white, 16 bits scaled to 8. Raises ImageError."""
    if not isinstance(picture, Image.Image):
        raise ImageError(
            f"expected a PIL picture, got {type(picture).__name__}; nanovlm.images.open_picture reads a file"
        )
    _check_size(picture)
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == "RGB":
            return picture
        if picture.mode.startswith("I") or picture.mode == "F":
            return _from_deep_grey(picture).convert("RGB")
        if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken pixel data
        raise ImageError(f"the picture cannot be decoded: {error}") from None


def _check_size(picture: Image.Image) -> None:
    """Raise ImageError for a size that is none, or whose pixels would fill the memory."""
    size = f"a picture of {picture.width}x{picture.height} pixels"
    if picture.width * picture.height > MAX_PIXELS:
        raise ImageError(f"{size}; at most {MAX_PIXELS:,} are decoded")
    if not picture.width or not picture.height:
        raise ImageError(f"{size} has nothing to show")


def _from_deep_grey(picture: Image.Image) -> Image.Image:
    """16- and 32-bit integers, or floats in [0, 1], as 8-bit grey."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("the picture holds NaN or infinite pixels")
    highest = values.max()
    scale = (
        255.0
        if picture.mode == "F" and highest <= 1
        else 255 / 65535
        if picture.mode[0] == "I" and highest > 255
        else 1.0
    )
    if picture.mode.startswith("I;16"):
        scale = 255 / 65535
    return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture -> float32 (3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return empty(*pixels.shape).copy_(pixels).div_(255)


def empty(*shape: int) -> Tensor:
    """A float32 tensor with nothing in it yet.

    numpy takes large arrays in huge pages, torch does not, and getting 50 MB of tiles page by page takes
    longer than everything but the resize that happens to them.
    """
    return torch.from_numpy(np.empty(shape, np.float32))


def open_picture(path: str | os.PathLike) -> Image.Image:
    """A picture file, decoded. Raises ImageError naming the path and what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the hard limit is PIL's error
            picture = Image.open(path)
            _check_size(picture)  # whoever set PIL's own limit to None still decodes no bomb
            picture.load()
            return picture
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is no picture in a format that PIL reads") from None
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder; name the picture files in it") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} cannot be read: {error}") from None
