"""Hostile text made harmless: what a fork says may hold escapes, fences, bidi marks, megabytes of noise."""

from __future__ import annotations

import re
import unicodedata

# CSI and OSC sequences first, then two-character escapes; what is left of a torn one falls to `printable`.
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
# What `printable` takes out, as one pattern: a whole page has too many characters to look up one by one.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SAFE = re.compile(r"[^\w .,:;+/()@='-]")


def printable(text: str) -> str:
    """Without terminal sequences and control, formatting (bidi) and surrogate characters.

    Newlines and tabs stay.
    """
    text = _ANSI.sub("", text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def visible(text: str) -> str:
    """`printable` for a whole page."""
    return _UNSEEN.sub("", _ANSI.sub("", text))


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


def link(path: str, limit: int = 300) -> str:
    """A markdown link whose text is the path; a path with anything unusual in it is a code span, and no link."""
    text = str(path)
    return f"[{code(text, limit)}]({text})" if re.fullmatch(r"[\w./-]{1,300}", text, re.ASCII) else code(text, limit)


def prose(text: str, limit: int = 600) -> str:
    """Somebody's own words as one line of markdown: their emphasis and code stay, a tag or comment does not begin."""
    return one_line(text, limit).replace("<", "&lt;")
