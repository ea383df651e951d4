"""Batches without end, read ahead by workers, that can be taken up again where they were left.

Unusual: a batch travels with the place where the next one begins, so what was read ahead does not matter when a
checkpoint is written. A row that cannot be used is skipped, and counted with the batch it would have been in.
A worker's error comes out of ``next`` as itself.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nanovlm.data.collate import VQACollator
from nanovlm.data.dataset import Encoded, Encoder
from nanovlm.data.packing import SURPLUS, knapsacks
from nanovlm.errors import BadRow, ConfigError, DataError, NanoVLMError

log = logging.getLogger(__name__)
WINDOW = 8  # rows packed at a time, at least
GIVE_UP = 10_000  # unusable rows one after the other


class Lane:
    """What one worker of one rank reads: an endless (or with ``once``, a single) walk from rows to batches."""

    def __init__(self, reading: Reading, number: int, count: int, state: Mapping[str, Any] | None) -> None:
        self.reading = reading
        state = state or {"at": None, "done": [], "waiting": 0, "batch": 0}
        self.cursor = reading.source.cursor(number, count, reading.batch_size, state["at"], reading.once)
        # places since ``anchor``, the oldest cursor state that a waiting document needs
        self.anchors: list[tuple[int, Any]] = [(0, self.cursor.state())]
        self.place = 0
        self.done: set[int] = set(state["done"])
        self.waiting, self.first_batch = state["waiting"], state["batch"]
        self.unusable = 0

    def state(self, batch: int = 0) -> dict[str, Any]:
        """Where a window, or with ``batch`` a batch within it, begins."""
        start, at = self.anchors[0]
        done = sorted(place - start for place in self.done)
        return {"at": at, "done": done, "waiting": self.waiting, "batch": batch}

    def __iter__(self) -> Iterator[tuple[dict | None, dict, Counter]]:
        """(batch, state after it, what it was made of); the last may have no batch, only counts."""
        return self._packs() if self.reading.pack else self._batches()

    def read(self, tally: Counter) -> tuple[int, Encoded]:
        """(place, encoded) of the next usable row. Raises StopIteration."""
        while True:
            name, row = next(self.cursor)
            place = self.place
            self.place += 1
            if place in self.done:
                continue
            try:
                encoded = self.reading.encoder.encode(row, name)
                tally["neutralised"] += encoded.neutralised
                self.unusable = 0
                return place, encoded
            except BadRow as error:
                self.done.add(place)
                self._skip(error, tally)

    def _skip(self, error: BadRow, tally: Counter) -> None:
        tally["skipped", error.kind] += 1
        if not tally["example", error.kind]:
            tally["example", error.kind] = str(error)  # type: ignore[assignment]
        self.unusable += 1
        if self.unusable >= self.reading.patience:
            raise DataError(
                f"{self.unusable} rows one after the other cannot be used; the last: {error.kind}: {error}"
            )

    def _batches(self) -> Iterator[tuple[dict | None, dict, Counter]]:
        tally: Counter = Counter()
        size = self.reading.batch_size
        samples: list[dict] = []
        while True:
            try:
                _, encoded = self.read(tally)
            except StopIteration:
                break
            try:
                samples.append(self.reading.encoder.finish(encoded))
            except BadRow as error:
                self._skip(error, tally)
                continue
            if len(samples) == size:
                self._forget([])
                yield self._made([[sample] for sample in samples], tally), self.state(), tally
                tally, samples = Counter(), []
        self._forget([])
        batch = self._made([[sample] for sample in samples], tally) if samples else None
        yield batch, self.state(), tally

    def _packs(self) -> Iterator[tuple[dict | None, dict, Counter]]:
        reading = self.reading
        count = reading.batch_size * math.ceil(WINDOW / reading.batch_size)
        pool: list[tuple[int, Encoded]] = []
        wanted = SURPLUS * count * reading.max_length
        ended = False
        while not ended:
            tally: Counter = Counter()
            state = self.state()
            while not ended and sum(len(encoded) for _, encoded in pool) < wanted:
                try:
                    pool.append(self.read(tally))
                except StopIteration:
                    ended = True
            sizes = [(len(encoded), len(encoded.pictures)) for _, encoded in pool]
            packs = knapsacks(sizes, reading.max_length, count, reading.max_pictures, self.waiting)
            taken = {index for pack in packs for index in pack}
            if ended and len(taken) < len(pool):
                ended = False  # what is left makes another window; there is nothing more to read
            groups = [packs[i : i + reading.batch_size] for i in range(0, len(packs), reading.batch_size)]
            self.done |= {pool[index][0] for index in taken}
            rest = [entry for index, entry in enumerate(pool) if index not in taken]
            first, self.first_batch, self.waiting = self.first_batch, 0, len(rest)
            self._forget([place for place, _ in rest])
            after = self.state()
            for number, group in enumerate(groups):
                last = number + 1 == len(groups)
                if number >= first:
                    rows = [self._finished([pool[index][1] for index in pack], tally) for pack in group]
                    rows = [row for row in rows if row]
                    batch = self._made(rows, tally) if rows else None
                    yield batch, after if last else {**state, "batch": number + 1}, tally
                tally = Counter()
            pool = rest

    def _finished(self, pack: list[Encoded], tally: Counter) -> list[dict]:
        samples = []
        for encoded in pack:
            try:
                samples.append(self.reading.encoder.finish(encoded))
            except BadRow as error:
                self._skip(error, tally)
        return samples

    def _made(self, rows: list[list[dict]], tally: Counter) -> dict:
        batch = self.reading.collator.packed(rows)
        tally["rows"] += sum(map(len, rows))
        tally["batches"] += 1
        tally["tokens"] += int((batch["attention_mask"] > 0).sum())
        tally["positions"] += batch["attention_mask"].numel()
        return batch

    def _forget(self, waiting: list[int]) -> None:
        """Drop the anchors that nobody who waits needs, and note where the cursor is now."""
        self.anchors.append((self.place, self.cursor.state()))
        oldest = min(waiting, default=self.place)
        while len(self.anchors) > 1 and self.anchors[1][0] <= oldest:
            self.anchors.pop(0)
        self.done = {place for place in self.done if place >= self.anchors[0][0]}


class Reading(IterableDataset):
    """How rows become batches, for all lanes of one rank; a worker iterates over its own lane."""

    def __init__(
        self,
        source,
        encoder: Encoder,
        collator: VQACollator,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        lanes: int = 1,
        pack: bool = False,
        max_pictures: int = 18,
        once: bool = False,
    ) -> None:
        self.source, self.encoder, self.collator, self.batch_size = source, encoder, collator, batch_size
        self.rank, self.world_size, self.lanes = rank, world_size, lanes
        self.pack, self.max_pictures, self.once = pack, max_pictures, once
        self.max_length = collator.max_length
        self.patience = min(GIVE_UP, getattr(source, "count", None) or GIVE_UP)
        self.states: list[dict | None] = [None] * lanes
        self.first = 0

    def lane(self, number: int) -> Iterator[tuple[Any, dict, Counter]]:
        """What lane ``number`` of this rank makes from its state on; an error comes in place of a batch."""
        # lane after lane and rank after rank: step k of all ranks takes the batches that follow each other
        place = number * self.world_size + self.rank
        try:
            yield from Lane(self, place, self.lanes * self.world_size, self.states[number])
        except NanoVLMError as error:
            yield error, {}, Counter()

    def __iter__(self) -> Iterator[tuple[Any, dict, Counter]]:
        worker = get_worker_info()
        assert worker is not None, "only workers of a DataLoader iterate over a Reading"
        for batch, state, tally in self.lane((self.first + worker.id) % self.lanes):
            yield _fold(batch), state, tally


class Loader:
    """Endless batches; see ``nanovlm.data`` for what it promises."""

    def __init__(self, reading: Reading, num_workers: int) -> None:
        self.reading = reading
        self.in_background = num_workers > 0
        self.first = 0
        self.states: list[dict | None] = [None] * reading.lanes
        self._counts: Counter = Counter()
        self._iterator: Iterator | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = self._start()
        while True:
            batch, state, tally = next(self._iterator)
            if isinstance(batch, NanoVLMError):
                self.close()
                raise batch
            lane, self.first = self.first, (self.first + 1) % self.reading.lanes
            self.states[lane] = state
            self._note(tally)
            if batch is not None:
                return _unfold(batch) if self.in_background else batch

    def _start(self) -> Iterator:
        self.reading.states, self.reading.first = list(self.states), self.first
        if self.in_background:
            return iter(_workers(self.reading))
        return self._turns()

    def _turns(self) -> Iterator:
        lanes = [self.reading.lane(number) for number in range(self.reading.lanes)]
        turn = self.first
        while True:
            yield next(lanes[turn])
            turn = (turn + 1) % len(lanes)

    def _note(self, tally: Counter) -> None:
        for key, value in tally.items():
            if isinstance(key, tuple) and key[0] == "example":
                if not self._counts["skipped", key[1]]:
                    log.warning("rows are skipped and counted; the first for %s: %s", key[1], value)
        self._counts.update({key: value for key, value in tally.items() if not isinstance(value, str)})

    @property
    def stats(self) -> dict[str, Any]:
        """Counts of what was handed out; utilisation is None before the first batch."""
        counts = self._counts
        total = self.reading.source.count if hasattr(self.reading.source, "count") else None
        read = counts["rows"] + sum(value for key, value in counts.items() if isinstance(key, tuple))
        return {
            "rows": counts["rows"],
            "skipped": {key[1]: value for key, value in counts.items() if isinstance(key, tuple)},
            "neutralised": counts["neutralised"],
            "batches": counts["batches"],
            "epoch": read * self.reading.world_size / total if total else None,
            "utilisation": counts["tokens"] / counts["positions"] if counts["positions"] else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins; JSON can hold it."""
        plain = {key: value for key, value in self._counts.items() if isinstance(key, str)}
        return {
            "lanes": list(self.states),
            "next": self.first,
            "shape": self._shape(),
            "counts": plain,
            "skipped": self.stats["skipped"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Raises ConfigError where its readers were others."""
        if self._iterator is not None:
            raise ConfigError("the loader has begun; load its state before the first batch")
        shape = self._shape()
        for name, value in shape.items():
            if state["shape"].get(name) != value:
                raise ConfigError(
                    f"the data position was saved with {name}={state['shape'].get(name)}, this run has {name}={value}; "
                    "go on with the same number, or start anew with the weights alone"
                )
        self.states, self.first = list(state["lanes"]), state["next"]
        skipped = {("skipped", kind): count for kind, count in state["skipped"].items()}
        self._counts = Counter({**state["counts"], **skipped})

    def _shape(self) -> dict[str, Any]:
        reading = self.reading
        return {
            "num_workers": reading.lanes,
            "world_size": reading.world_size,
            "rank": reading.rank,
            "batch_size": reading.batch_size,
            "pack": reading.pack,
        }

    def close(self) -> None:
        """End the workers."""
        self._iterator = None


class Validation:
    """A finite number of batches, the same each time it is iterated over."""

    def __init__(self, reading: Reading, num_workers: int) -> None:
        self.reading, self.in_background = reading, num_workers > 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reading = self.reading
        if self.in_background:
            items: Iterator = iter(_workers(reading))
        else:
            items = (item for number in range(reading.lanes) for item in reading.lane(number))
        for batch, _, _ in items:
            if isinstance(batch, NanoVLMError):
                raise batch
            if batch is not None:
                yield _unfold(batch) if self.in_background else batch


def _workers(reading: Reading) -> DataLoader:
    """One process a lane; they take turns, so the order is that of the lanes."""
    return DataLoader(
        reading,
        batch_size=None,
        num_workers=reading.lanes,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
    )


def _as_it_is(item: Any) -> Any:
    return item


def _fold(batch: Any) -> Any:
    """All pictures of a batch in one tensor: each tensor that changes process costs an open file."""
    if not isinstance(batch, dict):
        return batch
    shapes = [[tuple(tiles.shape) for tiles in row] for row in batch["images"]]
    flat = [tiles.reshape(-1) for row in batch["images"] for tiles in row]
    return {**batch, "images": (torch.cat(flat) if flat else None, shapes)}


def _unfold(batch: dict[str, Any]) -> dict[str, Any]:
    pixels, shapes = batch["images"]
    if pixels is None:
        return {**batch, "images": [[] for _ in shapes]}
    parts = iter(pixels.split([math.prod(shape) for row in shapes for shape in row]))
    images: list[list[Tensor]] = [[next(parts).view(shape) for shape in row] for row in shapes]
    return {**batch, "images": images}
