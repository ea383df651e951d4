"""FLOPs: what the config says is what is dispatched, operator class by operator class."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from nanovlm import cli, preset
from nanovlm.errors import ConfigError, PromptTooLong
from nanovlm.generate import generate
from nanovlm.images import get_image_processor
from nanovlm.measure import flops
from nanovlm.presets import PRESETS
from nanovlm.vlm import VisionLanguageModel

TINY = [name for name in PRESETS if name.startswith("tiny")]


def pictures(cfg, count, side=None):
    return [torch.empty(count, 3, side or cfg.vit_img_size, side or cfg.vit_img_size)]


@pytest.mark.parametrize("name", TINY)
def test_every_part_of_every_preset_is_counted_as_it_is_computed(name):
    cfg = preset(name)
    prompt = flops.prompt_of(cfg, pictures(cfg, 3), 20, 3)
    rows, counted = flops.analytic(cfg, prompt), flops.counted(flops.meta_model(cfg), prompt)
    for part in flops.PARTS:
        assert flops.by_class(rows, part) == counted[part], part
    assert all(sum(counted[part].values()) > 0 for part in flops.PARTS)


@pytest.mark.parametrize("name", ["default", "original_small", "dinov2_smollm", "dinov3_gemma", "granite_docling"])
def test_real_sizes_agree_too(name):
    cfg = preset(name)
    prompt = flops.prompt_of(cfg, pictures(cfg, 2), 30, 2)
    counted = flops.counted(flops.meta_model(cfg), prompt)
    assert [flops.by_class(flops.analytic(cfg, prompt), part) for part in flops.PARTS] == list(counted.values())


@pytest.mark.parametrize("name", ["tiny", "tiny_original_small", "tiny_siglip2_gemma", "tiny_dinov3_smollm"])
def test_a_generation_on_real_tensors_costs_what_was_counted_cold_and_warm(name):
    cfg = preset(name)
    model = VisionLanguageModel(cfg, load_backbone=False).eval()
    images = [torch.rand(2, 3, cfg.vit_img_size, cfg.vit_img_size)]
    slots = [] if cfg.image_token_id is None else [cfg.image_token_id] * 2 * cfg.mp_image_token_length
    ids = torch.tensor([slots + [5] * 9])
    prompt = flops.prompt_of(cfg, images, 9, 3)

    def run():
        assert generate(model, ids, images, None, 3, eos_token_id=None, greedy=True).shape == (1, 3)

    without, warm = flops.dispatched(run), flops.dispatched(run)
    assert without == warm == flops.by_class(flops.analytic(cfg, prompt))


def test_a_dynamic_picture_counts_its_own_patches():
    cfg = preset("tiny_dinov3_smollm", max_img_size=128)
    prompt = flops.prompt_of(cfg, [torch.empty(1, 3, 64, 128)], 5, 1)
    assert prompt.positions == 5 + 2 * 4
    vision = flops.counted(flops.meta_model(cfg), prompt)["vision"]
    assert vision == flops.by_class(flops.analytic(cfg, prompt), "vision")


def test_the_published_figures_of_the_460m_model_come_out_to_the_digit(tmp_path, capsys):
    Image.new("RGB", (800, 600)).save(tmp_path / "photo.png")
    line = ["flops", "--image", str(tmp_path / "photo.png"), "--text_tokens", "20", "--json"]
    assert cli.main([*line, "--output", str(tmp_path / "flops.json")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["grids"], facts["tiles"]) == ([[3, 4]], 13)
    assert facts["vit_manual"] / 1e12 == 2.565706088448
    assert facts["vit_counter"] / 1e12 == 2.27700375552
    assert all(analytic == counted for analytic, counted in facts["by_class"].values())
    assert facts["generation_with_warmup"] == facts["generation_without_warmup"] == facts["total"]
    assert json.loads((tmp_path / "flops.json").read_text()) == facts


def test_a_tile_of_384_pixels_saves_48_percent_and_a_large_picture_16_because_it_makes_more_tiles():
    whole, small = preset("default"), preset("default", vit_img_size=384, max_img_size=1920)

    def vision(cfg):
        (rows, columns) = get_image_processor(cfg).grid(800, 600)
        one = flops.prompt_of(cfg, pictures(cfg, 1), 1, 1)
        return rows * columns + 1, sum(flops.by_class(flops.analytic(cfg, one), "vision").values())

    (tiles, tile), (more, smaller) = vision(whole), vision(small)
    assert (tiles, more) == (13, 21)
    assert round(100 * (1 - smaller / tile), 1) == 48.2
    assert round(100 * (1 - more * smaller / (tiles * tile)), 1) == 16.3


@pytest.mark.parametrize(("text", "new"), [(0, 3), (5, 0)])
def test_nothing_to_count_is_a_mistake(text, new):
    with pytest.raises(ConfigError, match="at least 1"):
        flops.prompt_of(preset("tiny"), [], text, new)


def test_more_positions_than_the_model_has_are_a_mistake():
    with pytest.raises(PromptTooLong, match="1024"):
        flops.prompt_of(preset("tiny"), [], 1022, 3)


def test_the_question_may_stand_in_a_file(tmp_path, capsys, picture_file):
    (tmp_path / "question.txt").write_text("What is the name of the dog's toy?\n")
    found = []
    for question in (tmp_path / "question.txt", "What is the name of the dog's toy?", "What?"):
        cli.main(["flops", "--use_preset", "tiny", "--image", str(picture_file), "--question", str(question), "--json"])
        found.append(json.loads(capsys.readouterr().out)["text_tokens"])
    assert found[0] == found[1] > found[2]


def test_the_tables_show_every_part(capsys, picture_file):
    assert cli.main(["flops", "--use_preset", "tiny", "--image", str(picture_file)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("patch embedding", "projector", "prefill", "decode", "head", "vit_manual"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "/nowhere"], "no such folder"),
        (["--use_preset", "tiny", "--output", "/nowhere/x.json"], "cannot be written"),
        (["--use_preset", "tiny", "--text_tokens", "0"], "at least 1"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, capsys, picture_file):
    assert cli.main(["flops", "--image", str(picture_file), *arguments]) == 2
    assert message in capsys.readouterr().err
