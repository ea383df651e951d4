"""The loss over the steps as a picture, PNG and SVG, from the records of metrics.jsonl.

Unusual: no plotting library. One list of lines and words is laid out once and drawn twice. Two curves: training
as it was at every step (faint) and averaged (strong), and validation with a dot where it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from nanovlm import checkpoint

WIDTH, HEIGHT = 800, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
GREY, FAINT, STRONG, VALIDATION = "#888888", "#c6d8ee", "#1f5fa8", "#d1495b"
Point = tuple[float, float]


def write_curve(run: Path, records: Iterable[dict[str, Any]]) -> bool:
    """Draw run/loss.png and run/loss.svg; False where no step has a loss."""
    records = list(records)
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if not train:
        return False
    shapes = _layout(train, validation, run.name)
    checkpoint.write_text(run / "loss.svg", as_svg(shapes))
    with checkpoint.replacing(run / "loss.png") as temporary:
        as_png(shapes).save(temporary, format="PNG")
    return True


def smooth(points: Sequence[Point], over: int) -> list[Point]:
    """The mean of the last ``over`` values at each point."""
    values = [y for _, y in points]
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, number + 1 - over) for number in range(len(values))]
    return [
        (points[number][0], (sums[number + 1] - sums[start]) / (number + 1 - start))
        for number, start in enumerate(starts)
    ]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _layout(train: list[Point], validation: list[Point], title: str) -> list[tuple]:
    """("line", points, colour, width), ("dot", point, colour) and ("text", point, words, anchor) in pixels."""
    everything = train + validation
    first, last = min(x for x, _ in everything), max(x for x, _ in everything)
    low, high = min(y for _, y in everything), max(y for _, y in everything)
    last, high = max(last, first + 1), max(high, low + 1e-6)

    def place(point: Point) -> Point:
        across = LEFT + (point[0] - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (point[1] - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    base = HEIGHT - BOTTOM
    shapes: list[tuple] = [
        ("line", [(LEFT, TOP), (LEFT, base), (WIDTH - RIGHT, base)], GREY, 1),
        ("text", (WIDTH / 2, 20), title, "middle"),
        ("text", (WIDTH / 2, HEIGHT - 10), "step", "middle"),
        ("text", (LEFT + 10, TOP + 4), "loss", "start"),
    ]
    for tick in ticks(low, high):
        shapes += [("line", [(LEFT - 4, place((first, tick))[1]), (LEFT, place((first, tick))[1])], GREY, 1)]
        shapes += [("text", (LEFT - 8, place((first, tick))[1] + 4), f"{tick:.4g}", "end")]
    for tick in ticks(first, last):
        shapes += [("line", [(place((tick, low))[0], base), (place((tick, low))[0], base + 4)], GREY, 1)]
        shapes += [("text", (place((tick, low))[0], base + 18), f"{tick:g}", "middle")]
    shapes += [("line", [place(point) for point in train], FAINT, 1)]
    shapes += [("line", [place(point) for point in smooth(train, max(1, len(train) // 50))], STRONG, 2)]
    shapes += [("text", (WIDTH - RIGHT, TOP + 4), "training", "end", STRONG)]
    if validation:
        shapes += [("line", [place(point) for point in validation], VALIDATION, 2)]
        shapes += [("dot", place(point), VALIDATION) for point in validation]
        shapes += [("text", (WIDTH - RIGHT, TOP + 20), "validation", "end", VALIDATION)]
    return shapes


def as_svg(shapes: list[tuple]) -> str:
    parts = []
    for kind, at, *rest in shapes:
        if kind == "line":
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{rest[0]}" stroke-width="{rest[1]}"/>')
        elif kind == "dot":
            parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3" fill="{rest[0]}"/>')
        else:
            colour = rest[2] if len(rest) > 2 else "#333333"
            where = f'x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{rest[1]}" fill="{colour}"'
            parts.append(f"<text {where}>{escape(rest[0])}</text>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def as_png(shapes: list[tuple]) -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    for kind, at, *rest in shapes:
        if kind == "line":
            pen.line(at if len(at) > 1 else at * 2, fill=rest[0], width=rest[1])
        elif kind == "dot":
            pen.ellipse((at[0] - 3, at[1] - 3, at[0] + 3, at[1] + 3), fill=rest[0])
        else:
            colour = rest[2] if len(rest) > 2 else "#333333"
            width = pen.textlength(rest[0])
            left = at[0] - {"start": 0, "middle": width / 2, "end": width}[rest[1]]
            pen.text((left, at[1] - 11), rest[0], fill=colour)
    return image
