"""The data pipeline: a batch teaches exactly the assistant's words, beside the right image tokens."""

import re

import pytest

from compat.suites.probes import named

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
