"""Accuracy against TFLOPs as a picture, PNG and SVG: a dot for each setting, a line along the front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanovlm import checkpoint
from nanovlm.errors import ConfigError
from nanovlm.evaluate.grid import Row, front
from nanovlm.train.curve import BOTTOM, GREY, HEIGHT, LEFT, RIGHT, STRONG, TOP, VALIDATION, WIDTH, as_png, as_svg, ticks

FAINT = "#9aa7b5"


def draw(rows: Sequence[Row], folder: Path, floor: float, chosen: Row | None) -> list[Path]:
    """Write front.png and front.svg."""
    shapes = layout(rows, floor, chosen)
    svg, png = folder / "front.svg", folder / "front.png"
    checkpoint.write_text(svg, as_svg(shapes))
    with checkpoint.replacing(png) as temporary:
        as_png(shapes).save(temporary, format="PNG")
    return [png, svg]


def layout(rows: Sequence[Row], floor: float, chosen: Row | None) -> list[tuple]:
    """Shapes as ``train.curve`` draws them."""
    possible = [row for row in rows if not row.problem]
    if not possible:
        raise ConfigError("nothing to draw: not one setting is possible")
    most = 1.05 * max(row.tflops for row in possible) * 1e3  # GFLOPs

    def place(gflops: float, accuracy: float) -> tuple[float, float]:
        across = LEFT + gflops / most * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - accuracy * (HEIGHT - TOP - BOTTOM)

    base = HEIGHT - BOTTOM
    shapes: list[tuple] = [
        ("line", [(LEFT, TOP), (LEFT, base), (WIDTH - RIGHT, base)], GREY, 1),
        ("text", (WIDTH / 2, HEIGHT - 10), "GFLOPs a question", "middle"),
        ("text", (LEFT + 10, TOP + 4), "accuracy", "start"),
        ("line", [place(0, floor), place(most, floor)], GREY, 1),
        ("text", (WIDTH - RIGHT, place(0, floor)[1] - 4), f"floor {floor:g}", "end"),
    ]
    for tick in ticks(0, most):
        shapes.append(("line", [(place(tick, 0)[0], base), (place(tick, 0)[0], base + 4)], GREY, 1))
        shapes.append(("text", (place(tick, 0)[0], base + 18), f"{tick:g}", "middle"))
    for tick in ticks(0, 1):
        shapes.append(("line", [(LEFT - 4, place(0, tick)[1]), (LEFT, place(0, tick)[1])], GREY, 1))
        shapes.append(("text", (LEFT - 8, place(0, tick)[1] + 4), f"{tick:.1f}", "end"))
    best = front(possible)
    shapes.append(("line", [place(1e3 * row.tflops, row.accuracy) for row in best], STRONG, 2))
    for row in possible:
        at = place(1e3 * row.tflops, row.accuracy)
        mine = chosen is not None and row.name == chosen.name
        colour = VALIDATION if mine else STRONG if row in best else FAINT
        shapes.append(("dot", at, colour))
    below = float(HEIGHT)
    for row in best:  # upwards; a name stands where no line is, and not on the one below it
        across, up = place(1e3 * row.tflops, row.accuracy)
        end = across > WIDTH * 0.8
        below = min(up - 8 if end else up + 16, below - 13)
        colour = VALIDATION if chosen is not None and row.name == chosen.name else STRONG
        shapes.append(("text", (across + (0 if end else 8), below), row.name, "end" if end else "start", colour))
    return shapes
