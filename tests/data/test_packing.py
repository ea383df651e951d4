"""Knapsacks: limits kept, nobody waits for ever, rows full and alike."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.data.packing import knapsacks
from nanovlm.errors import ConfigError
from tests.data.helpers import built, ids_of, loader, picture, row, rows

documents = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 4)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(sizes=documents, count=st.integers(1, 6), waiting=st.integers(0, 10))
def test_limits_are_kept_and_no_document_is_in_two_rows(sizes, count, waiting):
    packs = knapsacks(sizes, 100, count, 6, min(waiting, len(sizes)))
    chosen = [index for pack in packs for index in pack]
    assert len(chosen) == len(set(chosen)) and len(packs) <= count
    assert all(0 < sum(sizes[i][0] for i in pack) <= 100 and sum(sizes[i][1] for i in pack) <= 6 for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)
    assert bool(chosen) == bool(sizes), "a window that takes nothing would never end"
    assert packs == knapsacks(sizes, 100, count, 6, min(waiting, len(sizes)))


def lognormal(rng):
    """Words of a few hundred tokens, with no picture, a small one, or one of 17 tiles of 64 tokens."""
    return min(4096, int(rng.lognormvariate(5.3, 0.8)) + rng.choice([0, 64, 1088, 1088]))


@pytest.mark.parametrize(
    ("capacity", "draw"),
    [(4096, lognormal), (4096, lambda rng: rng.randint(300, 1400)), (512, lambda rng: rng.randint(60, 90))],
    ids=["pictures and words", "even", "short rows"],
)
def test_rows_are_at_least_95_percent_full_and_alike(capacity, draw):
    rng = random.Random(0)
    pool: list[tuple[int, int]] = []
    fills, waited, waiting, number = [], 0, 0, 0
    while number < 3000:
        while sum(length for _, length in pool) < 1.25 * 8 * capacity:
            pool.append((number, draw(rng)))
            number += 1
        packs = knapsacks([(length, 1) for _, length in pool], capacity, 8, 99, waiting)
        fills += [sum(pool[i][1] for i in pack) / capacity for pack in packs]
        chosen = {i for pack in packs for i in pack}
        waited = max(waited, *(number - pool[i][0] for i in chosen))
        pool = [entry for i, entry in enumerate(pool) if i not in chosen]
        waiting = len(pool)
    assert sum(fills) / len(fills) >= 0.95
    assert min(fills) >= 0.8, "one row is much emptier than the others"
    assert waited < 1000, f"a document waited while {waited} others were read"


def test_the_loader_reports_how_full_its_rows_are():
    source = loader(rows(200), pack=True, max_length=512)
    batches = list(itertools.islice(source, 12))
    full = sum(int((batch["attention_mask"] > 0).sum()) for batch in batches)
    assert source.stats["utilisation"] == full / (12 * 2 * 512)
    assert source.stats["utilisation"] >= 0.95


def test_a_packed_row_numbers_its_documents_and_keeps_their_pictures_in_order():
    def coloured(number):
        return {**row(f"answer {number}", id=str(number)), "images": [picture(colour=(number, 0, 0))]}

    source = loader([coloured(number) for number in range(60)], pack=True, max_length=512)
    batch = next(source)
    assert batch["input_ids"].shape == (2, 512)
    for mask, names, images in zip(batch["attention_mask"], batch["ids"], batch["images"], strict=True):
        steps = mask.diff()
        assert len(names) > 3 and mask.max() == len(names) == len(images)
        assert ((steps == 0) | (steps == 1)).all(), "padding, then document after document"
        assert [round(float(tiles[0, 0, 0, 0]) * 255) for tiles in images] == [int(name) for name in names]
    labels, mask = batch["labels"], batch["attention_mask"]
    crossing = (labels[:, :-1] != -100) & (mask[:, :-1] != mask[:, 1:])
    assert not crossing.any(), "a document would learn to begin the next one"


def test_no_row_holds_more_pictures_than_it_may():
    source = loader([row("a", pictures=3, id=str(n)) for n in range(30)], pack=True, max_length=2048, max_pictures=7)
    assert max(len(images) for batch in itertools.islice(source, 4) for images in batch["images"]) == 6


def test_a_model_with_features_in_front_is_not_packed():
    with pytest.raises(ConfigError, match="use --no-pack"):
        built("tiny_original_small", pack=True)
    assert ids_of([next(built("tiny_original_small")[0])])
