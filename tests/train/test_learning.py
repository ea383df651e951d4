"""It really learns: the tiny preset, from random weights, on pictures that it has never seen."""

from __future__ import annotations

import json

import pytest

from nanovlm import VisionLanguageModel
from nanovlm.data.synthetic import FAMILIES
from nanovlm.train.metrics import read

pytestmark = pytest.mark.slow


@pytest.fixture
def scores(trained_tiny):
    return json.loads((trained_tiny / "scores.json").read_text())


def test_the_tiny_preset_answers_95_percent_of_held_out_scenes_exactly(trained_tiny, scores):
    assert sum(scores[family]["rows"] for family in FAMILIES) == 1000
    average = sum(scores[family]["exact"] for family in FAMILIES) / len(FAMILIES)
    assert average >= 0.95, (trained_tiny / "printed.txt").read_text()
    shown = (trained_tiny / "printed.txt").read_text()
    assert f"{100 * average:.1f}" in next(line for line in shown.splitlines() if line.startswith("mean"))


def test_it_looks(scores):
    """Without the right picture a family's answers are about as good as its commonest one."""
    for family in FAMILIES:
        for control in ("blank", "shuffled"):
            assert scores[family][control] <= scores[family]["chance"] + 0.1, (family, control, scores[family])
            assert scores[family]["exact"] >= scores[family][control] + 0.2, (family, control, scores[family])


def test_it_takes_five_minutes_of_two_cores_at_most(trained_tiny):
    assert float((trained_tiny / "cpu_s.txt").read_text()) <= 2 * 5 * 60


def test_the_curve_falls_and_the_checkpoint_loads(trained_tiny):
    losses = [record["loss"] for record in read(trained_tiny) if "loss" in record]
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 / 4
    assert VisionLanguageModel.from_pretrained(trained_tiny).cfg.lm_tokenizer == "byte"
