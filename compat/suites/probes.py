"""What the checks are made of: probe rows, and the few comparisons they share.

A row is written before any layout: -1 stands for a picture, values come back for the text tokens alone.
Tolerances are relative to the root mean square of the logits, so that a freshly initialised model, whose
logits are small, is not let off. A NaN never counts as equal.
"""

from __future__ import annotations

import numpy as np
import pytest

IMAGE = -1
IGNORED = -100
SAME = 1e-4  # of the logits' RMS: fp32 sums in another order stay below 1e-5, a leak does not
EXACT = 1e-6  # the same sums again: only rounding on the way to disk would show
DECISIVE = 1e-3  # top-2 margin, of the logits' RMS, from which argmax says something


class Probes:
    """Rows for one model, from what `describe` said: ids it knows, pictures it insists on."""

    def __init__(self, facts: dict):
        self.facts = facts
        self.ids = [int(i) for i in facts["text_ids"]]
        assert self.ids, "the model has no ordinary token id to build a prompt from"

    def text(self, length: int, seed: int = 0) -> list[int]:
        """`length` token ids, the same ones for the same seed, neighbours always different."""
        draws = np.random.default_rng([seed, length]).integers(0, len(self.ids), size=length)
        return [self.ids[int(i)] for i in draws]

    def row(
        self,
        length: int = 10,
        seed: int = 0,
        images: tuple[int, ...] = (0,),
        labels: str | None = None,
        tokens: list[int] | None = None,
    ) -> dict:
        """A row of `length` text tokens after its pictures; one unless a check is about their number.

        labels: None, "all" (every next token) or "last" (the final one alone).
        """
        text = self.text(length, seed) if tokens is None else list(tokens)
        row = {"tokens": [IMAGE] * len(images) + text, "images": list(images)}
        if labels:
            following = [*text[1:], IGNORED]
            if labels == "last":
                following[:-2] = [IGNORED] * (len(text) - 2)
            row["labels"] = [IGNORED] * len(images) + following
        return row

    def takes(self, what: str) -> bool:
        return self.facts["takes"][what]

    def need(self, what: str, reason: str) -> None:
        if not self.takes(what):
            pytest.skip(reason)


def text_of(row: dict) -> list[int]:
    return [token for token in row["tokens"] if token != IMAGE]


def labels_of(row: dict) -> np.ndarray:
    """Labels at the text tokens, as the logits are given back."""
    return np.array(
        [label for label, token in zip(row["labels"], row["tokens"], strict=True) if token != IMAGE]
    )


def logits_of(reply: dict, rows: list[dict], vocab_size: int) -> list[np.ndarray]:
    """Each row's logits (T_text, V) in float64. Fails where they are missing, of another shape or NaN."""
    found = []
    for number, row in enumerate(rows):
        assert f"logits.{number}" in reply, f"forward gave no logits for row {number} of {len(rows)}"
        logits = np.asarray(reply[f"logits.{number}"], dtype=np.float64)
        want = (len(text_of(row)), vocab_size)
        assert logits.shape == want, (
            f"logits of row {number} have shape {logits.shape}, expected {want} (text tokens, vocabulary): "
            "are image positions cut off in the wrong place, or the head of another size than the vocabulary?"
        )
        assert np.isfinite(logits).all(), (
            f"{count_bad(logits)} of row {number}'s {logits.size:,} logits are NaN or infinite"
        )
        assert logits.std() > 0, (
            f"all logits of row {number} are the same number ({logits.flat[0]:g}): the model says nothing"
        )
        found.append(logits)
    return found


def count_bad(values: np.ndarray) -> str:
    return f"{int((~np.isfinite(values)).sum()):,}"


def forward(ask, facts: dict, rows: list[dict], **parameters) -> list[np.ndarray]:
    return logits_of(ask("forward", rows=rows, **parameters), rows, facts["vocab_size"])


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the RMS of `b`; NaN where either holds one."""
    return float(np.max(np.abs(a - b)) / max(rms(b), 1e-30)) if a.size else 0.0


def assert_same(a: np.ndarray, b: np.ndarray, what: str, cause: str, tolerance: float = SAME) -> None:
    """`a` equals the reference `b` within `tolerance` of its RMS; `what` and `cause` make the message."""
    assert a.shape == b.shape, f"{what}: shape {a.shape} against {b.shape}. {cause}"
    off = distance(a, b)
    assert off <= tolerance, (
        f"{what}: they differ by {off:.1e} of the logits' size, allowed {tolerance:.0e}. {cause}"
    )


def assert_differ(a: np.ndarray, b: np.ndarray, what: str, cause: str) -> None:
    """The opposite: far more apart than rounding could put them."""
    off = distance(a, b)
    assert off > 1e-5, f"{what}: the logits differ by only {off:.1e} of their size. {cause}"


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """(sum of -log p(label) over labelled positions, how many there are)."""
    places = np.flatnonzero(labels != IGNORED)
    chosen = logits[places]
    top = chosen.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(chosen - top).sum(axis=-1)) + top[:, 0]
    return float((log_total - chosen[np.arange(len(places)), labels[places]]).sum()), len(places)


def mean_loss(logits: list[np.ndarray], rows: list[dict]) -> float:
    """Cross entropy over every labelled position of every row, as `ignore_index=-100` means it."""
    parts = [cross_entropy(values, labels_of(row)) for values, row in zip(logits, rows, strict=True)]
    return sum(total for total, _ in parts) / sum(count for _, count in parts)


def margins(logits: np.ndarray) -> np.ndarray:
    """Top-2 margin at each position, in units of the logits' RMS."""
    top = np.sort(logits, axis=-1)[:, -2:]
    return (top[:, 1] - top[:, 0]) / max(rms(logits), 1e-30)


def named(items: list[str], limit: int = 6) -> str:
    """`a, b, c and 12 more`."""
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")
