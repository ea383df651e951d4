"""Generation: the cache changes nothing, limits and seeds are kept, ids stay inside the vocabulary."""

import numpy as np
import pytest

from compat.suites.probes import DECISIVE, forward, margins, named, text_of

CHECK = "Generate Method"
NEW, LONG = 12, 64
SEEDS = range(1, 7)


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
    rows = prompts(probes)
    if not sum(compared(ask, facts, row, f"prompt {number}", NEW) for number, row in enumerate(rows)):
        pytest.skip("no step had a clear winner among the logits, so nothing could be compared")


def test_a_long_generation_equals_argmax_of_the_full_forward(ask, facts, probes):
    for number, row in enumerate(prompts(probes)):
        room = (facts["max_positions"] or 2 * LONG) - facts["image_tokens"] - len(text_of(row))
        if compared(ask, facts, row, f"prompt {number}", min(LONG, room)) > LONG // 2:
            return  # one that did not end early is enough
    pytest.skip(f"no text had more than {LONG // 2} steps with a clear winner, so nothing long was compared")


def compared(ask, facts, row: dict, what: str, count: int) -> int:
    """Steps at which the greedy choice was held against the full forward; those near a tie say nothing."""
    [ids] = generate(ask, [row], max_new_tokens=count)
    ids = until_special(ids, set(facts["special_ids"]))
    assert ids, f"{what}: nothing was generated for max_new_tokens={count}"
    # One full pass over prompt and answer gives every step's prediction without a cache.
    [logits] = forward(ask, facts, [continued(row, ids[:-1])], padding="none")
    steps = logits[len(text_of(row)) - 1 :]
    clear = margins(steps) > DECISIVE
    for step, (token, best) in enumerate(zip(ids, steps.argmax(axis=-1), strict=True)):
        assert token == best or not clear[step], (
            f"{what}, step {step}: generate chose id {token}, a full forward pass over the same tokens "
            f"chooses {int(best)} (margin {margins(steps)[step]:.1e}). "
            + (
                "Is the prompt's last position read?"
                if step == 0
                else "Are the cache, its positions or its mask off by one?"
            )
        )
    return int(clear.sum())


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


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_generated_ids_are_inside_the_vocabulary(ask, facts, probes, how):
    size, rows = facts["vocab_size"], prompts(probes)[:1]
    for row, ids in zip(rows, generate(ask, rows, greedy=how == "greedy"), strict=True):
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


def test_sampling_is_not_greedy_under_another_name(ask, facts, probes):
    rows = prompts(probes)
    greedy = generate(ask, rows)
    if any(generate(ask, rows, greedy=False, seed=seed) != greedy for seed in SEEDS):
        return
    logits = np.concatenate([values[-1:] for values in forward(ask, facts, rows, padding="none")])
    sure = 1 / np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1)
    if sure.min() > 0.9:
        pytest.skip("the model is so sure of every next token that sampling would hardly choose another")
    raise AssertionError(
        f"sampling with {len(SEEDS)} seeds gives {len(rows)} prompts exactly their greedy text, although the "
        f"likeliest next token has a probability of only {sure.min():.2f}: is the switch for sampling ignored?"
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_generating_changes_no_weight_and_no_mode(ask, probes, mode):
    row = prompts(probes)[0]
    for greedy in (True, False):
        reply = ask("generate", rows=[row], max_new_tokens=4, greedy=greedy, train=mode == "train")
        assert not reply["changed"], (
            f"generate changed {len(reply['changed'])} tensors of the state dict: {named(reply['changed'])}. "
            "A checkpoint saved after it would be another model"
        )
        assert reply["mode_kept"], (
            f"generate in {mode} mode left modules in another mode: put back what it was, or training goes on "
            "without dropout"
        )


def test_generating_leaves_the_model_as_it_was(ask, facts, probes):
    row = prompts(probes)[0]
    [before] = forward(ask, facts, [row], padding="none")
    generate(ask, [row], again=True)
    [after] = forward(ask, facts, [row], padding="none", again=True)
    assert np.allclose(before, after, rtol=0, atol=1e-6 * np.abs(before).max()), (
        "logits before and after a call to generate differ: does a cache, a mode or a weight stay changed?"
    )
