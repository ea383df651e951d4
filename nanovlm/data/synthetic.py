"""Questions about drawn pictures, without end and without a download: what a newcomer's first model learns.

Unusual: a scene is a few words (its ``key``), and a hash of them decides, before anything is drawn, whether it is
for training or held out; so no scene is in both, whatever the seed, the jitter or the question. Every picture is
asked about in several turns, as a picture of the Cauldron is: looking is what costs.

Colours lie on dark grounds: pixels near 0 keep a fresh encoder's first layer near its working point.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIDE = 128
HELD_OUT = 8  # of this many scenes, one is held out
FAMILIES = ("colour", "shape", "count", "position", "comparison", "digits")
APART = ("charts", "words")  # harder; reported apart from the mean

COLOURS = {
    "red": (230, 40, 40), "green": (40, 190, 70), "blue": (60, 90, 255), "yellow": (250, 225, 50),
    "purple": (180, 60, 210), "orange": (250, 140, 30), "white": (255, 255, 255),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
GROUNDS = ((0, 0, 0), (28, 28, 28), (40, 12, 12), (10, 34, 14), (12, 16, 46), (36, 30, 8), (34, 12, 40), (8, 34, 38))
PLACES = {"left": (-30, 0), "right": (30, 0), "top": (0, -30), "bottom": (0, 30), "centre": (0, 0)}
WORDS = ("cat", "dog", "sun", "map", "key", "box", "hat", "pen", "cup", "bus", "egg", "fan")

ASKED = {
    "colour": "What colour?", "shape": "What shape?", "count": "How many?", "position": "Where is it?",
    "comparison": "Which is larger?", "digits": "Which digit?", "charts": "Which bar is highest?",
    "words": "What does it say?",
}  # fmt: skip
# kind of scene -> (how often it is drawn, the families that ask about it); plain scenes are many, because an
# encoder that starts from nothing learns from them to see at all
KINDS = {
    "single": (7, ("colour", "shape", "position")),
    "several": (6, ("count", "colour", "shape")),
    "pair": (3, ("comparison", "shape")),
    "digit": (6, ("digits", "colour")),
    "chart": (1, ("charts",)),
    "word": (1, ("words", "colour")),
}
ASKS = {  # the kind of scene on which a family is scored
    "colour": "single", "shape": "single", "position": "single", "count": "several", "comparison": "pair",
    "digits": "digit", "charts": "chart", "words": "word",
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What is to be seen: ``key`` says it in words; ``jitter`` moves it by some pixels and is no part of it."""

    kind: str
    values: dict[str, Any]
    jitter: tuple[int, ...]

    @property
    def key(self) -> str:
        """The scene, but for the jitter."""
        return f"{self.kind} " + " ".join(f"{name}={value}" for name, value in sorted(self.values.items()))

    @property
    def held_out(self) -> bool:
        """Whether the scene is kept from training."""
        return int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=4).digest(), "big") % HELD_OUT == 0

    def answer(self, family: str) -> str:
        """The answer to the family's question."""
        return _ANSWERS[family](self.values)

    def draw(self) -> Image.Image:
        """The picture, RGB, SIDE x SIDE."""
        picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[self.values["ground"]])
        _DRAWN[self.kind](ImageDraw.Draw(picture), self.values, self.jitter)
        return picture


def scenes(kind: str, held_out: bool, rng: random.Random) -> Iterator[Scene]:
    """Scenes of a kind from one side of the split."""
    while True:
        values = {"ground": rng.randrange(len(GROUNDS)), **_VALUES[kind](rng)}
        jitter = tuple(rng.randint(-4, 4) for _ in range(4))
        scene = Scene(kind, values, jitter)
        if scene.held_out is held_out:
            yield scene


class Synthetic:
    """Rows for training, one for every number from 0 up; a row is the same for a seed whoever asks."""

    name = "synthetic"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __len__(self) -> int:
        raise TypeError("the generator never ends")

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}:{number}")
        kind = rng.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
        scene = next(scenes(kind, False, rng))
        families = list(KINDS[kind][1])
        rng.shuffle(families)
        return _row(scene, families, f"synthetic[{number}]")


class HeldOut:
    """``count`` different scenes that training never draws, one question each, family after family."""

    def __init__(self, count: int = 1000, families: tuple[str, ...] = FAMILIES, seed: int = 0) -> None:
        self.families = families
        drawn: dict[str, Iterator[Scene]] = {
            family: scenes(ASKS[family], True, random.Random(f"held out:{seed}:{family}")) for family in families
        }
        self.asked: list[tuple[str, Scene]] = []
        seen: set[tuple[str, str, tuple[int, ...]]] = set()
        while len(self.asked) < count:
            family = families[len(self.asked) % len(families)]
            scene = next(drawn[family])
            if (family, scene.key, scene.jitter) not in seen:
                seen.add((family, scene.key, scene.jitter))
                self.asked.append((family, scene))

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, number: int) -> dict[str, Any]:
        family, scene = self.asked[number]
        return _row(scene, [family], f"held_out[{number}]")


def _row(scene: Scene, families: list[str], name: str) -> dict[str, Any]:
    texts = [{"user": ASKED[family], "assistant": scene.answer(family), "family": family} for family in families]
    return {"images": [scene.draw()], "texts": texts, "id": name, "scene": scene.key}


