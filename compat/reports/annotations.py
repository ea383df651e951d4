"""GitHub Actions: annotations as workflow commands, and the job summary. compat.actions keeps others from either."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from compat.reports.machine import Item, place
from compat.reports.text import one_line
from compat.result import Run

MOST = 10  # annotations of one level that GitHub shows of a step
SUMMARY_BYTES = 2**20  # of a step; with more GitHub shows none of it
CUT = "\n\n(cut: a job summary holds 1 MiB)\n"
WORD = {"error": "error", "warning": "warning", "note": "notice"}


def lines(items: Iterable[Item], run: Run | None, root: Path) -> list[str]:
    """A workflow command an item, the worst first, at most MOST of a level; what is left out is counted."""
    told = []
    for level, word in WORD.items():
        found = [item for item in items if item.level == level and not item.waived]
        for item in found[: MOST - (len(found) > MOST)]:
            told.append(_command(word, item, run, root))
        if len(found) > MOST:
            told.append(f"::{word} title=compat::and {len(found) - MOST + 1} more; the job summary has them")
    return told


def _command(word: str, item: Item, run: Run | None, root: Path) -> str:
    file, line = place(item, run, root)
    title = one_line(f"{item.rule} {item.check or item.path}", 200)
    told = {"file": file, "line": str(line)} if file else {}
    combos = f" [{', '.join(item.combos)}]" if item.combos else ""
    subject = f"{item.path}: " if item.path else ""
    text = one_line(f"{subject}{item.text}{combos}" + (f" | fix: {item.fix}" if item.fix else ""), 1000)
    properties = ",".join(f"{name}={_property(value)}" for name, value in (told | {"title": title}).items())
    return f"::{word} {properties}::{_data(text)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def root() -> Path:
    """What annotations name files from: the checkout of the job."""
    return Path(os.environ.get("GITHUB_WORKSPACE") or ".")


def append_summary(markdown: str) -> None:
    """Add to the page of the job. Raises OSError."""
    where = os.environ.get("GITHUB_STEP_SUMMARY")
    if not where:
        return
    path = Path(where)
    room = SUMMARY_BYTES - (path.stat().st_size if path.exists() else 0)
    data = (markdown.rstrip("\n") + "\n\n").encode("utf-8", "replace")
    if len(data) > room:
        keep = room - len(CUT.encode())
        if keep <= 0:
            return
        data = data[:keep].decode("utf-8", "ignore").rpartition("\n")[0].encode() + CUT.encode()
    with open(path, "ab") as file:
        file.write(data)
