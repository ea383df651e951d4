"""The forward pass: the loss fits the logits, the future is unseen, pictures count, rows stay apart."""

import math

import pytest

from compat.suites.probes import assert_differ, assert_same, forward, logits_of, mean_loss, named

CHECK = "Forward Pass Training"
LOSS = 1e-4  # relative; a mean over one label too many is off by more than 1e-2


def losses(ask, facts, rows):
    """(the model's loss, cross entropy recomputed from its logits)."""
    reply = ask("forward", rows=rows, padding="none")
    assert isinstance(reply["loss"], float), f"the loss is {reply['loss']!r}, expected a number"
    return reply["loss"], mean_loss(logits_of(reply, rows, facts["vocab_size"]), rows)


def assert_loss(got: float, want: float, what: str, cause: str):
    assert abs(got - want) <= LOSS * max(1.0, abs(want)), (
        f"{what} is {got:.6g}, cross entropy of the model's own logits at the labelled positions is "
        f"{want:.6g}. {cause}"
    )


def test_loss_is_finite(ask, probes):
    rows = [probes.row(labels="all", images=(0,)), probes.row(labels="all", images=(1,), seed=1)]
    loss = ask("forward", rows=rows, padding="none", train=True)["loss"]
    assert isinstance(loss, float) and math.isfinite(loss), (
        f"the loss of an ordinary batch in train mode is {loss}"
    )
    assert loss > 0, f"the loss of random tokens is {loss}: cross entropy cannot be zero or below there"


def test_loss_is_cross_entropy_at_the_labelled_positions(ask, facts, probes):
    rows = [probes.row(labels="all", images=(0,)), probes.row(labels="all", images=(1,), seed=1)]
    got, want = losses(ask, facts, rows)
    assert_loss(got, want, "the loss", "Are labels shifted twice, or image positions counted?")


def test_a_masked_label_does_not_change_the_loss(ask, facts, probes):
    rows = [probes.row(labels="last", images=(0,)), probes.row(labels="all", images=(1,), seed=1)]
    got, want = losses(ask, facts, rows)
    assert_loss(
        got,
        want,
        "the loss of a batch with masked labels",
        "Is ignore_index=-100 honoured, in sum and in count?",
    )


def test_a_later_token_does_not_change_earlier_logits(ask, facts, probes):
    text = probes.text(10)
    other = next(token for token in probes.ids if token != text[-1])
    rows = [probes.row(tokens=text, images=(0,)), probes.row(tokens=[*text[:-1], other], images=(0,))]
    a, b = forward(ask, facts, rows, padding="none")
    assert_same(
        b[:-1],
        a[:-1],
        "logits before the last token changed with the last token",
        "Is the causal mask applied, and to the right positions?",
    )
    assert_differ(b[-1:], a[-1:], "another last token", "The input ids seem not to reach the decoder.")


def test_another_picture_changes_the_logits(ask, facts, probes):
    rows = [probes.row(10, images=(0,)), probes.row(10, images=(1,))]
    a, b = forward(ask, facts, rows, padding="none")
    assert_differ(b, a, "the same words under another picture", "Do the image features reach the decoder?")


def test_rows_do_not_depend_on_their_neighbours_or_order(ask, facts, probes):
    rows = [probes.row(10, seed=seed, images=(seed,)) for seed in range(3)]
    batch = forward(ask, facts, rows, padding="none")
    turned = forward(ask, facts, rows[::-1], padding="none")[::-1]
    for number, (a, b) in enumerate(zip(turned, batch, strict=True)):
        assert_same(
            a,
            b,
            f"row {number} of a batch and of the same batch reversed",
            "Do rows share pictures or attention?",
        )
    [alone] = forward(ask, facts, rows[:1], padding="none")
    assert_same(batch[0], alone, "a row in a batch of 3 and alone", "Do rows share pictures or attention?")


RANDOM = ("drop", "jitter", "rescale", "rope_shift")  # parts of names: dropout, and DINOv3's moved positions


def test_train_mode_without_dropout_gives_what_eval_mode_gives(ask, facts, probes):
    values = {name: field["value"] for name, field in facts["config"].items() if any(part in name for part in RANDOM)}
    active = [f"{name}={value}" for name, value in values.items() if isinstance(value, int | float) and value > 0]
    if active:
        pytest.skip(f"training is random by its config ({named(active)})")
    lengths = (5, 11) if probes.takes("attention_mask") else (11, 11)
    rows = [
        probes.row(length, seed=seed, images=(seed,), labels="all") for seed, length in enumerate(lengths)
    ]
    for batch in (rows[1:], rows):
        padding = {"padding": "left" if batch is rows and len(set(lengths)) > 1 else "none"}
        evaluated, trained = (ask("forward", rows=batch, train=train, **padding) for train in (False, True))
        for number, (a, b) in enumerate(
            zip(
                logits_of(trained, batch, facts["vocab_size"]),
                logits_of(evaluated, batch, facts["vocab_size"]),
                strict=True,
            )
        ):
            assert_same(
                a,
                b,
                f"row {number} of {len(batch)} in train and in eval mode, no dropout configured",
                "Is a dropout rate hard-coded, or the mask or a branch left out in one of the modes?",
            )
        assert abs(trained["loss"] - evaluated["loss"]) <= LOSS * max(1.0, abs(evaluated["loss"])), (
            f"the loss of {len(batch)} rows is {trained['loss']:.6g} in train mode, {evaluated['loss']:.6g} in "
            "eval mode, with no dropout configured. Is it computed differently in one of the modes?"
        )


def test_the_same_call_twice_gives_the_same_logits(ask, facts, probes):
    rows = [probes.row(10, images=(0,))]
    first = forward(ask, facts, rows, padding="none")
    second = forward(ask, facts, rows, padding="none", again=True)
    assert_same(
        second[0], first[0], "the same row asked twice", "Is dropout on in eval mode?", tolerance=1e-6
    )
