"""The cases that break first: no pictures, several, split ones, long rows, padding, and the end of a text."""

import numpy as np
import pytest

from compat.process import TargetRaised
from compat.suites.probes import IMAGE, assert_differ, assert_same, forward, logits_of, mean_loss, named

CHECK = "Edge Cases"
LONGEST, MOST_LOGITS = 1024, 2**25  # text tokens, and numbers in an answer, that a long row may have


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(ask, facts, probes, side):
    probes.need("attention_mask", "forward takes no attention mask")
    rows = [probes.row(length, seed=length, images=(0,)) for length in (5, 11)]
    padded = forward(ask, facts, rows, padding=side)
    for row, logits in zip(rows, padded, strict=True):
        [alone] = forward(ask, facts, [row], padding="none")
        assert_same(
            logits,
            alone,
            f"a row of {len(alone)} tokens, {side}-padded and alone",
            "Do positions count the padding, or is padding attended to?",
        )


def test_padding_carries_no_labels(ask, facts, probes):
    probes.need("attention_mask", "forward takes no attention mask")
    rows = [probes.row(length, seed=length, images=(0,), labels="all") for length in (5, 11)]
    reply = ask("forward", rows=rows, padding="left")
    want = mean_loss(logits_of(reply, rows, facts["vocab_size"]), rows)
    assert isinstance(reply["loss"], float) and abs(reply["loss"] - want) <= 1e-4 * max(1.0, want), (
        f"the loss of a left-padded batch is {reply['loss']}, cross entropy of its logits at the labelled "
        f"positions is {want:.6g}: does padding carry labels, or move them?"
    )


def test_a_row_without_a_picture_gives_numbers(ask, facts, probes):
    probes.need("no_image", "the layout puts a picture into every row")
    [logits] = forward(ask, facts, [probes.row(10, images=())], padding="none")
    [pictured] = forward(ask, facts, [probes.row(10, images=(0,))], padding="none")
    assert_differ(
        pictured,
        logits,
        "the same words with and without a picture",
        "Do the image features reach the decoder?",
    )


def test_text_only_and_pictured_rows_share_a_batch(ask, facts, probes):
    probes.need("no_image", "the layout puts a picture into every row")
    probes.need(
        "attention_mask", "forward takes no attention mask, so rows of different length cannot be padded"
    )
    rows = [probes.row(10, images=()), probes.row(10, images=(0,), seed=1)]
    together = forward(ask, facts, rows, padding="left")
    for number, row in enumerate(rows):
        [alone] = forward(ask, facts, [row], padding="none")
        assert_same(
            together[number],
            alone,
            f"the {'pictured' if number else 'text-only'} row in a mixed batch and alone",
            "Do pictures go to the row they belong to?",
        )


def test_several_pictures_keep_their_order(ask, facts, probes):
    probes.need("several_images", "this layout takes exactly one picture a row")
    rows = [probes.row(10, images=(0, 1)), probes.row(10, images=(1, 0))]
    a, b = forward(ask, facts, rows, padding="none")
    assert_differ(b, a, "two pictures and the same two swapped", "Is only one of them used?")


def test_every_picture_of_a_row_counts(ask, facts, probes):
    probes.need("several_images", "this layout takes exactly one picture a row")
    base, second, first = (
        forward(ask, facts, [probes.row(10, images=pair)], padding="none")[0] for pair in ((0, 1), (0, 2), (2, 1))
    )
    assert_differ(second, base, "another second picture of two", "Is it ignored, or replaced by the first?")
    assert_differ(first, base, "another first picture of two", "Is it ignored, or replaced by the second?")
    assert_differ(first, second, "pictures 2 and 1 against 0 and 2", "Is only one of them used?")


