"""A garbled log put right: status marks and heading emoji, as far as it can be proved, and not a byte more."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from compat.reports.marks import GARBLED, LONGEST_FIRST, collapsed, from_heading, ungarbled

KEYS = "|".join(re.escape(text) for text in LONGEST_FIRST if text in GARBLED)
PLACE = re.compile(rf"(^\s*[-*] |(?:^|\s)[^`]*: |^#+ )({KEYS})(?=\s|$)")
HEADING = re.compile(r"(#+ )([^\x00-\x7f]+(?:[ \xa0][^\x00-\x7f]+)*)( ?)(.*)$")
FENCE = re.compile(r"\s*(```|~~~)")
GARBLE = re.compile(r"[^\x00-\x7f]{2,}")
SIGNS = re.compile("[âÃÂğð][^\x00-\x7f]|\ufffd|[\udc80-\udcff]")  # first bytes of UTF-8 as a code page shows them


@dataclass
class Repaired:
    """changes: (line, before, after, how it is known). unproved: (line, what stands there, why it stays)."""

    data: bytes
    changes: list[tuple[int, str, str, str]] = field(default_factory=list)
    unproved: list[tuple[int, str, str]] = field(default_factory=list)


def repair(data: bytes) -> Repaired:
    """Every line on its own; bytes that are no UTF-8 come through as they are."""
    found = Repaired(b"")
    text = data.decode("utf-8", "surrogateescape")
    fenced, out = "", []
    for number, line in enumerate(text.split("\n"), 1):
        fence = FENCE.match(line)
        if fence and fenced in ("", fence[1]):
            fenced = "" if fenced else fence[1]
        elif not fenced:
            line = mend(line, number, found)
        if not fence:
            look(line, number, found)
        out.append(line)
    found.data = "\n".join(out).encode("utf-8", "surrogateescape")
    return found


def mend(line: str, number: int, found: Repaired) -> str:
    if match := HEADING.match(line):
        hashes, written, space, words = match.groups()
        emoji = GARBLED.get(written)
        how = "exact"
        if emoji is None and (whole := ungarbled(written)):
            emoji = whole
        elif emoji is None and (emoji := from_heading(written, words)):
            how = "a byte is lost; from the heading's words"
        if emoji is None:
            return line
        found.changes.append((number, written, emoji, how))
        return f"{hashes}{emoji}{space}{words}"
    match = PLACE.search(line)
    if not match:
        return line
    mark = GARBLED[match[2]]
    found.changes.append((number, match[2], mark, "exact"))
    return line[: match.start(2)] + mark + line[match.end(2) :]


def look(line: str, number: int, found: Repaired) -> None:
    """What still looks garbled after the line was mended, and why it stays."""
    for match in GARBLE.finditer(line):
        written = match[0]
        if whole := ungarbled(written):
            found.unproved.append((number, written, f"reads as {whole} in UTF-8, but is no status mark or heading"))
        elif SIGNS.search(written):
            fits = sorted(collapsed(written))
            why = f"a byte is lost; it could be {' '.join(fits)}" if fits else "bytes are lost, or it was never garbled"
            found.unproved.append((number, written, why))
    single = [c for c in line if c == "\ufffd" or "\udc80" <= c <= "\udcff"]
    if single and not any(entry[0] == number for entry in found.unproved):
        found.unproved.append((number, single[0], "a character is lost, or a byte is no UTF-8"))
