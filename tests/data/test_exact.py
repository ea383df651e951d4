"""The score of exact answers and its controls, with models whose answers are known beforehand."""

from __future__ import annotations

import pytest
import torch

from nanovlm import exact
from nanovlm.data.synthetic import APART, FAMILIES, HeldOut
from nanovlm.errors import DataError
from tests.data.helpers import picture
from tests.model.helpers import tiny_model

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def rows(count=12, family="colour"):
    names = [list(COLOURS)[number % 3] for number in range(count)]
    return [
        {"images": [picture(colour=name)], "texts": [{"user": "q", "assistant": name, "family": family}]}
        for name in names
    ]


class Looks:
    """A stand-in that names the colour it sees, or one it always says; everything else is a real tiny model."""

    def __init__(self, says=None):
        self.model, self.says, self.training = tiny_model(), says, True
        self.cfg, self.tokenizer, self.MP = self.model.cfg, self.model.tokenizer, self.model.MP

    def eval(self):
        self.train(False)

    def train(self, mode):
        self.training = mode

    def generate(self, input_ids, images, attention_mask, max_new_tokens, greedy):
        assert not self.training and greedy and len(images) == len(input_ids) == len(attention_mask)
        said = []
        for (tiles,) in images:
            seen = tiles.mean(dim=(0, 2, 3)) * 255
            near = {name: (seen - torch.tensor(colour).float()).abs().sum() for name, colour in COLOURS.items()}
            said.append(self.says or min(near, key=near.get))
        ids = [self.tokenizer.encode(name)[:max_new_tokens] for name in said]
        end = self.tokenizer.eos_token_id
        return torch.tensor([row + [end] * (max_new_tokens - len(row)) for row in ids])


def test_a_model_that_looks_is_told_from_one_that_guesses():
    seeing, guessing = exact.score(Looks(), rows()), exact.score(Looks("red"), rows())
    assert seeing == {"colour": exact.Score(12, exact=1, chance=1 / 3, blank=0, shuffled=0)} or (
        seeing["colour"].exact == 1 and seeing["colour"].blank <= 1 / 3 and seeing["colour"].shuffled == 0
    )
    assert guessing["colour"] == exact.Score(12, exact=1 / 3, chance=1 / 3, blank=1 / 3, shuffled=1 / 3)


def test_families_are_scored_apart_and_batches_change_nothing():
    asked = rows(7, "one") + rows(6, "two")
    whole = exact.score(Looks(), asked)
    assert whole == exact.score(Looks(), asked, batch_size=4)
    assert [whole[family].rows for family in ("one", "two")] == [7, 6]
    assert exact.mean(whole) == 1 and exact.mean(whole, ("two",), "chance") == 1 / 3


def test_without_controls_only_the_answers_are_made():
    only = exact.score(Looks(), rows(), controls=False)["colour"]
    assert (only.exact, only.blank, only.shuffled) == (1, None, None)
    assert "blank" not in exact.table({"colour": only}) and "chance" in exact.table({"colour": only})


def test_the_table_has_a_line_a_family_and_names_what_stands_apart():
    scores = exact.score(Looks(), rows(6, "colour") + rows(3, "charts"))
    lines = exact.table(scores, ("colour",)).splitlines()
    assert lines[0].split() == ["family", "rows", "exact", "chance", "blank", "shuffled"]
    assert lines[1].split()[:4] == ["colour", "6", "100.0", "33.3"]
    assert lines[2].split()[:3] == ["mean", "6", "100.0"] and lines[3].endswith("(apart)")


def test_the_mode_of_the_model_is_restored_and_no_rows_are_refused():
    model = Looks()
    exact.score(model, rows(3))
    assert model.training
    with pytest.raises(DataError, match="no rows to score"):
        exact.score(model, [])


def test_a_model_of_random_weights_is_near_chance_on_the_held_out_scenes():
    asked = HeldOut(24, FAMILIES + APART)
    scores = exact.score(tiny_model(), (asked[number] for number in range(24)))
    assert list(scores) == [*FAMILIES, *APART]
    assert exact.mean(scores) <= 0.1
