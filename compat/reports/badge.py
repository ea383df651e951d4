"""A badge: how many checks of the newest run's target pass now, as an SVG by itself or as JSON for a badge server."""

from __future__ import annotations

import json
from html import escape

from compat.reports.history import BAD, History
from compat.reports.text import one_line
from compat.result import FAILED, PASSED, SKIPPED

LABEL = "compat"
COLOURS = {"green": "#2c7a2c", "red": "#b3261e", "orange": "#8a5a00", "grey": "#5f6368"}  # white text reads on each
PER_CHARACTER, PAD = 6.6, 12  # of sans-serif at 11 px, in px; textLength fits the text to it


def message(history: History) -> tuple[str, str]:
    """(text, colour). What no run asked counts neither way."""
    if not history.runs:
        return "no runs", "grey"
    label = str(history.runs[-1].target.get("label", ""))
    states = [s for s in history.current() if s.row.target == label and s.status != SKIPPED]
    if not states:
        return "nothing asked", "grey"
    bad = [state.status for state in states if state.status in BAD]
    text = f"{sum(state.status == PASSED for state in states)}/{len(states)} passed"
    return text, "red" if FAILED in bad else "orange" if bad else "green"


def shields(history: History) -> str:
    """The JSON of an endpoint badge: https://shields.io/badges/endpoint-badge."""
    text, colour = message(history)
    told = {"schemaVersion": 1, "label": LABEL, "message": text, "color": COLOURS[colour].removeprefix("#")}
    return json.dumps(told, indent=1) + "\n"


def svg(history: History) -> str:
    """Self-contained: no font, style or picture from elsewhere, no script."""
    text, colour = message(history)
    text = escape(one_line(text, 60))
    left, right = (round(len(part) * PER_CHARACTER) + PAD for part in (LABEL, text))
    whole = left + right

    def written(part: str, x: int, width: int) -> str:
        return f'<text x="{x + width / 2:g}" y="14" textLength="{width - PAD}">{part}</text>'

    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="20" role="img" aria-label="{LABEL}: {text}">'
        f"<title>{LABEL}: {text}</title>"
        f'<rect width="{whole}" height="20" rx="3" fill="{COLOURS[colour]}"/>'
        f'<path d="M3 0h{left - 3}v20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#3c4043"/>'
        '<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f"{written(LABEL, 0, left)}{written(text, left, right)}</g></svg>\n"
    )
