"""Generation: the cache changes nothing, rows do not meet, endings hold, and sampling repeats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.cache import KVCache
from nanovlm.errors import PromptError, PromptTooLong
from nanovlm.generate import pack_right, sample_next
from tests.model.helpers import pad, prompt, tiles, tiny_model

GENERATIONS = ["v0.1", "v0.2", "main"]
NEVER = -1  # an end token that no row writes


@pytest.fixture(scope="module", params=GENERATIONS)
def model(request):
    return tiny_model(request.param)


def greedy(model, ids, images, mask=None, count=10, **options):
    return model.generate(
        ids, images, mask, max_new_tokens=count, greedy=True, **{"eos_token_id": NEVER, **options}
    )


def by_full_forward(model, row, images, count):
    """Greedy ids without a cache: one whole pass a token."""
    row = list(row)
    start = len(row)
    for _ in range(count):
        row.append(int(model(torch.tensor([row]), images)[0][0, -1].argmax()))
    return row[start:]


@torch.no_grad()
def test_cached_greedy_ids_are_those_of_full_forward_passes(model):
    cfg = model.cfg
    for seed, count in enumerate((0, 1, 2)):
        row, images = prompt(cfg, 7, count, seed), [[tiles(cfg, count, seed)] if count else []]
        assert greedy(model, torch.tensor([row]), images)[0].tolist() == by_full_forward(
            model, row, images, 10
        )


@settings(max_examples=8, deadline=None)
@given(length=st.integers(1, 20), seed=st.integers(0, 1000), count=st.integers(0, 2))
@torch.no_grad()
def test_the_cache_never_changes_what_is_generated(length, seed, count):
    model = tiny_model(seed=seed % 3)
    row, images = prompt(model.cfg, length, count, seed), [[tiles(model.cfg, count, seed)] if count else []]
    assert greedy(model, torch.tensor([row]), images, count=5)[0].tolist() == by_full_forward(
        model, row, images, 5
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_writes_what_its_rows_write_alone(model, side):
    cfg = model.cfg
    rows = [prompt(cfg, 5, 1, 1), prompt(cfg, 12, 2, 2), prompt(cfg, 8, 0, 3)]
    images = [[tiles(cfg, 1, 1)], [tiles(cfg, 2, 2)], []]
    ids, mask = pad(rows, side)
    together = greedy(model, ids, images, mask)
    alone = [greedy(model, torch.tensor([row]), [seen])[0] for row, seen in zip(rows, images, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(row.tolist()) for row in together}) > 1, (
        "rows that all write the same would prove nothing"
    )


def endings(model):
    """A prompt, its free continuation, and an id in it that something else follows."""
    for seed in range(40):
        ids = torch.tensor([prompt(model.cfg, 6, 0, seed)])
        free = model.generate(
            ids, None, max_new_tokens=12, eos_token_id=NEVER, generator=torch.Generator().manual_seed(seed)
        )[0]
        for place in range(1, 10):
            if free[place] not in free[:place] and free[place + 1] != free[place]:
                return ids, free, place, seed
    raise AssertionError("no seed writes anything varied")


def test_a_row_stops_at_the_end_token_and_the_rest_of_the_batch_goes_on(model):
    ids, free, place, seed = endings(model)
    end = int(free[place])
    stopped = model.generate(
        ids, None, max_new_tokens=12, eos_token_id=end, generator=torch.Generator().manual_seed(seed)
    )
    assert stopped.tolist() == [free[: place + 1].tolist()]
    plain = greedy(model, ids.repeat(2, 1), None)
    first = int(plain[0, 0])
    mixed = torch.cat((ids, torch.tensor([prompt(model.cfg, 6, 0, 99)])))
    both = greedy(model, mixed, None, eos_token_id=first)
    assert both[0].tolist() == [first] * both.shape[1]


def test_a_stop_sequence_ends_a_row_like_the_end_token(model):
    ids, free, place, seed = endings(model)
    sequence = free[place - 1 : place + 1].tolist()
    stopped = model.generate(ids, None, max_new_tokens=12, eos_token_id=NEVER, stop=[sequence, [7, 7, 7]],
                             generator=torch.Generator().manual_seed(seed))  # fmt: skip
    assert stopped.tolist() == [free[: place + 1].tolist()]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_one_stop_sequence_may_be_given_flat(model, kind):
    ids, free, place, seed = endings(model)
    sequence = free[place - 1 : place + 1].tolist()
    stop = kind(sequence) if kind is not torch.tensor else [torch.tensor(sequence)]
    stopped = model.generate(ids, None, max_new_tokens=12, eos_token_id=NEVER, stop=stop,
                             generator=torch.Generator().manual_seed(seed))  # fmt: skip
    assert stopped.tolist() == [free[: place + 1].tolist()]


@pytest.mark.parametrize("stop", ["end", ["end"], [1, "x"], [[1], 2], [[]], [1.5], [[2.5]], 7])
def test_a_stop_that_is_no_ids_is_refused_with_the_way_out(model, stop):
    with pytest.raises(PromptError, match=r"stop=.*: expected sequences of token ids.*tokenizer.encode"):
        model.generate(torch.tensor([[3, 4]]), None, eos_token_id=NEVER, stop=stop)


def test_the_tokenizers_end_token_is_asked_when_none_is_given():
    model = tiny_model()
    ids, free, place, seed = endings(model)
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(int(free[place]))
    stopped = model.generate(ids, None, max_new_tokens=12, generator=torch.Generator().manual_seed(seed))
    assert stopped.tolist() == [free[: place + 1].tolist()]


def test_zero_new_tokens_are_an_empty_tensor(model):
    out = model.generate(torch.tensor([prompt(model.cfg, 4), prompt(model.cfg, 4)]), None, max_new_tokens=0)
    assert out.shape == (2, 0) and out.dtype == torch.int64


def test_the_same_seed_samples_the_same_and_another_one_something_else(model):
    ids = torch.tensor([prompt(model.cfg, 6, 1)])

    def sampled(seed):
        torch.manual_seed(seed)
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": NEVER}
        return model.generate(ids, tiles(model.cfg, 1), max_new_tokens=10, **options).tolist()

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_prompt_and_its_answer_must_fit_the_positions(model):
    limit = model.cfg.lm_max_position_embeddings
    with pytest.raises(
        PromptTooLong,
        match="1020 positions and max_new_tokens=5 need 1025, but lm_max_position_embeddings=1024: "
        "max_new_tokens=4 still fits",
    ):
        greedy(model, torch.tensor([prompt(model.cfg, 1020)]), None, count=5)
    assert greedy(model, torch.tensor([prompt(model.cfg, limit - 2)]), None, count=2).shape == (1, 2)


def test_a_repetition_penalty_makes_a_seen_token_less_likely(model):
    ids = torch.tensor([prompt(model.cfg, 8)])
    out = greedy(model, ids, None, count=30, repetition_penalty=1e6)[0].tolist()
    assert len(set(out)) == 30 and not set(out) & set(ids[0].tolist())


def test_a_streamer_gets_every_step_and_the_end(model):
    class Kept:
        steps, ended = [], 0

        def put(self, ids):
            self.steps.append(ids.tolist())

        def end(self):
            self.ended += 1

    kept = Kept()
    ids = torch.tensor([prompt(model.cfg, 4, seed=1), prompt(model.cfg, 4, seed=2)])
    out = greedy(model, ids, None, count=4, streamer=kept)
    assert torch.tensor(kept.steps).T.tolist() == out.tolist() and kept.ended == 1


def test_generating_leaves_logits_mode_and_gradients_alone(model):
    ids, pixels = torch.tensor([prompt(model.cfg, 6, 1)]), tiles(model.cfg, 1)
    before = model(ids, pixels)[0]
    greedy(model, ids, pixels)
    after = model(ids, pixels)[0]
    assert torch.equal(before, after) and after.requires_grad and not model.training


def test_a_row_of_padding_alone_is_refused(model):
    with pytest.raises(PromptError, match="row 1 of the batch is all padding"):
        greedy(model, torch.full((2, 3), 5), None, torch.tensor([[1, 1, 1], [0, 0, 0]]))


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": -1}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": -1.0}, {"repetition_penalty": 0}],
)
def test_a_number_nothing_can_be_drawn_with_is_refused_by_name(model, options):
    with pytest.raises(PromptError, match=next(iter(options))):
        model.generate(torch.tensor([[3, 4]]), None, eos_token_id=NEVER, **options)


# -- parts ----------------------------------------------------------------------------------------------


def test_top_k_keeps_the_k_likeliest():
    logits = torch.randn(1, 50)
    allowed = set(logits.topk(5).indices[0].tolist())
    drawn = {int(sample_next(logits, top_k=5)[0]) for _ in range(200)}
    assert drawn <= allowed and len(drawn) > 1


def test_top_p_keeps_the_likeliest_up_to_its_share_and_at_least_one():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert {int(sample_next(logits, top_p=0.85)[0]) for _ in range(200)} == {0, 1}
    assert {int(sample_next(logits, top_p=0.01)[0]) for _ in range(20)} == {0}


def test_choosing_comes_before_temperature():
    """A high temperature flattens what top_p left, and brings nothing back."""
    logits = torch.tensor([[4.0, 2.0, 1.0, 0.0]])
    assert {int(sample_next(logits, top_p=0.9, temperature=1e6)[0]) for _ in range(200)} == {0}
    assert len({int(sample_next(logits, top_k=3, temperature=1e6)[0]) for _ in range(200)}) == 3


def test_temperature_zero_is_greedy():
    logits = torch.randn(4, 9)
    assert torch.equal(sample_next(logits, temperature=0), logits.argmax(-1))


def test_packing_keeps_the_order_of_what_is_valid():
    ids = torch.tensor([[1, 9, 2, 9], [9, 9, 3, 4]])
    packed, valid = pack_right(ids, (ids != 9).long())
    assert packed[:, 2:].tolist() == [[1, 2], [3, 4]] and valid.tolist() == [[False, False, True, True]] * 2
    assert pack_right(ids, torch.ones_like(ids)) == (ids, None)


def test_the_cache_gives_back_what_was_written_and_refuses_more():
    cache = KVCache(2, 1, 1, 3, 4, dtype=torch.float32, device="cpu")
    k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    for layer in range(2):
        keys, values = cache.update(layer, k, v)
        assert torch.equal(keys, k) and torch.equal(values, v)
    cache.advance(2)
    keys, _ = cache.update(0, k[:, :, :1], v[:, :, :1])
    assert torch.equal(keys, torch.cat((k, k[:, :, :1]), 2))
    with pytest.raises(IndexError, match="holds 3 positions, 4 are wanted"):
        cache.update(0, k, v)
