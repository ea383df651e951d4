"""torch's caching allocator for CUDA memory, on paper: what ``torch.cuda.memory_allocated`` would say, and when.

Unusual: "allocated" is more than what was asked for. Sizes are rounded up to 512 bytes; requests up to 1 MiB are cut
from buffers of 2 MiB, others from buffers of 20 MiB or, from 10 MiB up, of their own size rounded to 2 MiB; and a
block whose rest would be 1 MiB or less is handed out whole, and counts whole. Freed neighbours of one buffer
join again. One stream, default settings. Source: c10/cuda/CUDACachingAllocator.cpp of pytorch 2.13.
"""

from __future__ import annotations

from bisect import bisect_left, insort

MIB = 1 << 20
MIN_BLOCK, SMALL = 512, MIB
SMALL_BUFFER, LARGE_BUFFER, OWN_BUFFER, OWN_ROUNDING = 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB


class OutOfMemory(Exception):
    """A request that the device cannot serve, even after giving back every free buffer."""


class Block:
    """Part of a buffer; ``before`` and ``after`` are its neighbours there."""

    __slots__ = ("size", "address", "small", "free", "before", "after")

    def __init__(self, size: int, address: int, small: bool) -> None:
        self.size, self.address, self.small, self.free = size, address, small, False
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """``allocated`` and ``reserved`` bytes now, ``peak`` and ``peak_reserved`` at most; capacity None has no end."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.peak = self.reserved = self.peak_reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (size, address), sorted
        self._at: dict[int, Block] = {}
        self._top = 0

    def allocate(self, request: int) -> Block | None:
        """A block for ``request`` bytes, the smallest that fits; None for 0. Raises OutOfMemory."""
        if not request:
            return None
        size = _up(request, MIN_BLOCK)
        small = size <= SMALL
        pool = self._free[small]
        place = bisect_left(pool, (size, -1))
        block = self._take(self._at[pool[place][1]]) if place < len(pool) else self._reserve(size, small)
        rest = block.size - size
        if rest >= MIN_BLOCK if small else rest > SMALL:
            tail = Block(rest, block.address + size, small)
            tail.before, tail.after, block.after, block.size = block, block.after, tail, size
            if tail.after is not None:
                tail.after.before = tail
            self._put(tail)
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Give a block back; it joins its free neighbours."""
        if block is None:
            return
        self.allocated -= block.size
        if block.before is not None and block.before.free:
            block = _joined(self._take(block.before), block)
        if block.after is not None and block.after.free:
            block = _joined(block, self._take(block.after))
        self._put(block)

    def empty_cache(self) -> None:
        """Return every buffer that is wholly free."""
        for block in [self._at[address] for pool in self._free.values() for _, address in pool]:
            if block.before is None and block.after is None:
                self._take(block)
                self.reserved -= block.size

    def _reserve(self, size: int, small: bool) -> Block:
        buffer = SMALL_BUFFER if small else LARGE_BUFFER if size < OWN_BUFFER else _up(size, OWN_ROUNDING)
        if self.capacity is not None and self.reserved + buffer > self.capacity:
            self.empty_cache()
            if self.reserved + buffer > self.capacity:
                raise OutOfMemory(f"{buffer} bytes more than {self.reserved} of {self.capacity}")
        block = Block(buffer, self._top, small)
        self._top += buffer + MIB  # a gap: buffers never join
        self.reserved += buffer
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _take(self, block: Block) -> Block:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))], self._at[block.address]
        block.free = False
        return block

    def _put(self, block: Block) -> None:
        insort(self._free[block.small], (block.size, block.address))
        self._at[block.address] = block
        block.free = True


def _joined(first: Block, second: Block) -> Block:
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
