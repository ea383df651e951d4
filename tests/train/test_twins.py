"""Every kind of tiny model learns to look: its answers are far better than with another row's picture.

Unusual: a frozen part is one that was trained, as in life, and everything beside it starts anew; a frozen part of
random weights would be another question.
"""

from __future__ import annotations

import json

import pytest
import torch

from nanovlm import VisionLanguageModel, preset
from nanovlm.cli import main
from nanovlm.data.synthetic import FAMILIES

pytestmark = pytest.mark.slow
STEPS = 500


def scores(folder, *words):
    """{family: shares} after a short run of the command."""
    words = [
        "train", "--train_dataset_path", "synthetic", "--output_dir", str(folder), "--run_name", "short",
        "--max_training_steps", str(STEPS), "--scored_scenes", "180", "--no-eval_in_epochs", *words,
    ]  # fmt: skip
    assert main(words) == 0
    return json.loads((folder / "short" / "scores.json").read_text())


def check(found):
    exact, shuffled = (sum(found[family][name] for family in FAMILIES) for name in ("exact", "shuffled"))
    assert (exact - shuffled) / len(FAMILIES) >= 0.2, found


@pytest.mark.parametrize("name", ["tiny_dinov3_gemma", "tiny_granite_docling"])
def test_another_architecture_looks(tmp_path, name):
    check(scores(tmp_path, "--use_preset", name))


@pytest.mark.parametrize(
    ("kept", "flags"),
    [("vision_encoder", ["--freeze_vision_encoder"]), ("decoder", ["--lr_language_backbone", "0"])],
    ids=["frozen encoder", "frozen language model"],
)
def test_a_model_with_a_frozen_part_looks(tmp_path, trained_tiny, kept, flags):
    trained = VisionLanguageModel.from_pretrained(trained_tiny)
    torch.manual_seed(1)
    fresh = VisionLanguageModel(preset("tiny"), load_backbone=False)
    getattr(fresh, kept).load_state_dict(getattr(trained, kept).state_dict())
    fresh.save_pretrained(tmp_path / "start")
    start = ["--resume_from_vlm_checkpoint", "--vlm_checkpoint_path", str(tmp_path / "start")]
    recipe = ["--use_preset", "tiny"]
    check(scores(tmp_path, *recipe, *start, *flags))
    after = VisionLanguageModel.from_pretrained(tmp_path / "short")
    for ours, theirs in zip(getattr(after, kept).parameters(), getattr(trained, kept).parameters(), strict=True):
        assert ours.equal(theirs), "a frozen part moved"