def test_a_picture_changes_only_the_text_after_it(ask, facts, probes):
    probes.need("several_images", "this layout takes exactly one picture a row")
    if facts["layout"] == "in_front":
        pytest.skip("the layout puts every picture in front of the text")
    text = probes.text(10)
    tokens = [IMAGE, *text[:5], IMAGE, *text[5:]]
    base, second, first = (
        forward(ask, facts, [{"tokens": tokens, "images": list(pair)}], padding="none")[0]
        for pair in ((0, 1), (0, 2), (2, 1))
    )
    assert_same(
        second[:5],
        base[:5],
        "the text between two pictures, under another second one",
        "Do pictures go to their own places, the first to the first?",
    )
    assert_differ(second[5:], base[5:], "the text after both, under another second one", "Is it ignored?")
    assert_differ(
        first[:5],
        base[:5],
        "the text between two pictures, under another first one",
        "Do pictures go to their own places, the first to the first?",
    )


def test_a_split_picture_has_the_tiles_of_its_grid(ask, facts):
    tiles = ask("process_image", sizes=sizes(facts))["pictures"]
    if max(picture["tiles"] for picture in tiles) == 1:
        pytest.skip("the image processor does not split pictures")
    for picture, size in zip(tiles, sizes(facts), strict=True):
        assert picture["grid"], (
            f"a {size[0]}x{size[1]} picture is split into {picture['tiles']} tiles, but no grid says "
            "where they belong"
        )
        rows, columns = picture["grid"]
        assert picture["tiles"] in (rows * columns, rows * columns + 1), (
            f"a {size[0]}x{size[1]} picture has {picture['tiles']} tiles for a grid of {rows}x{columns} "
            "(a global view may add one)"
        )


def sizes(facts) -> list[list[int]]:
    """[width, height] of a picture of one tile, a wide one and a tall one."""
    side = facts["image_size"]
    return [[side, side], [side * 3, side], [side * 2, side * 3]]


def test_every_picture_has_a_token_for_every_feature(ask, facts):
    for picture, size in zip(ask("process_image", sizes=sizes(facts))["pictures"], sizes(facts), strict=True):
        if picture["image_tokens"] is None:
            pytest.skip("the layout puts features in front of the text, without image tokens")
        assert picture["image_tokens"] == picture["features"] > 0, (
            f"a {size[0]}x{size[1]} picture ({picture['tiles']} tiles) puts {picture['image_tokens']} tokens "
            f"into the prompt, the model makes {picture['features']} features of it: they cannot be matched"
        )


