"""Generation: the cache changes nothing, limits and seeds are kept, ids stay inside the vocabulary."""

import numpy as np
import pytest

from compat.suites.probes import DECISIVE, forward, margins, named, text_of

CHECK = "Generate Method"
NEW = 12


def generate(ask, rows, **parameters):
    ids = ask("generate", rows=rows, **{"max_new_tokens": NEW, "greedy": True, **parameters})["ids"]
    assert len(ids) == len(rows), f"generate gave {len(ids)} rows for {len(rows)} prompts"
    return ids


def prompts(probes):
    return [probes.row(6, seed=seed, images=(seed,)) for seed in range(4)]


def continued(row: dict, ids: list[int]) -> dict:
    return {**row, "tokens": [*row["tokens"], *ids]}


def until_special(ids: list[int], special: set[int]) -> list[int]:
    """Up to and with the first special id: what a model does after it ended is another check."""
    return next((ids[: n + 1] for n, i in enumerate(ids) if i in special), ids)


def test_cached_generation_equals_argmax_of_the_full_forward(ask, facts, probes):
    special = set(facts["special_ids"])
    compared = 0
    for number, row in enumerate(prompts(probes)):
        [ids] = generate(ask, [row])
        ids = until_special(ids, special)
        assert ids, f"prompt {number}: nothing was generated for max_new_tokens={NEW}"
        # One full pass over prompt and answer gives every step's prediction without a cache.
        [logits] = forward(ask, facts, [continued(row, ids[:-1])], padding="none")
        steps = logits[len(text_of(row)) - 1 :]
        for step, (token, margin, best) in enumerate(
            zip(ids, margins(steps), steps.argmax(axis=-1), strict=True)
        ):
            if margin <= DECISIVE:
                break  # a tie: from here the two may go different ways, both rightly
            compared += 1
            assert token == best, (
                f"prompt {number}, step {step}: generate chose id {token}, a full forward pass over the "
                "same tokens "
                f"chooses {int(best)} (margin {margin:.1e}). "
                + (
                    "Is the prompt's last position read?"
                    if step == 0
                    else "Are the cache, its positions or its mask off by one?"
                )
            )
    if not compared:
        pytest.skip("no step had a clear winner among the logits, so nothing could be compared")


def test_prompts_of_different_length_generate_what_they_generate_alone(ask, facts, probes):
    rows = [probes.row(length, seed=length, images=(0,)) for length in (4, 9)]
    together = generate(ask, rows, padding="left")
    for number, row in enumerate(rows):
        [alone] = generate(ask, [row])
        for step, (a, b) in enumerate(zip(together[number], alone, strict=False)):
            if a == b:
                if a in facts["special_ids"]:
                    break
                continue
            [logits] = forward(ask, facts, [continued(row, alone[:step])], padding="none")
            assert margins(logits[-1:])[0] <= DECISIVE, (
                f"prompt {number} at step {step}: id {b} alone, {a} in a left-padded batch. "
                "Do positions count the padding, or does the mask not grow with the cache?"
            )
            break


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_generated_ids_are_inside_the_vocabulary(ask, facts, probes, greedy):
    size = facts["vocab_size"]
    for row, ids in zip(prompts(probes)[:1], generate(ask, prompts(probes)[:1], greedy=greedy), strict=True):
        outside = [str(i) for i in ids if not (isinstance(i, int) and 0 <= i < size)]
        assert not outside, (
            f"generated ids outside the vocabulary of {size}: {named(outside)} (prompt {text_of(row)})"
        )


def test_no_more_than_max_new_tokens_come(ask, facts, probes):
    special = set(facts["special_ids"])
    for count in (1, NEW):
        [ids] = generate(ask, prompts(probes)[:1], max_new_tokens=count)
        assert len(ids) <= count, (
            f"max_new_tokens={count} gave {len(ids)} tokens ({ids}): the limit is not kept"
        )
        assert len(ids) == count or set(ids) & special, (
            f"max_new_tokens={count} gave only {len(ids)} tokens although none of them ends the text ({ids})"
        )


def test_max_new_tokens_zero_gives_nothing(ask, probes):
    [ids] = generate(ask, prompts(probes)[:1], max_new_tokens=0)
    assert ids == [], f"max_new_tokens=0 gave {len(ids)} tokens ({ids}), expected none"


def test_sampling_with_the_same_seed_repeats(ask, probes):
    rows = prompts(probes)[:2]
    first = generate(ask, rows, greedy=False, seed=7)
    second = generate(ask, rows, greedy=False, seed=7, again=True)
    assert first == second, (
        f"seed 7 gave {first} and then {second}. Is something drawn from a generator that "
        "torch.manual_seed does not reach?"
    )


def test_generating_leaves_the_model_as_it_was(ask, facts, probes):
    row = prompts(probes)[0]
    [before] = forward(ask, facts, [row], padding="none")
    generate(ask, [row], again=True)
    [after] = forward(ask, facts, [row], padding="none", again=True)
    assert np.allclose(before, after, rtol=0, atol=1e-6 * np.abs(before).max()), (
        "logits before and after a call to generate differ: does a cache, a mode or a weight stay changed?"
    )
