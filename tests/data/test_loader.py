"""Loaders: order, resuming, sharing out, skipping, errors."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
import torch

from nanovlm.data.rows import Reader
from nanovlm.errors import ConfigError, DataError, NoLabels
from tests.data.helpers import built, encoder, ids_of, loader, row, rows, same


def take(source, count):
    return list(itertools.islice(source, count))


def with_faults(count):
    """Every fifth row is broken in one of three ways."""
    made = rows(count)
    for number in range(0, count, 5):
        made[number] = [{"images": [b"no picture"], "texts": row()["texts"]}, {"texts": []}, row("x" * 999)][number % 3]
    return made


def test_an_epoch_reads_every_row_once_in_an_order_that_the_seed_decides():
    one, again, other = (ids_of(take(loader(rows(12), seed=seed), 12)) for seed in (1, 1, 2))
    assert one == again != other
    assert sorted(one[:12]) == sorted(one[12:]) == sorted(f"row {n}" for n in range(12))
    assert one[:12] != one[12:], "a second epoch in the first one's order"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_resumed_loader_goes_on_bit_by_bit(num_workers, pack, after):
    options = {"num_workers": num_workers, "pack": pack, "lanes": 2}
    whole, first = loader(with_faults(40), **options), loader(with_faults(40), **options)
    want = take(whole, after + 6)
    take(first, after)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = loader(with_faults(40), **options)
    second.load_state_dict(state)
    assert all(map(same, take(second, 6), want[after:]))
    assert second.stats == whole.stats
    whole.close(), second.close()


@pytest.mark.parametrize("pack", [False, True])
def test_workers_change_who_reads_and_not_what(pack):
    alone = loader(with_faults(40), lanes=2, pack=pack)
    helped = loader(with_faults(40), num_workers=2, pack=pack)
    assert all(map(same, take(alone, 14), take(helped, 14)))
    assert alone.stats == helped.stats
    helped.close()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("lanes", [1, 2])
def test_ranks_and_workers_read_disjoint_rows_and_together_all(pack, lanes):
    made = rows(240)
    readers = [loader(made, rank=rank, world_size=3, lanes=lanes, pack=pack) for rank in range(3)]
    # an epoch is 40 rows a lane, of two lanes; a window reads 34 of them at most
    seen = [Counter(ids_of(take(reader, 4 if pack else 40))) for reader in readers]
    together = sum(seen, Counter())
    assert max(together.values()) == 1, "two readers, or one twice, read the same row"
    if not pack:
        assert together == Counter(f"row {n}" for n in range(240))


def test_two_ranks_take_what_one_takes_with_twice_the_batch():
    for lanes in (1, 2):
        pair = [loader(rows(24), rank=rank, world_size=2, lanes=lanes) for rank in (0, 1)]
        one = loader(rows(24), batch_size=4)
        for _ in range(9):
            assert ids_of([next(pair[0]), next(pair[1])]) == ids_of([next(one)])


def test_what_cannot_be_used_is_skipped_and_counted_by_reason(caplog):
    source = loader(with_faults(30), batch_size=1)
    seen = ids_of(take(source, 24))
    next(source)  # the first of a second epoch: all that was skipped in the first is counted
    assert len(set(seen)) == 24
    skipped = source.stats["skipped"]
    assert min(skipped.values()) >= 2 and set(skipped) == {"unreadable picture", "too long", "no text"}
    assert source.stats["rows"] == source.stats["batches"] == 25
    assert len([line for line in caplog.messages if "rows is" in line or "rows are" in line]) == 3
    assert "rows[" in caplog.text


def test_a_data_set_of_which_nothing_can_be_used_ends_with_the_reason():
    broken = [{"images": [b"x"], "texts": row()["texts"]}] * 7
    with pytest.raises(DataError, match="7 rows one after the other cannot be used; the last: unreadable picture"):
        next(loader(broken))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_without_a_label_stops_with_the_reason(num_workers):
    encode = encoder(max_length=256)
    encode.tokenizer = type(encode.tokenizer).__new__(type(encode.tokenizer))
    encode.tokenizer.__dict__.update(encoder().tokenizer.__dict__)
    # a template that says everything but what an assistant says
    encode.tokenizer.chat_template = "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}"
    source = loader(rows(4), encoder=encode, num_workers=num_workers)
    with pytest.raises(NoLabels, match=r"none of the \d+ positions of this batch has a label \(row"):
        next(source)


def test_image_tokens_found_in_words_are_counted_and_stay_words():
    made = [row("look: <|image|>", id="a"), row("<row_1_col_1>", id="b")]
    source = loader(made)
    batch = next(source)
    cfg_token = encoder().tokenizer.image_token_id
    tiles = sum(len(stack) for group in batch["images"] for stack in group)
    assert int((batch["input_ids"] == cfg_token).sum()) == tiles * encoder().tokens_per_cell
    assert source.stats["neutralised"] == 2
    taught = batch["labels"][batch["labels"] != -100]
    assert "<|image|>" in encoder().tokenizer.decode(taught) and cfg_token not in taught


def test_a_state_of_other_readers_is_refused_with_both_numbers():
    state = loader(rows(8), lanes=2).state_dict()
    with pytest.raises(ConfigError, match="saved with num_workers=2, this run has num_workers=1"):
        loader(rows(8)).load_state_dict(state)
    begun = loader(rows(8), lanes=2)
    next(begun)
    with pytest.raises(ConfigError, match="has begun"):
        begun.load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_is_the_same_each_time_and_disjoint_between_ranks(num_workers):
    ranks = [built(rank=rank, world_size=2, val_size=21, num_workers=num_workers)[1] for rank in (0, 1)]
    seen = [ids_of(list(half)) for half in ranks]
    assert [sorted(ids_of(list(half))) for half in ranks] == [sorted(names) for names in seen]
    assert sorted(sum(seen, [])) == sorted(f"held_out[{n}]" for n in range(21))
    lengths = [len(list(half)) for half in ranks]
    assert abs(lengths[0] - lengths[1]) <= 1


def test_ratings_below_the_least_are_left_out():
    rated = [row("good", "bad", relevance_ratings=[3, 1], id="a"), row("bad", relevance_ratings=[1], id="b")]
    source = loader(rated, batch_size=1, encoder=encoder(reader=Reader({"relevance": 2}), max_length=256))
    batch = next(source)
    text = encoder().tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert text == "good<|im_end|>"
    next(source)
    assert set(source.stats["skipped"]) == {"rating"}


def test_a_batch_is_padded_on_the_left_and_padding_teaches_nothing():
    batch = next(loader([row("a", id="a"), row("a long answer", id="b")], seed=None))
    padding = batch["attention_mask"] == 0
    assert padding[0].sum() == 12 and not padding[1].any()
    assert padding[0, :12].all() and (batch["labels"][padding] == -100).all()
    assert torch.equal(batch["attention_mask"].unique(), torch.tensor([0, 1]))
