"""The grid: the front and the choice, settings that cannot be, going on, and the whole of it on a trained model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from PIL import Image

from nanovlm import VisionLanguageModel, cli, preset
from nanovlm.checks import POOLINGS
from nanovlm.errors import ConfigError
from nanovlm.evaluate.asking import batch_of
from nanovlm.evaluate.drawing import layout
from nanovlm.evaluate.grid import Row, cheapest, front, settings, table
from nanovlm.evaluate.questions import questions
from tests.house.tree import ROOT

GRID = ["--tasks", "synthetic", "--max-samples", "4", "--resolutions", "128 64", "--pools", "none,pool_avg"]


def row(name, tflops, accuracy, **others):
    return Row(name, 64, "none", 4, accuracy, tflops, **others)


ROWS = [
    row("big", 4.0, 0.9),
    row("dear", 5.0, 0.8),
    row("small", 1.0, 0.5),
    row("mid", 2.0, 0.7),
    row("twin", 2.0, 0.6),
]


def test_the_front_is_what_nothing_beats():
    assert [each.name for each in front(ROWS)] == ["small", "mid", "big"]
    for each in ROWS:
        beaten = any(o.tflops <= each.tflops and o.accuracy >= each.accuracy and o != each for o in ROWS)
        assert beaten == (each not in front(ROWS))
    assert front([row("none", 0.0, 0.0, problem="no")]) == []


@pytest.mark.parametrize(("floor", "name"), [(0.0, "small"), (0.5, "small"), (0.65, "mid"), (0.9, "big"), (0.95, None)])
def test_the_cheapest_above_the_floor(floor, name):
    chosen = cheapest(ROWS, floor)
    assert (chosen and chosen.name) == name


def test_the_table_marks_the_front_and_the_choice():
    lines = table([*ROWS, replace(ROWS[0], name="odd", problem="does not fit")], ROWS[3]).splitlines()
    assert [line[0] for line in lines[1:]] == ["*", " ", "*", ">", " ", " "]
    assert "odd" in lines[-1] and "impossible: does not fit" in lines[-1]


def test_each_pooling_is_given_the_options_that_it_reads():
    found = {cell.pool: cell for cell in settings([64], list(POOLINGS), 4, 0.25, "projector")}
    assert (found["none"].pool_factor, found["none"].keep_ratio, found["none"].pool_at) == (None, None, None)
    assert (found["drop_norm"].pool_factor, found["drop_norm"].keep_ratio) == (None, 0.25)
    assert (found["pool_max"].pool_factor, found["pool_max"].keep_ratio) == (4, None)
    assert len({cell.name for cell in found.values()}) == len(found)


def test_nothing_possible_is_not_drawn():
    with pytest.raises(ConfigError, match="nothing to draw"):
        layout([row("none", 0, 0, problem="no")], 0.5, None)


def test_a_grid_is_told_drawn_and_gone_on_with(tmp_path, tiny_folder, capsys):
    words = ["slim", "--model", str(tiny_folder), "--grid", *GRID, "--output", str(tmp_path / "grid"), "--json"]
    assert cli.main([*words, "--min-accuracy", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {each["name"]: each for each in found["rows"]}
    assert set(rows) == {"res128-none", "res128-pool_avg", "res64-none", "res64-pool_avg"}
    assert [rows[name]["image_tokens"] for name in sorted(rows)] == [16, 4, 4, 1]
    assert rows["res64-none"]["tflops"] < rows["res128-pool_avg"]["tflops"] < rows["res128-none"]["tflops"]
    assert found["chosen"] == min(rows.values(), key=lambda each: each["tflops"])["name"]
    picture = Image.open(tmp_path / "grid" / "front.png")
    assert len(picture.getcolors(1 << 20)) > 3
    svg = ElementTree.parse(tmp_path / "grid" / "front.svg").getroot()
    circles = [each for each in svg.iter() if each.tag.endswith("circle")]
    assert len(circles) == 4
    assert cli.main([*words, "--min-accuracy", "1.0", "--pools", "none"]) == 1, "a floor that nothing reaches"
    again = json.loads(capsys.readouterr().out)
    assert again["chosen"] is None and again["rows"] == [rows["res128-none"], rows["res64-none"]], "not done again"
    kept = json.loads((tmp_path / "grid" / "grid.json").read_text())["rows"]
    assert sorted(each["name"] for each in kept) == sorted(rows), "what is not asked for stays"
    assert cli.main([*words, "--mode", "oa"]) == 2
    assert "is of another grid: asked=" in capsys.readouterr().err


def test_a_setting_that_cannot_be_is_told_and_the_others_are_tried(tmp_path, tiny_folder, capsys):
    words = ["slim", "--model", str(tiny_folder), "--grid", *GRID[:-4], "--resolutions", "64 32", "--pools", "pool_avg"]
    assert cli.main([*words, "--output", str(tmp_path / "grid"), "--min-accuracy", "0"]) == 0
    shown = capsys.readouterr().out
    assert "impossible: resolution=32 is no multiple of 64" in shown and "res64-pool_avg" in shown
    words[words.index("64 32")] = "32"
    assert cli.main([*words, "--output", str(tmp_path / "other")]) == 2
    assert "not one of 1 settings is possible" in capsys.readouterr().err


def test_one_setting_is_saved_and_loads_without_flags(tmp_path, tiny_folder, capsys):
    words = ["slim", "--model", str(tiny_folder), "--save", str(tmp_path / "small")]
    assert cli.main([*words, "--resolution", "64", "--pool", "pool_adaptive", "--pool-at", "projector"]) == 0
    model = VisionLanguageModel.from_pretrained(tmp_path / "small")
    assert (model.cfg.vit_img_size, model.cfg.pool, model.cfg.mp_image_token_length) == (64, "pool_adaptive", 1)
    assert cli.main([*words, "--resolution", "64"]) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_a_setting_is_trained_at_its_own_size(tmp_path, tiny_folder, capsys):
    words = [
        "slim",
        "--model",
        str(tiny_folder),
        "--grid",
        *GRID[:-4],
        "--resolutions",
        "64",
        "--pools",
        "pool_adaptive",
    ]
    tuned = ["--finetune-steps", "3", "--finetune-batch", "2", "--output", str(tmp_path), "--min-accuracy", "0"]
    assert cli.main([*words, *tuned]) == 0
    model = VisionLanguageModel.from_pretrained(tmp_path / "runs" / "res64-pool_adaptive")
    assert model.cfg.pool == "pool_adaptive" and model.cfg.vit_img_size == 64
    assert model.MP.pool.attention[2].weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--grid", "--pools", "average"], "'average'; there are: none, pool_avg"),
        (["--grid", "--resolutions", "64px"], "expected pixels"),
        (["--grid", "--min-accuracy", "65"], "expected a share from 0 to 1"),
        (["--grid", "--finetune-steps", "-1"], "--finetune-steps -1"),
        (["--grid", "--resolution", "64"], "go with --save"),
        ([], "give one of both"),
        (["--grid", "--save", "x"], "give one of both"),
        (["--save", "x"], "what is to become smaller"),
    ],
)
def test_a_mistake_ends_with_a_sentence(words, told, tiny_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["slim", "--model", str(tiny_folder), *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- on a model that has learned ----------------------------------------------------------------------------


def by_hand(tokens, patches, text, adaptive, vocabulary):
    """FLOPs of one question to tiny_slim: 2 layers of width 32 that see, 3 of width 64 that read."""
    P, T = patches, text + tokens
    vision = 2 * P * 192 * 32 + 2 * (2 * P * 32 * 96 + 4 * P * P * 32 + 2 * P * 32 * 32 + 2 * 2 * P * 32 * 64)
    projector = 2 * tokens * 128 * 64 + (2 * 2 * P * 32 * 8 if adaptive else 0)
    reading = 3 * (2 * T * 64 * 128 + 4 * T * T * 64 + 2 * T * 64 * 64 + 3 * 2 * T * 64 * 128)
    return vision + projector + reading + 2 * 64 * vocabulary


@pytest.mark.slow
def test_a_grid_of_a_trained_model_finds_a_cheaper_setting_above_the_floor(tmp_path):
    """Trained first; then 4 resolutions x 5 poolings, as a user would, in five minutes of one core: half of two."""
    base, grid = tmp_path / "base", tmp_path / "grid"
    trained = "train --use_preset tiny_slim --train_dataset_path synthetic --run_name base --max_training_steps 700"
    trained += f" --scored_scenes 0 --no-eval_in_epochs --output_dir {tmp_path}"
    assert cli.main(trained.split()) == 0
    asked = "--tasks synthetic --max-samples 120 --batch_size 60 --finetune-steps 25 --json".split()
    words = ["slim", "--model", str(base), "--grid", "--resolutions", "128 96 64 32", *asked, "--output", str(grid)]
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "nanovlm", *words], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {(each["resolution"], each["pool"]): each for each in found["rows"]}
    assert len(rows) == 20 and not any(each["problem"] for each in rows.values())
    assert spent < 300
    model = VisionLanguageModel(preset("tiny_slim"), load_backbone=False)
    drawn = list(questions("synthetic", most=120))
    texts = batch_of(model, [q.text for q in drawn], [[q.picture] for q in drawn]).mask.sum(1) - 64
    for (side, pool), each in rows.items():
        tokens = {"none": 1.0, "drop_norm": 0.5}.get(pool, 0.25) * (side // 16) ** 2
        assert each["image_tokens"] == tokens
        hand = [
            by_hand(int(tokens), (side // 8) ** 2, int(t), pool == "pool_adaptive", model.cfg.lm_vocab_size)
            for t in texts
        ]
        assert each["tflops"] == pytest.approx(sum(hand) / len(hand) / 1e12, rel=1e-9)
    for pool in POOLINGS:
        costs = [rows[side, pool]["tflops"] for side in (128, 96, 64, 32)]
        assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    for side in (128, 96, 64, 32):
        assert all(rows[side, pool]["tflops"] < rows[side, "none"]["tflops"] for pool in POOLINGS if pool != "none")
    chosen = next(each for each in found["rows"] if each["name"] == found["chosen"])
    assert chosen["accuracy"] >= 0.65 and chosen["tflops"] < rows[128, "none"]["tflops"]
    assert not any(r["accuracy"] >= 0.65 and r["tflops"] < chosen["tflops"] for r in found["rows"])
    assert (grid / "front.png").stat().st_size > 1000 and "res" in (grid / "front.svg").read_text()
