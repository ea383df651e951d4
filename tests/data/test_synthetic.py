"""The generator: endless, seeded, honest, and two sides that share no scene."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from nanovlm.data.synthetic import APART, ASKS, COLOURS, FAMILIES, KINDS, SIDE, HeldOut, Synthetic, scenes
from tests.data.helpers import built, ids_of

EVERY = FAMILIES + APART


def same_pixels(one, other) -> bool:
    return np.array_equal(np.asarray(one["images"][0]), np.asarray(other["images"][0]))


def test_a_row_is_the_same_for_a_seed_and_another_for_another():
    rows, again, other = (Synthetic(seed) for seed in (1, 1, 2))
    for number in (0, 1, 10**9):
        assert rows[number]["texts"] == again[number]["texts"] and same_pixels(rows[number], again[number])
    assert any(not same_pixels(rows[number], other[number]) for number in range(5))
    with pytest.raises(TypeError, match="never ends"):
        len(rows)


def test_training_and_held_out_rows_share_no_scene():
    trained = {Synthetic(seed)[number]["scene"] for seed in (0, 1) for number in range(2000)}
    asked = HeldOut(1000, EVERY)
    held_out = {asked[number]["scene"] for number in range(1000)}
    assert len(trained) > 2000 and len(held_out) > 400
    assert not trained & held_out
    # not by luck: the side is a function of what is seen, whoever draws it
    for kind in KINDS:
        for side in (False, True):
            drawn = scenes(kind, side, random.Random(0))
            assert all(scene.held_out is side for scene in itertools.islice(drawn, 30))


def test_the_side_of_a_scene_is_decided_by_what_is_seen_and_nothing_else():
    by_key = defaultdict(set)
    for kind in KINDS:
        for side, seed in itertools.product((False, True), range(40)):
            scene = next(scenes(kind, side, random.Random(seed)))
            by_key[scene.key].add(scene.held_out)
            moved = type(scene)(scene.kind, scene.values, tuple(-step for step in scene.jitter))
            assert moved.key == scene.key and moved.held_out is scene.held_out
    assert all(len(sides) == 1 for sides in by_key.values())


def test_the_thousand_are_different_and_even_over_the_families():
    asked = HeldOut(1000)
    assert set(Counter(family for family, _ in asked.asked).values()) <= {166, 167}
    assert len({(family, scene.key, scene.jitter) for family, scene in asked.asked}) == 1000


@pytest.mark.parametrize("family", EVERY)
def test_no_answer_of_a_family_is_much_more_frequent_than_the_others(family):
    said = Counter(scene.answer(family) for family, scene in HeldOut(400, (family,)).asked)
    assert len(said) >= 4
    assert max(said.values()) < 2 * 400 / len(said)


@pytest.mark.parametrize("kind", KINDS)
def test_two_scenes_with_different_answers_look_different(kind):
    families = [family for family in KINDS[kind][1]]
    drawn = list(itertools.islice(scenes(kind, False, random.Random(3)), 40))
    seen = {np.asarray(scene.draw()).tobytes(): tuple(scene.answer(family) for family in families) for scene in drawn}
    keys = {scene.key + str(scene.jitter) for scene in drawn}
    assert len(seen) >= len(keys) * 0.9, "different scenes, one picture"
    assert all(scene.draw().size == (SIDE, SIDE) and scene.draw().mode == "RGB" for scene in drawn[:3])


def test_the_colour_is_the_one_that_is_seen():
    for scene in itertools.islice(scenes("single", True, random.Random(1)), 60):
        pixels = Counter(map(tuple, np.asarray(scene.draw()).reshape(-1, 3).tolist()))
        assert COLOURS[scene.answer("colour")] in [colour for colour, _ in pixels.most_common(2)]


def test_the_place_is_where_it_is_seen():
    for scene in itertools.islice(scenes("single", True, random.Random(1)), 60):
        ground = np.asarray(scene.draw())[0, 0]
        y, x = np.nonzero((np.asarray(scene.draw()) != ground).any(-1))
        middle = SIDE / 2
        right, bottom = x.mean() - middle, y.mean() - middle
        off = {"left": -right, "right": right, "top": -bottom, "bottom": bottom}
        want = scene.answer("position")
        if want == "centre":
            assert max(map(abs, off.values())) < 12
        else:
            assert off[want] > 18 and off[want] == max(off.values())


@pytest.mark.parametrize("count", range(1, 6))
def test_as_many_things_are_drawn_as_are_counted(count):
    scene = next(
        scene for scene in scenes("several", True, random.Random(count)) if scene.answer("count") == str(count)
    )
    bright = np.asarray(scene.draw().convert("L")).astype(int) > 60
    cells = bright.reshape(4, 32, 4, 32).sum(axis=(1, 3)) > 150
    assert cells.sum() == count


def test_the_embedded_default_needs_no_file_and_ranks_share_it_out():
    readers = [built(rank=rank, world_size=2)[0] for rank in (0, 1)]
    names = ids_of([next(reader) for reader in readers for _ in range(3)])
    assert len(set(names)) == 24
    assert {name.partition("[")[0] for name in names} == {"synthetic"}
    assert set(ASKS) == set(EVERY)
