"""The tokenizer: text survives it, ids are those of tokenizer.json and inside the model's vocabulary."""

import pytest

from compat.suites.probes import named

CHECK = "Tokenizer Compatibility"
# Digits after white space are where a rebuilt pre-tokenizer drifts without anyone noticing.
TEXTS = (
    "What is this?",
    "A cat sits on the mat, doesn't it?",
    "Rows:\n\n12 of 345, 6.78 and  90",
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "Grüße aus Köln, naïve café",
    "日本語と emoji 🙂",
    " leading and trailing ",
)


def encoded(ask):
    return ask("tokenize", texts=list(TEXTS))


def test_decoding_gives_the_text_back(ask):
    changed = [
        f"{text!r} -> {back!r}"
        for text, back in zip(TEXTS, encoded(ask)["decoded"], strict=True)
        if back != text
    ]
    assert not changed, (
        f"{len(changed)} of {len(TEXTS)} texts change on the way through the tokenizer: {named(changed, 2)}"
    )


def test_ids_equal_those_of_the_tokenizer_file(ask):
    reply = ask("tokenize", texts=list(TEXTS), of="file")
    if reply["reference_ids"] is None:
        pytest.skip("there is no tokenizer.json to compare with, or no tokenizers package to read it")
    assert len(reply["ids"]) == len(reply["reference_ids"]) == len(TEXTS), "a text got no ids"
    drift = [
        f"{text!r}, {first_difference(ids, want)}"
        for text, ids, want in zip(TEXTS, reply["ids"], reply["reference_ids"], strict=True)
        if ids != want
    ]
    assert not drift, (
        f"{len(drift)} of {len(TEXTS)} texts get other ids from {reply['class']} than from its "
        "tokenizer.json: "
        f"{named(drift, 1)}. AutoTokenizer of transformers 5 rebuilds the pre-tokenizer of some checkpoints; "
        "PreTrainedTokenizerFast does not"
    )


def first_difference(ids: list[int], want: list[int]) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(ids, want, strict=False)) if a != b), min(len(ids), len(want))
    )
    return f"token {at}: {ids[at : at + 3]} instead of {want[at : at + 3]}"


def test_ids_are_inside_the_model_s_vocabulary(ask):
    reply = encoded(ask)
    size = reply["model_vocab_size"]
    outside = [
        f"{i} in {text!r}"
        for text, ids in zip(TEXTS, reply["ids"], strict=True)
        for i in ids
        if not 0 <= i < size
    ]
    assert not outside, f"ids beyond the model's {size} embeddings: {named(outside)}"
    assert reply["length"] <= size, (
        f"the tokenizer has {reply['length']} tokens, the model only {size} embeddings: "
        f"grow lm_vocab_size by {reply['length'] - size}"
    )


def test_special_tokens_have_their_own_ids_inside_the_vocabulary(ask):
    reply = encoded(ask)
    size, special = reply["model_vocab_size"], reply["special"]
    assert special, (
        "the tokenizer has no special token: where would a picture go, and how does an answer end?"
    )
    outside = [
        f"{name} {token!r} = {i}"
        for name, (token, i) in special.items()
        if not (isinstance(i, int) and 0 <= i < size)
    ]
    assert not outside, f"special tokens without an embedding (the model has {size}): {named(outside)}"
    by_id: dict[int, set[str]] = {}
    for token, i in special.values():
        by_id.setdefault(i, set()).add(token)
    shared = [f"{i}: {' and '.join(sorted(tokens))}" for i, tokens in by_id.items() if len(tokens) > 1]
    assert not shared, (
        f"different special tokens share one id: {named(shared)}. Were they added to the tokenizer?"
    )


def test_a_special_token_in_text_is_one_id(ask):
    special = {token: i for token, i in encoded(ask)["special"].values()}
    ids = ask("tokenize", texts=sorted(special))["ids"]
    broken = [
        f"{token!r} -> {got}"
        for token, got in zip(sorted(special), ids, strict=True)
        if got != [special[token]]
    ]
    assert not broken, f"special tokens fall apart when they stand in a prompt: {named(broken)}"
