"""CUDA's caching allocator on paper: rounding, splitting, joining, running out."""

from __future__ import annotations

import random

import pytest

from nanovlm.measure.allocator import MIB, CachingAllocator, OutOfMemory


@pytest.mark.parametrize(
    ("request_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        # own buffers are rounded to 2 MiB, and a rest of at most 1 MiB is handed out along
        (11 * MIB, 12 * MIB, 12 * MIB),
        (10 * MIB + 512, 10 * MIB + 512, 12 * MIB),
        (20 * MIB - 512, 20 * MIB, 20 * MIB),
    ],
)
def test_one_request_takes_what_cuda_would_give_it(request_bytes, allocated, reserved):
    allocator = CachingAllocator()
    allocator.allocate(request_bytes)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_the_smallest_free_block_that_fits_is_taken_and_its_rest_stays_free():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (30, 12, 40)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(10 * MIB).address == blocks[1].address
    assert allocator.allocate(28 * MIB).address == blocks[0].address
    assert allocator.reserved == 82 * MIB


def test_freed_neighbours_join_and_the_whole_buffer_can_go_back():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    assert allocator.reserved == 20 * MIB
    for number in (1, 3, 2, 0):
        allocator.free(blocks[number])
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB, "one block is in use, so the buffer stays"
    allocator.free(blocks[4])
    allocator.empty_cache()
    assert (allocator.reserved, allocator.allocated) == (0, 0)


def test_a_full_device_gives_back_free_buffers_before_it_gives_up():
    allocator = CachingAllocator(capacity=100 * MIB)
    kept = allocator.allocate(30 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(70 * MIB)
    assert allocator.reserved == 100 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate(2 * MIB)
    allocator.free(kept)
    allocator.allocate(2 * MIB)
    assert allocator.peak == 100 * MIB


def test_any_sequence_keeps_the_books():
    draw = random.Random(0)
    allocator, live = CachingAllocator(), []
    for _ in range(3000):
        if live and draw.random() < 0.5:
            allocator.free(live.pop(draw.randrange(len(live))))
        else:
            live.append(allocator.allocate(int(2 ** draw.uniform(0, 26))))
        assert allocator.allocated == sum(block.size for block in live)
        spans = sorted((block.address, block.address + block.size) for block in live)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)
