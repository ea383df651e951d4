"""Inline SVG: a line a figure, a strip a check. Attributes alone, no style, so that a strict policy lets them draw."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, PAD = 240, 56, 6  # of a line chart, in its own units
CELL = 10  # of a strip
CODES = {"passed": "p", "failed": "f", "error": "e", "skipped": "s"}


def line(values: Sequence[float], label: str) -> str:
    """A line from oldest to newest with a dot on the newest; one value is the dot alone."""
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    step = (WIDTH - 2 * PAD) / max(1, len(values) - 1)
    flat = high == low

    def place(number: int) -> str:
        y = HEIGHT / 2 if flat else HEIGHT - PAD - (values[number] - low) / spread * (HEIGHT - 2 * PAD)
        return f"{PAD + number * step:.4g},{y:.4g}"

    points = [place(number) for number in range(len(values))]
    x, y = points[-1].split(",")
    return (
        f'<svg class="line" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(label[:300])}</title>'
        + (f'<polyline points="{" ".join(points)}"/>' if len(points) > 1 else "")
        + f'<circle cx="{x}" cy="{y}" r="3.5"/></svg>'
    )


def strip(statuses: Sequence[str | None], label: str) -> str:
    """A cell a run, oldest first; None is a run that did not ask. One path a status keeps two hundred runs small."""
    paths: dict[str, list[str]] = {}
    for number, status in enumerate(statuses):
        if status:
            # A failure is a full cell, the rest are lower: seen without colour too.
            top = {"failed": 0, "error": 0, "skipped": 8}.get(status, 3)
            paths.setdefault(CODES[status], []).append(f"M{number * CELL} {top}h8v{14 - top}h-8z")
    drawn = "".join(f'<path class="{code}" d="{"".join(cells)}"/>' for code, cells in paths.items())
    width = max(1, len(statuses)) * CELL
    return (
        f'<svg class="strip" viewBox="0 0 {width} 14" width="{min(width, 600)}" height="14" '
        f'preserveAspectRatio="none" role="img"><title>{escape(label[:300])}</title>{drawn}</svg>'
    )
