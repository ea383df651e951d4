"""One file a dialect. The first whose ``speaks`` says yes to a model's signature is used."""

from __future__ import annotations

import importlib

# Most particular first; a new dialect is one file and one line here.
DIALECTS = ("idefics3", "nanovlm", "single_image", "upstream")


def choose(subject):
    """The Adapter class for a Subject, or None when no dialect speaks it."""
    for name in DIALECTS:
        adapter = importlib.import_module(f"{__name__}.{name}").Adapter
        if adapter.speaks(subject):
            return adapter
    return None