# -- what scenes hold -----------------------------------------------------------------------------------


def _single(rng: random.Random) -> dict[str, Any]:
    return {
        "shape": rng.choice(SHAPES), "colour": rng.choice(list(COLOURS)), "place": rng.choice(list(PLACES)),
        "size": rng.choice((22, 26, 30)),
    }  # fmt: skip


def _several(rng: random.Random) -> dict[str, Any]:
    cells = rng.sample(range(16), rng.randint(1, 5))
    return {"shape": rng.choice(SHAPES), "colour": rng.choice(list(COLOURS)), "cells": tuple(sorted(cells))}


def _pair(rng: random.Random) -> dict[str, Any]:
    left, right = rng.sample(list(COLOURS), 2)
    sizes = [rng.choice((24, 26, 28)), rng.choice((11, 13, 15))]
    rng.shuffle(sizes)
    return {"shape": rng.choice(SHAPES), "colours": (left, right), "sizes": tuple(sizes)}


def _digit(rng: random.Random) -> dict[str, Any]:
    return {"digit": rng.randrange(10), "colour": rng.choice(list(COLOURS)), "size": rng.choice((84, 96, 108))}


def _chart(rng: random.Random) -> dict[str, Any]:
    heights = rng.sample((24, 44, 64, 84, 104), 3)
    return {"colours": tuple(rng.sample(list(COLOURS), 3)), "heights": tuple(heights)}


def _word(rng: random.Random) -> dict[str, Any]:
    return {"word": rng.choice(WORDS), "colour": rng.choice(list(COLOURS)), "size": rng.choice((44, 48, 52))}


_VALUES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "single": _single, "several": _several, "pair": _pair, "digit": _digit, "chart": _chart, "word": _word,
}  # fmt: skip
_ANSWERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "colour": lambda values: values["colour"],
    "shape": lambda values: values["shape"],
    "position": lambda values: values["place"],
    "count": lambda values: str(len(values["cells"])),
    "comparison": lambda values: values["colours"][values["sizes"].index(max(values["sizes"]))],
    "digits": lambda values: str(values["digit"]),
    "charts": lambda values: values["colours"][values["heights"].index(max(values["heights"]))],
    "words": lambda values: values["word"],
}


# -- how they are drawn ---------------------------------------------------------------------------------


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: str) -> None:
    fill = COLOURS[colour]
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=fill)
    else:
        w = 0.33 * r
        draw.rectangle((x - r, y - w, x + r, y + w), fill=fill)
        draw.rectangle((x - w, y - r, x + w, y + r), fill=fill)


def _draw_single(draw: ImageDraw.ImageDraw, values: dict[str, Any], jitter: tuple[int, ...]) -> None:
    dx, dy = PLACES[values["place"]]
    x, y = SIDE / 2 + dx + jitter[0], SIDE / 2 + dy + jitter[1]
    _shape(draw, values["shape"], x, y, values["size"], values["colour"])


def _draw_several(draw: ImageDraw.ImageDraw, values: dict[str, Any], jitter: tuple[int, ...]) -> None:
    for cell in values["cells"]:
        x, y = 16 + 32 * (cell % 4) + jitter[0] / 2, 16 + 32 * (cell // 4) + jitter[1] / 2
        _shape(draw, values["shape"], x, y, 13, values["colour"])


def _draw_pair(draw: ImageDraw.ImageDraw, values: dict[str, Any], jitter: tuple[int, ...]) -> None:
    for side in (0, 1):
        x, y = 32 + 64 * side + jitter[2 * side] / 2, SIDE / 2 + 3 * jitter[2 * side + 1]
        _shape(draw, values["shape"], x, y, values["sizes"][side], values["colours"][side])


def _draw_digit(draw: ImageDraw.ImageDraw, values: dict[str, Any], jitter: tuple[int, ...]) -> None:
    at = (SIDE / 2 + jitter[0], SIDE / 2 + jitter[1])
    draw.text(at, str(values["digit"]), COLOURS[values["colour"]], _font(values["size"]), anchor="mm")


def _draw_chart(draw: ImageDraw.ImageDraw, values: dict[str, Any], jitter: tuple[int, ...]) -> None:
    for number, (colour, height) in enumerate(zip(values["colours"], values["heights"], strict=True)):
        left = 10 + 38 * number + jitter[0] / 2
        draw.rectangle((left, SIDE - 8 - height, left + 30, SIDE - 8), COLOURS[colour])


def _draw_word(draw: ImageDraw.ImageDraw, values: dict[str, Any], jitter: tuple[int, ...]) -> None:
    at = (SIDE / 2 + jitter[0], SIDE / 2 + 4 * jitter[1])
    draw.text(at, values["word"], COLOURS[values["colour"]], _font(values["size"]), anchor="mm")


_DRAWN: dict[str, Callable[[ImageDraw.ImageDraw, dict[str, Any], tuple[int, ...]], None]] = {
    "single": _draw_single, "several": _draw_several, "pair": _draw_pair, "digit": _draw_digit,
    "chart": _draw_chart, "word": _draw_word,
}  # fmt: skip
_FONTS: dict[int, Any] = {}


def _font(size: int) -> Any:
    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)  # Pillow's own, the same on every machine
    return _FONTS[size]
