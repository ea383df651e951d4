"""Fewer image tokens: what each method computes, how many are left, and that everything follows."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nanovlm import VisionLanguageModel, VLMConfig, cli, preset
from nanovlm.checks import POOL_AT
from nanovlm.errors import ConfigError
from nanovlm.granite_docling import save_for_transformers
from nanovlm.images import get_image_processor
from nanovlm.measure import flops
from nanovlm.pooling import NormBasedTokenDropping, TokenPooling
from nanovlm.slimming import VLMWithTokenPooling, slim
from tests.model.helpers import scale, tiny_model

METHODS = ("pool_avg", "pool_max", "pool_adaptive")
# (method, place) -> options; every way there is
WAYS = [
    *(pytest.param({"pool": pool, "pool_at": at}, id=f"{pool}-{at}") for at in POOL_AT for pool in METHODS),
    *(pytest.param({"pool": "drop_norm", "keep_ratio": 0.25, "pool_at": at}, id=f"drop_norm-{at}") for at in POOL_AT),
]  # fmt: skip


def question(model, picture):
    return model.prepare(picture(200, 120), "What is this?")


def test_average_and_maximum_are_of_each_square():
    x = torch.randn(2, 6 * 4, 5)
    as_picture = x.transpose(1, 2).reshape(2, 5, 6, 4)
    for method, reference in (("pool_avg", torch.nn.AvgPool2d), ("pool_max", torch.nn.MaxPool2d)):
        wanted = reference(2)(as_picture).flatten(2).transpose(1, 2)
        assert torch.allclose(TokenPooling(method, 2, 5)(x, (6, 4)), wanted, atol=1e-6)


def test_the_adaptive_one_has_295872_parameters_at_width_768_and_starts_as_the_average():
    adaptive = TokenPooling("pool_adaptive", 2, 768)
    assert sum(p.numel() for p in adaptive.parameters()) == 295_872
    x = torch.randn(1, 16, 768)
    assert torch.allclose(adaptive(x, (4, 4)), TokenPooling("pool_avg", 2, 768)(x, (4, 4)), atol=1e-6)
    torch.nn.init.normal_(adaptive.attention[2].weight)
    y = adaptive(x, (4, 4))
    square = x[0, [0, 1, 4, 5]]
    weights = adaptive.attention(square).softmax(0)
    assert torch.allclose(y[0, 0], (weights * square).sum(0), atol=1e-5)
    assert not torch.allclose(y, TokenPooling("pool_avg", 2, 768)(x, (4, 4)), atol=1e-2)


def test_dropping_keeps_the_largest_norms_in_reading_order():
    x = torch.arange(1.0, 9).view(1, 8, 1) * torch.tensor([1, -1, 1, -1, 1, -1, 1, -1]).view(1, 8, 1)
    kept = NormBasedTokenDropping(0.5)(x[:, [7, 0, 6, 1, 5, 2, 4, 3]])
    assert kept.flatten().tolist() == [-8, 7, -6, 5]
    assert NormBasedTokenDropping(0.01)(x).shape == (1, 1, 1)


def test_the_published_size_goes_from_1024_to_256_in_front_of_the_projector_and_64_to_16_behind_it():
    with torch.device("meta"):
        model = VisionLanguageModel(preset("default", lm_n_blocks=1, vit_n_blocks=1), load_backbone=False)
        x = torch.empty(2, 1024, 768)
        for options in ({"pool": "pool_avg"}, {"pool": "drop_norm", "keep_ratio": 0.25}):
            seen = []
            for at in ("vision", "projector"):
                cfg = model.cfg.slimmed(**options, pool_at=at)
                projector = VisionLanguageModel(cfg, load_backbone=False).MP
                def note(module, given, seen=seen):
                    seen.append(given[0].shape[1])

                handle = projector.proj.register_forward_pre_hook(note)
                assert projector(x).shape == (2, 16, 960)
                assert cfg.mp_image_token_length == 16
                handle.remove()
            assert seen == [16, 64], "16 wide tokens are 256 patches; 64 are all 1024"


def test_dropping_in_front_of_the_projector_keeps_whole_squares_of_patches():
    model = tiny_model(vit_img_size=128, pool="drop_norm", keep_ratio=0.25)
    x = torch.zeros(1, 64, 32)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x[0, (2 + row) * 8 + 4 + column] = torch.randn(32)  # the square of tokens (1, 2)
    alone = slim(tiny_model(vit_img_size=128), pool="drop_norm", keep_ratio=1.0).MP(x)
    kept = model.MP(x)
    assert kept.shape[1] == 4 and (kept == alone[:, 6:7]).all(2).any(), "the square with a norm is among the kept"


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("generation", ["main", "v0.1", "v0.2"])
def test_prompt_and_splice_follow_and_a_checkpoint_needs_no_flags(tmp_path, picture, options, generation):
    model = tiny_model(generation, **{} if generation == "main" else {"vit_img_size": 128, "max_img_size": 128})
    model = slim(model, resolution=128, **options)
    assert model.cfg.mp_image_token_length == 4
    ids, images = question(model, picture)
    logits, _ = model(ids, images)
    assert model.encode_images(images[0]).shape[1] == 4
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {name: stored.get(name, VLMConfig.__dataclass_fields__[name].default) for name in options} == options
    again = VisionLanguageModel.from_pretrained(tmp_path).eval()
    assert again.cfg == model.cfg
    assert torch.equal(again(*question(again, picture))[0], logits)
    assert len(model.generate(ids, images, max_new_tokens=2, greedy=True)[0]) >= 1


def test_an_unpooled_config_json_says_nothing_of_pooling(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert not {"pool", "pool_factor", "keep_ratio", "pool_at"} & set(
        json.loads((tmp_path / "config.json").read_text())
    )


@pytest.mark.parametrize("options", WAYS)
def test_every_parameter_learns(picture, options):
    model = slim(tiny_model(vit_img_size=128), **options).train()
    if options["pool"] == "pool_adaptive":
        scale(model.MP.pool)  # a last layer of zeros gives the first no gradient
    ids, images = question(model, picture)
    model(ids, images, targets=torch.where(ids == model.cfg.image_token_id, -100, ids))[1].backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not unused


@pytest.mark.parametrize("preset_name", ["tiny_dinov2_smollm", "tiny_dinov3_smollm"])
@pytest.mark.parametrize("options", WAYS)
def test_dynamic_pictures_follow(picture, preset_name, options):
    cfg = preset(preset_name)
    cfg = preset(preset_name, vit_img_size=8 * cfg.vit_patch_size, max_img_size=24 * cfg.vit_patch_size)
    del_global = {"image_token": cfg.vlm_extra_tokens["image_token"]}
    cfg = cfg.replace(vlm_extra_tokens=del_global, extra_token_amount=1)
    model = scale(VisionLanguageModel(cfg.slimmed(**options), load_backbone=False))
    assert model.cfg.dynamic
    for size in ((300, 130), (90, 320), (40, 40)):
        ids, images = model.prepare(picture(*size), "What?")
        (height, width) = images[0].shape[2:]
        cells = (height // cfg.token_side) * (width // cfg.token_side)
        share = 0.25 if options["pool"] == "drop_norm" else 1 / 4
        assert model.encode_images(images[0]).shape[1] == max(1, round(cells * share))
        assert model(ids, images)[0].shape[1] == ids.shape[1]
    process = get_image_processor(model.cfg)
    assert process(picture(300, 130))[1] == process.grid(300, 130)


@pytest.mark.parametrize("options", WAYS)
def test_flops_by_hand_are_those_that_are_dispatched(options):
    cfg = preset("tiny", vit_img_size=128).slimmed(**options)
    prompt = flops.prompt_of(cfg, [torch.empty(3, 3, 128, 128)], 20, 2)
    assert prompt.positions == 20 + 3 * 4
    rows, counted = flops.analytic(cfg, prompt), flops.counted(flops.meta_model(cfg), prompt)
    for part in flops.PARTS:
        assert flops.by_class(rows, part) == counted[part], part


def test_the_class_of_the_document_pools_what_it_loads(tiny_folder, picture):
    plain = VisionLanguageModel.from_pretrained(tiny_folder).eval()
    pooled = VLMWithTokenPooling.from_pretrained(tiny_folder, pool_method="pool_avg", pool_factor=2).eval()
    x = torch.rand(2, 3, 128, 128)
    wanted = TokenPooling("pool_avg", 2, 32)(plain.vision_encoder(x), (8, 8))
    assert torch.allclose(pooled.encode_images(x), plain.MP(wanted), atol=1e-6)
    assert isinstance(pooled, VisionLanguageModel) and pooled.cfg.mp_image_token_length == 4
    halved = VLMWithTokenPooling.from_pretrained(tiny_folder, pool_method="drop_norm", keep_ratio=0.5)
    assert halved.cfg.mp_image_token_length == 8
    assert pooled.answer(picture(), "What?", max_new_tokens=2) is not None


def test_a_pooled_model_is_not_written_as_one_that_transformers_could_not_pool(tmp_path):
    model = VisionLanguageModel(preset("tiny_granite_docling").slimmed(pool="pool_avg"), load_backbone=False)
    with pytest.raises(ConfigError, match="pool='pool_avg': transformers' Idefics3 has pool='none' alone"):
        save_for_transformers(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pooled_checkpoint_is_not_pooled_otherwise(tmp_path):
    slim(tiny_model(vit_img_size=128), pool="pool_avg").save_pretrained(tmp_path)
    assert slim(VisionLanguageModel.from_pretrained(tmp_path), pool="pool_avg", pool_factor=2).cfg.pool == "pool_avg"
    for options, told in (
        ({"pool_method": "pool_max"}, "pool='pool_max' .* pool='pool_avg'"),
        ({"pool_factor": 4}, "pool_factor=4 .* pool_factor=2"),
        ({"pool_method": "none"}, "pool='none' .* pool='pool_avg'"),
    ):
        with pytest.raises(ConfigError, match=told):
            VLMWithTokenPooling.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pool": "pool_avg", "pool_factor": 3}, "pool_factor=3 does not divide the 8x8 .* these do: 2, 4, 8. .* 576"),
        ({"pool": "pool_avg", "pool_factor": 1}, "pool_factor=1"),
        ({"pool": "drop_norm", "keep_ratio": 0.0}, "keep_ratio=0.0: .* above 0, up to 1"),
        ({"pool": "drop_norm", "keep_ratio": 1.01}, "keep_ratio=1.01"),
        ({"pool": "drop_norm", "keep_ratio": math.nan}, "keep_ratio=nan"),
        ({"pool": "average"}, "pool='average': expected none, pool_avg, pool_max, pool_adaptive, drop_norm"),
        ({"pool": "pool_avg", "pool_at": "front"}, "pool_at='front': expected vision, projector"),
        ({"pool_factor": 4}, "pool_factor=4 is read by pool='pool_avg' or .* leave it at 2"),
        ({"pool": "pool_max", "keep_ratio": 0.3}, "keep_ratio=0.3 is read by pool='drop_norm' alone"),
        ({"resolution": 400}, "resolution=400 is no multiple of 64, .* 384 and 448"),
        ({"resolution": 192, "pool": "pool_avg"}, "resolution=192 is no multiple of 128, .* 128 and 256"),
        ({"resolution": 0}, "resolution=0"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(options, told):
    with pytest.raises(ConfigError, match=told):
        preset("default").slimmed(**options)


def test_bad_flags_end_a_command_with_a_sentence(tiny_folder, capsys):
    words = [
        "evaluate",
        "--model",
        str(tiny_folder),
        "--tasks",
        "synthetic",
        "--pool",
        "pool_avg",
        "--pool-factor",
        "3",
    ]
    assert cli.main(words) == 2
    assert "pool_factor=3 does not divide the 4x4 image tokens" in capsys.readouterr().err
