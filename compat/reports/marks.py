"""Status marks and heading emoji, and what they become when UTF-8 was read as a one-byte code page.

Unusual: nothing is guessed from likeness. A garbled mark is looked up in a table made by garbling the marks
themselves; a code page has bytes without a character, which are lost on the way, so the table is also made
without them. A garbled text that could come from two marks is in no table.
"""

from __future__ import annotations

import re
import unicodedata

from compat.result import ERROR, FAILED, PASSED, SKIPPED

MARK = {PASSED: "✅", FAILED: "❌", ERROR: "⚠️", SKIPPED: "⏳"}
STATUS = {"✅": PASSED, "❌": FAILED, "⚠️": ERROR, "⚠": ERROR, "⏳": SKIPPED}
CODE_PAGES = ("cp1252", "cp1254", "latin-1", "mac_roman")
LOST = ("", "\ufffd", "?")  # what editors leave of a byte that their code page has no character for
HEADINGS = {  # emoji -> words of a heading that it stands for, in logs of this form
    "📝": ("detailed", "results", "notes", "log", "entries"),
    "🔍": ("analysis", "code", "search", "review"),
    "📞": ("contact", "contacts", "phone"),
    "📁": ("files", "folder", "folders", "directory"),
    "📍": ("location", "place", "milestone", "milestones"),
    "📏": ("size", "sizes", "length", "measure"),
    "📐": ("geometry", "shapes", "dimensions"),
    "📎": ("attachments", "attachment", "links"),
    "🔐": ("security", "secrets", "credentials"),
}


def garbled(text: str, page: str, lost: str) -> str:
    """`text` as somebody sees it whose editor took its UTF-8 for `page`."""
    return "".join(character(byte, page) or lost for byte in text.encode("utf-8"))


def character(byte: int, page: str) -> str:
    try:
        return bytes([byte]).decode(page)
    except UnicodeDecodeError:
        return ""


def table() -> dict[str, str]:
    """{garbled mark: mark}, one round of garbling or two."""
    found: dict[str, set[str]] = {}
    for mark in MARK.values():
        for bare in {mark, mark.rstrip("\ufe0f")}:
            for page in CODE_PAGES:
                for lost in LOST:
                    once = garbled(bare, page, lost)
                    for text in (once, once.replace("\xa0", " ").rstrip(), garbled(once, page, lost)):
                        if text and not text.isascii():
                            found.setdefault(text, set()).add(mark)
    return {text: marks.pop() for text, marks in found.items() if len(marks) == 1}


GARBLED = table()
LONGEST_FIRST = sorted([*GARBLED, *STATUS], key=len, reverse=True)
LEADING = re.compile("|".join(map(re.escape, LONGEST_FIRST)))


def leading_mark(text: str) -> tuple[str, str, str] | None:
    """(mark, how it is written, the rest) of a text that begins with a status mark, garbled or not."""
    match = LEADING.match(text)
    if not match or text[match.end() : match.end() + 1].strip():
        return None
    written = match[0]
    mark = GARBLED.get(written) or MARK[STATUS[written]]
    return mark, written, text[match.end() :].lstrip()


def ungarbled(text: str) -> str | None:
    """What `text` was, if one code page takes it back to UTF-8 whole."""
    found = set()
    for page in CODE_PAGES:
        try:
            found.add(text.encode(page).decode("utf-8"))
        except (UnicodeEncodeError, UnicodeDecodeError):
            continue
    return found.pop() if len(found) == 1 and found != {text} else None


def collapsed(text: str) -> set[str]:
    """Every emoji of one character that `text` could be the rest of, a byte being lost."""
    found = set()
    for page in ("cp1252", "cp1254"):  # the ones with bytes that have no character
        lost = [bytes([b]) for b in range(128, 256) if not character(b, page)]
        try:
            raw = "".join(c for c in text if c != "\ufffd").encode(page)
        except UnicodeEncodeError:
            continue
        for at in range(1, len(raw) + 1):
            for byte in lost:
                try:
                    whole = (raw[:at] + byte + raw[at:]).decode("utf-8")
                except UnicodeDecodeError:
                    continue
                if len(whole) == 1 and unicodedata.category(whole) == "So":
                    found.add(whole)
    return found


def from_heading(text: str, heading: str) -> str | None:
    """The emoji of a collapsed text that the heading's words stand for; None unless it is one alone."""
    words = set(re.findall(r"[a-z]+", heading.lower()))
    fits = [emoji for emoji in collapsed(text) if words & set(HEADINGS.get(emoji, ()))]
    return fits[0] if len(fits) == 1 else None
