"""Where rows come from and in which order: data sets with numbered rows, and streams.

Unusual: every reader (a *lane*: one worker of one rank) has its own cursor, which says in plain JSON where it
stands; a cursor made from that goes on exactly there. Lanes share nothing and read disjoint rows.

A cursor yields (name, row); a row that the source itself could not read comes as a BadRow in its place.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from nanovlm.errors import BadRow, DataError


class Rows(Protocol):
    """Numbered rows. ``len`` raises TypeError where they never end."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any: ...


class Cursor(Protocol):
    """Where one lane reads. StopIteration ends a validation; training goes round."""

    def __next__(self) -> tuple[str, Any]: ...

    def state(self) -> Any: ...


class Indexed:
    """Numbered rows in an order drawn anew from the seed in every epoch; without a seed, as they are.

    chosen: which of the rows belong to this half of a split; None for all.
    """

    def __init__(self, rows: Rows, name: str, seed: int | None = None, chosen: torch.Tensor | None = None) -> None:
        self.rows, self.name, self.seed, self.chosen = rows, name, seed, chosen
        try:
            self.count: int | None = len(rows) if chosen is None else len(chosen)
        except TypeError:
            self.count = None
        if self.count == 0:
            raise DataError(f"{name} has no rows")

    def cursor(self, lane: int, lanes: int, block: int, state: Any = None, once: bool = False) -> Cursor:
        """block: consecutive rows that a lane takes before the next lane's turn, a batch's worth."""
        return _Numbered(self, lane, lanes, block, state or 0, once)


class _Numbered:
    def __init__(self, source: Indexed, lane: int, lanes: int, block: int, position: int, once: bool) -> None:
        self.source, self.lane, self.lanes, self.block, self.once = source, lane, lanes, block, once
        self.position = position
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def state(self) -> int:
        return self.position

    def __next__(self) -> tuple[str, Any]:
        source = self.source
        around, within = divmod(self.position, self.block)
        number = (around * self.lanes + self.lane) * self.block + within
        if source.count is not None:
            epoch, number = divmod(number, source.count)
            if self.once and epoch:
                raise StopIteration
            number = self._shuffled(epoch, number)
        if source.chosen is not None:
            number = int(source.chosen[number])
        self.position += 1
        try:
            row = source.rows[number]
        except BadRow as error:
            row = error
        return f"{source.name}[{number}]", row

    def _shuffled(self, epoch: int, number: int) -> int:
        if self.source.seed is None:
            return number
        if epoch != self.epoch:
            self.order = shuffled(self.source.count or 0, self.source.seed, epoch)
            self.epoch = epoch
        return int(self.order[number])


def shuffled(count: int, seed: int, epoch: int) -> torch.Tensor:
    """0 to count - 1 in an order that seed and epoch decide."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=7).digest()
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


def split(rows: Rows, name: str, seed: int, val_ratio: float, val_size: int) -> tuple[Indexed, Indexed]:
    """(training, validation) halves of numbered rows, the same for a seed; no row is in both."""
    total = len(rows)
    held_out = min(val_size, max(1, int(total * val_ratio)))
    if held_out < 1 or held_out >= total:
        raise DataError(
            f"{name} has {total} rows; of them val_ratio={val_ratio} and val_size={val_size} hold out {held_out}, "
            "and at least one must be on either side"
        )
    order = shuffled(total, seed, -1)
    return Indexed(rows, name, seed, order[held_out:]), Indexed(rows, name, None, order[:held_out].sort().values)


class Streamed:
    """One half of a data set of the ``datasets`` library that is only read forward.

    open_stream: a function epoch -> IterableDataset. A row belongs to validation by a hash of its words, so both
    halves are the same whoever reads, and rows that say the same are on one side.
    limit: rows in all that validation reads.
    """

    def __init__(
        self,
        open_stream: Callable[[int], Any],
        name: str,
        val_ratio: float,
        validation: bool,
        limit: int | None = None,
    ) -> None:
        self.open_stream, self.name = open_stream, name
        self.val_ratio, self.validation, self.limit = val_ratio, validation, limit

    def cursor(self, lane: int, lanes: int, block: int, state: Any = None, once: bool = False) -> Cursor:
        """Files are shared out where there are enough for every lane; else every lane reads all, and takes its turn."""
        return _Forward(self, lane, lanes, state, once)

    def mine(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is on this side of the split."""
        said = json.dumps([row.get("texts"), row.get("question")], default=str).encode()
        share = int.from_bytes(hashlib.blake2b(said, digest_size=6).digest(), "big") / (1 << 48)
        return (share < self.val_ratio) == self.validation


class _Forward:
    def __init__(self, source: Streamed, lane: int, lanes: int, state: Any, once: bool) -> None:
        self.source, self.lane, self.lanes, self.once = source, lane, lanes, once
        self.epoch, self.seen, self.taken = 0, 0, 0
        self.stream: Any = None
        self.iterator: Iterator | None = None
        if state is not None:
            self.epoch, self.seen, self.taken = state["epoch"], state["seen"], state["taken"]
            self._open(state["stream"])

    def _open(self, state: Any = None) -> None:
        stream = self.source.open_stream(self.epoch)
        self.by_file = stream.num_shards >= self.lanes
        if self.by_file:
            stream = stream.shard(num_shards=self.lanes, index=self.lane)
        if state is not None:
            stream.load_state_dict(state)
        # by ones, because its __iter__ shares files out among a DataLoader's workers once more
        self.stream, self.iterator = stream, ({key: value[0] for key, value in one.items()} for one in stream.iter(1))

    def state(self) -> dict[str, Any]:
        if self.stream is None:
            self._open()
        return {
            "epoch": self.epoch, "seen": self.seen, "taken": self.taken, "stream": self.stream.state_dict(),
        }  # fmt: skip

    def __next__(self) -> tuple[str, Any]:
        if self.iterator is None:
            self._open()
        assert self.iterator is not None  # _open makes one
        limit = self.source.limit
        if limit is not None and self.taken >= -(-limit // self.lanes):
            raise StopIteration
        while True:
            for row in itertools.islice(self.iterator, 1):
                number = self.seen
                self.seen += 1
                turn = self.lane if self.by_file else number % self.lanes
                if turn != self.lane or not self.source.mine(row):
                    break
                self.taken += 1
                where = f"{self.lane}/{self.lanes}:{number}" if self.by_file else str(number)
                return f"{self.source.name}[{where}]", row
            else:
                if self.once:
                    raise StopIteration
                if not self.taken:
                    raise DataError(f"{self.source.name}: a whole pass gave this reader no row to train on")
                self.epoch, self.seen = self.epoch + 1, 0
                self._open()
