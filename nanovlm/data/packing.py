"""Which documents share a row: balanced knapsacks under a limit of tokens and one of pictures.

Unusual: more is waiting than the knapsacks hold, and what does not fit goes into the next ones, the oldest first.
So rows are nearly full without a large window, and nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

SURPLUS = 1.25  # tokens waiting for each that fits: below, gaps find no document of their size


def knapsacks(
    sizes: Sequence[tuple[int, int]], capacity: int, count: int, max_pictures: int, waiting: int = 0
) -> list[list[int]]:
    """Indices of documents in each of at most ``count`` rows, each in order; the rest stays out.

    sizes: (tokens, pictures) of each; each alone fits into a row. waiting: how many of the first were left out
    before; they are placed before any other. Long ones go first into the emptiest row that takes them, so rows
    are alike; then what is left fills the fullest row that it fits.
    """
    tokens, pictures = [0] * count, [0] * count
    rows: list[list[int]] = [[] for _ in range(count)]

    def place(index: int, order: Sequence[int]) -> bool:
        length, shown = sizes[index]
        for row in order:
            if tokens[row] + length <= capacity and pictures[row] + shown <= max_pictures:
                rows[row].append(index)
                tokens[row] += length
                pictures[row] += shown
                return True
        return False

    def longest_first(indices: Sequence[int]) -> list[int]:
        return sorted(indices, key=lambda index: (-sizes[index][0], index))

    # the first of them that fill the rows to the brim are spread; the surplus only closes gaps
    budget, spread = capacity * count, []
    for index in range(len(sizes)):
        if index < waiting or budget >= sizes[index][0]:
            spread.append(index)
            budget -= sizes[index][0]
    left = set(range(len(sizes))) - set(spread)
    for index in longest_first(spread):
        if not place(index, sorted(range(count), key=lambda row: (tokens[row], row))):
            left.add(index)
    left = {
        index
        for index in longest_first(sorted(left))
        if not place(index, sorted(range(count), key=lambda row: (-tokens[row], row)))
    }
    for row, members in enumerate(rows):
        while (swap := best_swap(members, left, sizes, capacity - tokens[row], max_pictures - pictures[row], waiting)):
            out, into = swap
            members[members.index(out)] = into
            left ^= {out, into}
            tokens[row] += sizes[into][0] - sizes[out][0]
            pictures[row] += sizes[into][1] - sizes[out][1]
    return [sorted(row) for row in rows if row]


def best_swap(
    members: Sequence[int], left: set[int], sizes: Sequence[tuple[int, int]], gap: int, spare: int, waiting: int
) -> tuple[int, int] | None:
    """(member, index left out) whose exchange fills most of ``gap`` tokens, with ``spare`` pictures at most more."""
    gains = {
        (sizes[into][0] - sizes[out][0], -out, -into): (out, into)
        for out in members
        if out >= waiting
        for into in left
        if 0 < sizes[into][0] - sizes[out][0] <= gap and sizes[into][1] - sizes[out][1] <= spare
    }
    return gains[max(gains)] if gains else None