def longest(facts) -> tuple[int, int]:
    """Text tokens of the longest row the positions allow beside one picture, and of the longest we try."""
    if facts["max_positions"] is None:
        pytest.skip("the config names no number of positions")
    return facts["max_positions"] - facts["image_tokens"], min(LONGEST, MOST_LOGITS // facts["vocab_size"])


def test_a_row_as_long_as_the_positions_gives_numbers(ask, facts, probes):
    length = min(longest(facts))
    row = probes.row(length, images=(0,), labels="all")
    reply = ask("forward", rows=[row], padding="none")
    logits_of(reply, [row], facts["vocab_size"])
    assert isinstance(reply["loss"], float) and np.isfinite(reply["loss"]), (
        f"the loss of a row of {length} tokens is {reply['loss']}"
    )


def test_a_longest_row_still_sees_its_beginning(ask, facts, probes):
    text = probes.text(min(longest(facts)))
    other = next(token for token in probes.ids if token != text[0])
    [base] = forward(ask, facts, [probes.row(tokens=text, images=(0,))], padding="none")
    for what, row in (
        ("first token", probes.row(tokens=[other, *text[1:]], images=(0,))),
        ("picture", probes.row(tokens=text, images=(1,))),
    ):
        [changed] = forward(ask, facts, [row], padding="none")
        assert_differ(
            changed[-1:],
            base[-1:],
            f"the last of {len(text)} tokens, under another {what}",
            "Is the beginning of a long row cut off, or outside every layer's attention window?",
        )


def test_beyond_the_positions_comes_a_clear_error_or_numbers(ask, facts, probes):
    allowed, tried = longest(facts)
    if allowed + 8 > tried:
        pytest.skip(f"{facts['max_positions']} positions; rows of more than {tried} tokens are not tried")
    length = allowed + 8
    row = probes.row(length, images=(0,))
    try:
        reply = ask("forward", rows=[row], padding="none")
    except TargetRaised as error:
        assert error.type not in ("IndexError", "KeyError") and len(error.message.split()) >= 3, (
            f"a row 8 tokens beyond the {facts['max_positions']} positions raises {error.type}: "
            f"{error.message!r} ({error.where}). Say which limit was passed, and by how much"
        )
    else:
        logits_of(reply, [row], facts["vocab_size"])


def test_after_the_end_token_nothing_else_follows(ask, facts, probes):
    probes.need("eos", "generate does not know an end token")
    rows = [probes.row(6, seed=seed, images=(seed,)) for seed in range(4)]
    # Greedy first; a model whose greedy text repeats one token is asked for seeded samples instead.
    for how in ({"greedy": True}, {"greedy": False, "seed": 1}, {"greedy": False, "seed": 2}):
        how = {"max_new_tokens": 12, **how}
        free = ask("generate", rows=rows, eos=unused(facts), **how)["ids"]
        for number, ids in enumerate(free):
            end = followed(ids)
            if end is not None:
                stopped = ask("generate", rows=rows, eos=ids[end], **how)["ids"][number]
                return assert_ended(stopped, ids, end, number, set(facts["special_ids"]))
    pytest.skip("generated text repeats one token, so no id could serve as an end that something follows")


def test_a_row_that_ends_early_leaves_the_others_their_length(ask, facts, probes):
    probes.need("eos", "generate does not know an end token")
    rows = [probes.row(6, seed=seed, images=(seed,)) for seed in range(4)]
    free = ask("generate", rows=rows, eos=unused(facts), max_new_tokens=12, greedy=True)["ids"]
    special = set(facts["special_ids"])
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b and len(free[b]) == 12]
    for a, b in pairs:
        end = next((i for i in free[a][:6] if i not in free[b]), None)
        if end is None or special & set(free[b]):
            continue
        how = {"eos": end, "max_new_tokens": 12, "greedy": True}
        [alone] = ask("generate", rows=[rows[b]], **how)["ids"]
        for order in ([a, b], [b, a]):
            ids = ask("generate", rows=[rows[n] for n in order], **how)["ids"][order.index(b)]
            assert len(ids) == len(alone), (
                f"a row generates {len(alone)} tokens alone, {len(ids)} beside one that ends after "
                f"{free[a].index(end) + 1}: does the whole batch stop with its first finished row?"
            )
            kept = [i for i in ids if i not in special]
            assert len(kept) == len(ids), (
                f"a row that has not ended is filled with special tokens ({ids}) beside one that ended after "
                f"{free[a].index(end) + 1}"
            )
        return
    pytest.skip("every row generates the same ids, so none could end before another")


def unused(facts) -> int:
    """An id the probe rows do not use, so that nothing ends early."""
    ordinary = set(facts["text_ids"])
    return next((i for i in facts["special_ids"] if i not in ordinary), facts["vocab_size"] - 1)


def followed(ids: list[int]) -> int | None:
    """The first place whose id is new there and followed by another id: ending there would show."""
    return next((n for n in range(len(ids) - 1) if ids[n] not in ids[:n] and ids[n + 1] != ids[n]), None)


def assert_ended(stopped: list[int], ids: list[int], end: int, number: int, special: set[int]) -> None:
    assert stopped[: end + 1] == ids[: end + 1], (
        f"row {number}: with id {ids[end]} as the end token, the ids up to it changed "
        f"from {ids[: end + 1]} to {stopped[: end + 1]}"
    )
    tail = stopped[end + 1 :]
    assert all(i == ids[end] for i in tail) or all(i in special for i in tail), (
        f"row {number}: after the end token {ids[end]} came {named([str(i) for i in tail])}; "
        "only the end token or padding may follow it"
    )
