"""Rows -> samples: ids, labels shifted once, tiles.

Unusual: everything but the pixels is made first. ``encode`` knows a text's length from the pictures' sizes alone,
so what does not fit is dropped, and what is to be packed waits, without a picture in memory.

T tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from nanovlm import prompts
from nanovlm.data.rows import RATINGS, TASKS, Reader
from nanovlm.errors import BadRow, ConfigError, NanoVLMError

log = logging.getLogger(__name__)
IGNORED = -100
Processor = Callable[[Image.Image], tuple[Tensor, tuple[int, int]]]
TURNED = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Encoded:
    """A sample before its pictures are decoded; ``neutralised`` counts image tokens found in its words."""

    id: str
    input_ids: list[int]
    labels: list[int]
    pictures: list[Image.Image]
    grids: list[tuple[int, int]]
    neutralised: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Row -> Encoded -> sample.

    tokens_per_cell: image tokens of each cell of the processor's grid (a config's ``tokens_per_cell``).
    max_length: of a sample; a longer one is a BadRow, because a cut one would teach unfinished answers.
    task: one of TASKS, applied to each row first.
    """

    def __init__(
        self,
        tokenizer,
        image_processor: Processor,
        tokens_per_cell: int,
        reader: Reader | None = None,
        max_length: int | None = None,
        task: str | None = None,
    ) -> None:
        if task is not None and task not in TASKS:
            raise ConfigError(f"no task {task!r}; there are: {', '.join(TASKS)}")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.tokens_per_cell = tokens_per_cell
        self.reader = reader or Reader()
        self.max_length = max_length
        self.task = task
        self.image_tokens = tuple(tokenizer.extra_tokens.values())

    def encode(self, row: Mapping[str, Any], name: str) -> Encoded:
        """Raises BadRow, its message beginning with the row's name."""
        try:
            if isinstance(row, BadRow):
                raise row
            if self.task is not None:
                row = TASKS[self.task](row)
            name = str(row.get("id") or name)
            return self._encode(row, name)
        except BadRow as error:
            raise BadRow(error.kind, f"{name}: {error}") from None
        except NanoVLMError as error:  # a grid beyond the tile tokens, a picture of no size
            raise BadRow("does not fit the model", f"{name}: {error}") from None

    def _encode(self, row: Mapping[str, Any], name: str) -> Encoded:
        conversation = self.reader(row)
        grids = [grid_of(self.image_processor, picture) for picture in conversation.pictures]
        pictures = prompts.image_string(self.tokenizer, grids, self.tokens_per_cell)
        ids, taught = prompts.conversation(self.tokenizer, conversation.turns, pictures)
        if self.max_length is not None and len(ids) > self.max_length:
            raise BadRow("too long", f"{len(ids)} tokens; at most {self.max_length} fit")
        labels = [i if mask else IGNORED for i, mask in zip(ids, taught, strict=True)]
        words = [words for turn in conversation.turns for words in turn]
        found = sum(len(prompts.special_spans(text, self.image_tokens)) for text in words)
        return Encoded(name, ids, [*labels[1:], IGNORED], conversation.pictures, grids, found)

    def finish(self, encoded: Encoded) -> dict[str, Any]:
        """The sample, its pictures decoded. Raises BadRow."""
        images = []
        for picture, planned in zip(encoded.pictures, encoded.grids, strict=True):
            try:
                tiles, grid = self.image_processor(picture)
            except NanoVLMError as error:
                raise BadRow("unreadable picture", f"{encoded.id}: {error}") from None
            if tuple(grid) != tuple(planned):
                raise BadRow(
                    "unreadable picture",
                    f"{encoded.id}: its header promised {planned} cells, the picture has {tuple(grid)}",
                )
            images.append(tiles)
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "images": images,
            "id": encoded.id,
        }

    def __call__(self, row: Mapping[str, Any], name: str) -> dict[str, Any]:
        return self.finish(self.encode(row, name))


class VQADataset(Dataset):
    """Samples of a data set with a length. A row that cannot be used raises BadRow.

    Arguments are upstream's, so that its scripts run: rows, tokenizer, image processor, image tokens of a cell.
    """

    def __init__(
        self,
        dataset,
        tokenizer,
        image_processor: Processor,
        mp_image_token_length: int,
        relevance_min_rating: int = 1,
        image_correspondence_min_rating: int = 1,
        visual_dependency_min_rating: int = 1,
        formatting_min_rating: int = 1,
        **options: Any,
    ) -> None:
        least = (
            relevance_min_rating,
            image_correspondence_min_rating,
            visual_dependency_min_rating,
            formatting_min_rating,
        )
        reader = Reader(dict(zip(RATINGS, least, strict=True)), options.pop("max_pictures", None))
        self.dataset = dataset
        self.encoder = Encoder(tokenizer, image_processor, mp_image_token_length, reader, **options)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.encoder(self.dataset[index], f"row {index}")


class VQAIterableDataset(IterableDataset):
    """Samples of a data set that is only read forward. Rows that cannot be used are counted in ``skipped``."""

    def __init__(self, dataset: Iterable, *arguments: Any, **options: Any) -> None:
        self.rows = VQADataset(dataset, *arguments, **options)
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows.dataset):
            try:
                yield self.rows.encoder(row, f"row {number}")
            except BadRow as error:
                self.skipped[error.kind] += 1
                log.warning("skipped: %s", error)


def grid_of(processor: Processor, picture: Image.Image) -> tuple[int, int]:
    """The (rows, columns) that a processor will make of a picture. One of ours tells from the size alone."""
    grid = getattr(processor, "grid", None)
    if grid is None:
        rows, columns = processor(picture)[1]
        return rows, columns
    width, height = picture.size
    # PNG may name an orientation behind its pixels, and asking would decode them; ``finish`` compares
    exif = picture.info.get("exif") if picture.format == "PNG" else True
    if exif and picture.getexif().get(ORIENTATION) in TURNED:
        width, height = height, width
    return grid(width, height)
