"""Smaller tiles of a model that is loaded: positions are interpolated, and everything follows."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from nanovlm import VisionLanguageModel, cli, preset
from nanovlm.measure import flops
from nanovlm.slimming import slim
from nanovlm.vision.siglip import Siglip
from nanovlm.vlm import with_hub_sizes  # noqa: F401  (importable beside it)
from tests.model.helpers import scale, tiny_model

TINY = ("tiny", "tiny_dinov2_smollm", "tiny_dinov3_smollm", "tiny_granite_docling", "tiny_original_small")


@pytest.mark.parametrize("name", TINY)
def test_a_loaded_model_answers_at_another_size(tmp_path, name, picture):
    cfg = preset(name)
    side = 2 * cfg.vit_img_size
    large = cfg.slimmed(resolution=side)
    model = scale(VisionLanguageModel(large, load_backbone=False))
    model.save_pretrained(tmp_path / "large")
    loaded = slim(VisionLanguageModel.from_pretrained(tmp_path / "large"), resolution=cfg.vit_img_size).eval()
    assert loaded.cfg.mp_image_token_length == cfg.mp_image_token_length
    ids, images = loaded.prepare(picture(320, 200), "What?")
    assert images[0].shape[2:] == (cfg.vit_img_size,) * 2
    logits = loaded(ids, images)[0]
    loaded.save_pretrained(tmp_path / "small")
    again = VisionLanguageModel.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(again(ids, images)[0], logits)
    assert loaded.cfg.vit_img_size == json.loads((tmp_path / "small" / "config.json").read_text())["vit_img_size"]


def test_a_picture_keeps_its_number_of_tiles(picture):
    cfg = preset("default")
    for side, tokens in ((384, 36), (256, 16), (192, 9)):
        small = cfg.slimmed(resolution=side)
        assert (small.max_img_size, small.mp_image_token_length) == (2048 * side // 512, tokens)


def test_the_table_of_siglip_is_interpolated_over_its_square():
    model = tiny_model(vit_img_size=128)
    table = model.vision_encoder.patch_embedding.position_embedding.detach().clone()
    slim(model, resolution=64)
    square = table.transpose(1, 2).unflatten(2, (8, 8))
    wanted = F.interpolate(square, size=(4, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.allclose(model.vision_encoder.patch_embedding.position_embedding, wanted, atol=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_table_stays_frozen(trained):
    encoder = Siglip(preset("tiny")).requires_grad_(trained)
    encoder.resize_positions(2)
    table = encoder.patch_embedding.position_embedding
    assert (table.shape[1], table.requires_grad) == (4, trained)


def test_the_table_of_dinov2_stays_and_is_read_at_another_size():
    model = scale(VisionLanguageModel(preset("tiny_dinov2_smollm", vit_position_grid=None), load_backbone=False))
    before, side = model.cfg.vit_grid, model.cfg.vit_img_size
    embedding = model.vision_encoder.patch_embedding
    table = embedding.position_embedding.detach().clone()
    slim(model, resolution=2 * side)
    assert model.cfg.vit_position_grid == before and torch.equal(embedding.position_embedding, table)
    assert embedding.positions(2 * before, 2 * before).shape[1] == 1 + 4 * before**2


def test_weights_that_do_not_depend_on_the_size_stay_the_same_tensors():
    model = tiny_model(vit_img_size=128)
    before = {name: id(p) for name, p in model.named_parameters()}
    slim(model, resolution=64, pool="pool_max")
    after = {name: id(p) for name, p in model.named_parameters()}
    assert {name for name in before if before[name] != after[name]} == {
        "vision_encoder.patch_embedding.position_embedding"
    }
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_is_changed_where_nothing_is_asked():
    model = tiny_model()
    cfg = model.cfg
    assert slim(model) is model and model.cfg is cfg


def test_vision_flops_fall_with_the_patches_and_attention_with_their_square():
    """The document says 44 % for 384: of the patches it is, of a tile's FLOPs it is more."""
    cfg = preset("default")
    rows = {}
    for side in (512, 384):
        small = cfg.slimmed(resolution=side)
        prompt = flops.prompt_of(small, [torch.empty(13, 3, side, side, device="meta")], 20, 1)
        rows[side] = {row.name: row.flops for row in flops.analytic(small, prompt) if row.part == "vision"}
    share = {name: rows[384][name] / rows[512][name] for name in rows[512]}
    assert share["qkv"] == share["MLP"] == 0.5625
    assert share["attention"] == 0.5625**2
    assert 1 - sum(rows[384].values()) / sum(rows[512].values()) == pytest.approx(0.482, abs=5e-4)


@pytest.mark.parametrize("command", ["generate", "flops", "vram", "train", "validate", "evaluate", "slim"])
def test_every_command_takes_the_flags(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--resolution", "--pool", "--pool-factor", "--keep-ratio", "--pool-at"))


def test_generate_and_flops_run_a_checkpoint_smaller(tiny_folder, picture_file, capsys):
    slimmer = ["--resolution", "64", "--pool", "drop_norm", "--keep-ratio", "0.5"]
    asked = ["--image", str(picture_file), "--json"]
    words = ["generate", "--checkpoint", str(tiny_folder), *asked, "--generations", "1", "--max_new_tokens", "2"]
    assert cli.main([*words, *slimmer]) == 0
    small = json.loads(capsys.readouterr().out)
    assert cli.main(words) == 0
    large = json.loads(capsys.readouterr().out)
    assert large["prompt_tokens"] - small["prompt_tokens"] == large["tiles"] * (16 - 2)
    assert cli.main(["flops", "--checkpoint", str(tiny_folder), *asked, *slimmer]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == small["prompt_tokens"]


def test_a_preset_is_trained_pooled_and_goes_on_without_flags(tmp_path, capsys):
    words = ["train", "--train_dataset_path", "synthetic", "--output_dir", str(tmp_path), "--run_name", "pooled"]
    few = ["--max_training_steps", "2", "--batch_size", "2", "--gradient_accumulation_steps", "1", "--num_workers", "0",
           "--validation_batches", "1", "--scored_scenes", "0", "--no_pack"]  # fmt: skip
    slimmer = ["--resolution", "128", "--pool", "pool_adaptive", "--pool-at", "projector"]
    assert cli.main([*words, *few, "--use_preset", "tiny", *slimmer]) == 0
    model = VisionLanguageModel.from_pretrained(tmp_path / "pooled")
    assert (model.cfg.pool, model.cfg.pool_at, model.cfg.vit_img_size) == ("pool_adaptive", "projector", 128)
    assert cli.main([*words, "--resume", "--max_training_steps", "3", "--scored_scenes", "0"]) == 0
    fresh = VisionLanguageModel.from_pretrained(tmp_path / "pooled")
    assert not torch.equal(fresh.MP.pool.attention[2].weight, torch.zeros(64, 16)), "the pooling learns"
    assert cli.main([*words, "--resume", "--max_training_steps", "4", "--pool", "pool_max"]) == 2
    assert "pool='pool_max' is asked of a model with pool='pool_adaptive'" in capsys.readouterr().err
