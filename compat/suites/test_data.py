"""The data pipeline: a batch teaches exactly the assistant's words, beside the right image tokens."""

import re

import pytest

from compat.suites.probes import IGNORED, named

CHECK = "Data Pipeline"
TURNS = (
    [{"user": "What is in the picture?", "assistant": "A small red house."}],
    [
        {"user": "How many windows?", "assistant": "Three."},
        {"user": "And doors?", "assistant": "Only one door."},
    ],
)
# Markers chat templates put around words; the end of an answer is rightly learned.
MARKER = re.compile(r"<\|[^|<>]*\|>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>")


def batch(ask):
    reply = ask("data", turns=[list(turns) for turns in TURNS], pictures=1)
    assert reply["rows"], "the collator gave an empty batch for two ordinary rows"
    return reply


def words(text: str) -> str:
    return " ".join(MARKER.sub(" ", text).split())


def test_every_row_is_supervised(ask):
    counts = batch(ask)["supervised"]
    empty = [str(row) for row, count in enumerate(counts) if count == 0]
    assert not empty, (
        f"{len(empty)} of {len(counts)} rows ({named(empty)}) have no label other than -100: the loss "
        "would be NaN and nothing be learned. "
        "Does the loss mask still find the assistant's turns (apply_chat_template changed in transformers 5)?"
    )


def test_labels_are_the_assistant_s_words(ask, facts):
    reply = batch(ask)
    # Data sets for a single picture a row were written for one question and its answer.
    learned = slice(1) if facts["dialect"] == "single_image" else slice(None)
    assert len(reply["labels_text"]) == len(TURNS), (
        f"{len(TURNS)} rows went in, {len(reply['labels_text'])} came out"
    )
    for number, (text, turns) in enumerate(zip(reply["labels_text"], TURNS, strict=True)):
        want = " ".join(turn["assistant"] for turn in turns[learned])
        if not text.strip():
            pytest.skip(f"row {number} supervises nothing, which is a failure of its own")
        assert words(text) == want, (
            f"row {number} learns {words(text)!r}, the assistant says {want!r}. "
            "Is the mask off by some tokens, or are labels shifted twice?"
        )


def test_every_label_is_the_next_token(ask):
    reply = batch(ask)
    labelled = 0
    for number, (ids, labels) in enumerate(zip(reply["ids"], reply["labels"], strict=True)):
        assert len(labels) == len(ids), f"row {number} has {len(ids)} ids and {len(labels)} labels"
        places = [place for place, label in enumerate(labels) if label != IGNORED]
        labelled += len(places)
        off = [place for place in places if ids[place + 1 : place + 2] != [labels[place]]]
        assert not off, (
            f"row {number}: {len(off)} of {len(places)} labels are not the id that follows; at position "
            f"{off[0]} the id is {ids[off[0]]}, the next {ids[off[0] + 1 : off[0] + 2]}, the label "
            f"{labels[off[0]]}. The loss shifts nothing: labels must come one step ahead of the ids"
        )
    if not labelled:
        pytest.skip("no row supervises anything, which is a failure of its own")


def test_padding_is_masked_and_teaches_nothing(ask):
    reply = batch(ask)
    if reply["attention_mask"] is None:
        pytest.skip("the collated batch has no attention mask")
    rows = zip(reply["ids"], reply["labels"], reply["attention_mask"], strict=True)
    for number, (ids, labels, mask) in enumerate(rows):
        assert len(mask) == len(ids), f"row {number} has {len(ids)} ids and a mask of {len(mask)}"
        padding = edges(ids, reply["pad_id"])
        seen = [place for place in sorted(padding) if mask[place]]
        # The end of a text may be the id that pads, so one of them may be meant.
        assert len(seen) <= 1, (
            f"row {number}: {len(seen)} of {len(padding)} padding tokens have attention mask 1 (positions "
            f"{named([str(place) for place in seen])}): the model would read them as text"
        )
        hidden = [place for place, kept in enumerate(mask) if not kept and place not in padding]
        assert not hidden, (
            f"row {number}: {len(hidden)} tokens that are no padding have attention mask 0 (positions "
            f"{named([str(place) for place in hidden])}): the model would not read them"
        )
        taught = [place for place, kept in enumerate(mask) if not kept and labels[place] != IGNORED]
        assert not taught, (
            f"row {number}: {len(taught)} masked positions carry a label ({named([str(p) for p in taught])}): "
            "the loss would be taken on padding; label it -100"
        )


def edges(ids: list[int], pad: int) -> set[int]:
    """Places of the run of padding at either end."""
    first = next((place for place, i in enumerate(ids) if i != pad), len(ids))
    last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] != pad), -1)
    return {*range(first), *range(last + 1, len(ids))}


def test_image_tokens_match_the_features(ask, facts):
    if facts["layout"] == "in_front":
        pytest.skip("the layout puts features in front of the text, without image tokens")
    reply = batch(ask)
    if not reply["pictures"]:
        pytest.skip("PIL is not installed, so the rows could have no pictures")
    pairs = zip(reply["image_tokens"], reply["features"], strict=True)
    off = [
        f"row {n}: {tokens} tokens, {features} features"
        for n, (tokens, features) in enumerate(pairs)
        if tokens != features or not tokens
    ]
    assert not off, (
        f"image tokens in the batch do not match what the vision side makes of its pictures: {named(off)}"
    )


def test_the_batch_has_ids_labels_and_pictures(ask):
    keys = batch(ask)["batch_keys"]
    for names in (("input_ids",), ("labels", "targets"), ("images", "image", "pixel_values")):
        assert set(names) & set(keys), (
            f"the collated batch has no {' or '.join(names)} (it has: {named(sorted(keys))})"
        )
