"""One row of a data set, whoever wrote it -> pictures and turns, or BadRow with the reason.

Unusual: a picture is opened, not decoded: its size is known, and a text's length with it, before any pixel is.

Row formats: the Cauldron and FineVision (https://huggingface.co/datasets/HuggingFaceM4/FineVision), DoclingMatix
and SynthFormulaNet, whose turns name a source besides, and A-OKVQA through ``multiple_choice``.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from nanovlm.errors import BadRow

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Conversation:
    """What a row says: pictures whose pixels may not be decoded yet, and (user, assistant) in order."""

    pictures: list[Image.Image]
    turns: list[tuple[str, str]]


@dataclass(frozen=True)
class Reader:
    """Reads rows. ``min_ratings``: {rating: least}; a turn that was rated lower is left out."""

    min_ratings: Mapping[str, int] = field(default_factory=dict)
    max_pictures: int | None = None

    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        """Raises BadRow."""
        if not isinstance(row, Mapping):
            raise BadRow("no text", f"a row is a dict with images and texts, got {type(row).__name__}")
        turns = self._turns(row)
        sources = _pictures(row)
        if self.max_pictures is not None and len(sources) > self.max_pictures:
            raise BadRow(
                "too many pictures",
                f"{len(sources)} pictures; max_images_per_example={self.max_pictures}",
            )
        return Conversation([open_lazily(source) for source in sources], turns)

    def _turns(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        texts = row.get("texts")
        texts = [texts] if isinstance(texts, Mapping) else texts
        if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
            raise BadRow("no text", f"texts is {texts!r:.60}; expected [{{'user': ..., 'assistant': ...}}, ...]")
        kept = []
        for number, turn in enumerate(texts):
            said = turn if isinstance(turn, Mapping) else {}
            user, assistant = said.get("user"), said.get("assistant")
            if not isinstance(user, str) or not isinstance(assistant, str):
                raise BadRow("no text", f"turn {number} is {turn!r:.60}; expected user and assistant, two texts")
            if all(_rating(row, name, number) >= least for name, least in self.min_ratings.items()):
                kept.append((user, assistant))
        if not kept:
            raise BadRow("rating", f"each of the {len(texts)} turns is rated below {dict(self.min_ratings)}")
        if not any(answer.strip() for _, answer in kept):
            raise BadRow("no answer", "the assistant says nothing in any turn")
        return kept


def _rating(row: Mapping[str, Any], name: str, turn: int) -> float:
    """What a turn was rated; unrated turns pass."""
    ratings = row.get(f"{name}_ratings")
    rating = ratings[turn] if isinstance(ratings, Sequence) and turn < len(ratings) else None
    return float("inf") if rating is None else rating


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    sources = row.get("images", row.get("image"))
    if sources is None:
        return []
    return list(sources) if isinstance(sources, list | tuple) else [sources]


def open_lazily(source: Any) -> Image.Image:
    """A PIL image, encoded bytes, a path, or the Hub's {"bytes", "path"} -> a picture whose size is known.

    Raises BadRow.
    """
    if isinstance(source, Image.Image):
        return source
    where = "a picture"
    if isinstance(source, Mapping):
        where = str(source.get("path") or where)
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str | os.PathLike):
        where = str(source)
        try:
            source = Path(source).read_bytes()  # no handle stays open while the row waits
        except (OSError, ValueError) as error:
            raise BadRow("unreadable picture", f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(source, bytes | bytearray):
        raise BadRow("no picture", f"{where} is {type(source).__name__}, expected PIL, bytes or a path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is refused later
            return Image.open(io.BytesIO(source))
    except UnidentifiedImageError:
        raise BadRow("unreadable picture", f"{where} is no picture in a format that PIL reads") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRow("unreadable picture", f"{where}: {error}") from None


# -- tasks ----------------------------------------------------------------------------------------------


def choice_question(question: str, options: Sequence[str]) -> str:
    """A question with lettered options, to be answered with a letter."""
    if not 1 < len(options) <= len(LETTERS):
        raise BadRow("no choice", f"{len(options)} options; expected 2 to {len(LETTERS)}")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\nChoices:\n{listed}\nAnswer with the letter."


def multiple_choice(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of A-OKVQA (image, question, choices, correct_choice_idx) -> one turn, answered by a letter.

    Source: https://huggingface.co/datasets/HuggingFaceM4/A-OKVQA. Raises BadRow; a test split has no answers.
    """
    options, right = row.get("choices"), row.get("correct_choice_idx")
    if not isinstance(row.get("question"), str) or not isinstance(options, Sequence) or isinstance(options, str):
        raise BadRow("no choice", "no question with choices; --task aokvqa-mcq reads question, choices, image")
    asked = choice_question(row["question"], options)
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise BadRow("no choice", f"correct_choice_idx={right!r} is none of {len(options)} choices")
    if row.get("image") is None and not row.get("images"):
        raise BadRow("no picture", "a question about a picture, without the picture")
    texts = [{"user": asked, "assistant": LETTERS[right]}]
    return {"images": _pictures(row), "texts": texts, "id": row.get("question_id") or row.get("id")}


TASKS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"aokvqa-mcq": multiple_choice}
