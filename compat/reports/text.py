"""Hostile text made harmless: what a fork says may hold escapes, fences, bidi marks, megabytes of noise."""

from __future__ import annotations

import re
import unicodedata

# CSI and OSC sequences first, then two-character escapes; what is left of a torn one falls to `printable`.
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
_SAFE = re.compile(r"[^\w .,:;+/()@='-]")


def printable(text: str) -> str:
    """Without terminal sequences and control, formatting (bidi) and surrogate characters.

    Newlines and tabs stay.
    """
    text = _ANSI.sub("", text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def one_line(text: str, limit: int = 300) -> str:
    """Printable text on one line of at most `limit` characters, cut with an ellipsis."""
    line = " ".join(printable(text[: 8 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def code(text: str, limit: int = 300) -> str:
    """A markdown code span. A backtick inside becomes an apostrophe: nothing can end the span early."""
    return "`" + (one_line(text, limit).replace("`", "'") or "(no text)") + "`"


def word(text: str, limit: int = 80) -> str:
    """For text outside a code span: letters, digits and plain punctuation only, so no markup survives."""
    return _SAFE.sub("?", one_line(str(text), limit)) or "unknown"
