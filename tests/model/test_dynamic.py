"""Pictures in their own shape: processor, prompt, mixed sizes in one batch; encoders mixed with decoders."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm import VisionLanguageModel, VLMConfig, get_image_processor, get_tokenizer, preset
from nanovlm.cli import main, parser
from nanovlm.commands import config_of
from nanovlm.errors import ConfigError, ImageError, ImageTokenMismatch, SourceNotFound, UnknownBackbone
from nanovlm.images import Dynamic
from nanovlm.presets import DINOV2, DINOV3, LANGUAGE, PRESETS, VISION, mix
from nanovlm.projector import pixel_shuffle
from nanovlm.prompts import image_string
from nanovlm.vlm import with_hub_sizes
from tests.model.helpers import pad, scale

TOLERANCE = 1e-5
WIDEST = {"tiny_dinov2_smollm": 168, "tiny_dinov3_smollm": 256, "tiny_dinov3_gemma": 256}


def picture(width: int, height: int) -> Image.Image:
    """A picture whose every part differs."""
    ramp = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.FLIP_TOP_BOTTOM), ramp.rotate(180)))


def tokens_of(cfg: VLMConfig, grid: tuple[int, int]) -> int:
    """Image tokens in the text for a picture."""
    tokenizer = get_tokenizer("byte", cfg.vlm_extra_tokens)
    return image_string(tokenizer, [grid], cfg.tokens_per_cell).count(tokenizer.image_token)


@pytest.fixture(scope="module", params=sorted(WIDEST))
def model(request) -> VisionLanguageModel:
    """A dynamic model whose logits are of order 1."""
    cfg = preset(request.param, max_img_size=WIDEST[request.param])
    return scale(VisionLanguageModel(cfg, load_backbone=False))


def row(
    model: VisionLanguageModel, text: int, *sizes: tuple[int, int], seed: int = 0
) -> tuple[list[int], list[torch.Tensor]]:
    """(ids, pixel values) of a row with pictures of (rows, columns) tokens, and ``text`` random bytes."""
    cfg = model.cfg
    generator = torch.Generator().manual_seed(seed)
    side = cfg.token_side
    pixels = [torch.randn(1, 3, rows * side, cols * side, generator=generator) for rows, cols in sizes]
    words = torch.randint(3, 259, (text,), generator=generator).tolist()
    return [cfg.image_token_id] * sum(rows * cols for rows, cols in sizes) + words, pixels


ROWS = [(9, (1, 4)), (4, (3, 2), (1, 1)), (12,), (6, (4, 1))]


# -- processor and prompt ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "patches", "tokens"),
    [
        (1024, 768, (48, 64), 768),
        (960, 960, (60, 60), 900),
        (224, 224, (14, 14), 49),
        (2048, 1024, (32, 64), 512),
    ],
)
def test_a_picture_has_the_tokens_that_its_shape_asks_for(width, height, patches, tokens):
    cfg = preset("dinov3_smollm", max_img_size=1024)
    pixels, grid = get_image_processor(cfg)(picture(width, height))
    assert pixels.shape == (1, 3, 16 * patches[0], 16 * patches[1])
    assert grid == (patches[0] // 2, patches[1] // 2)
    assert tokens_of(cfg, grid) == tokens


def test_without_a_larger_bound_every_picture_is_one_square_of_49_tokens():
    cfg = preset("dinov3_gemma")
    assert not cfg.dynamic
    pixels, grid = get_image_processor(cfg)(picture(1024, 300))
    assert pixels.shape == (1, 3, 224, 224) and grid == (1, 1)
    assert tokens_of(cfg, grid) == 49


@given(
    width=st.integers(1, 4000), height=st.integers(1, 4000), most=st.integers(32, 1100), fill=st.booleans()
)
@settings(deadline=None)
def test_sides_are_whole_tokens_within_the_bound_and_keep_the_aspect(width, height, most, fill):
    side = 32
    new = Dynamic(side, most, fill).resized_size(width, height)
    assert all(length % side == 0 and side <= length <= most for length in new)
    assert (new[0] >= new[1]) == (width >= height) or new[0] == new[1]
    scale_of_long = max(new) / max(width, height)
    assert abs(min(new) - max(side, min(width, height) * scale_of_long)) <= side / 2 + 1e-6
    if fill:
        assert max(new) == most // side * side
    elif max(width, height) <= most - most % side:
        assert abs(max(new) - max(side, max(width, height))) <= side / 2


@pytest.mark.parametrize("name", sorted(WIDEST))
def test_pixels_are_normalised_as_the_encoder_was_trained(name):
    processor = get_image_processor(preset(name))
    for shade in (0, 255):
        pixels, _ = processor(Image.new("RGB", (50, 30), (shade,) * 3))
        want = (torch.tensor(shade / 255) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225]
        )
        assert torch.allclose(pixels, want[:, None, None].expand_as(pixels), atol=1e-5)


def test_the_text_has_as_many_image_tokens_as_the_pictures_have_features(model):
    ids, pixels = model.prepare([picture(300, 100), picture(90, 200)], "Which is wider?")
    assert pixels[0].shape != pixels[1].shape
    features = model.encode_images([stack[0] for stack in pixels])
    assert int((ids == model.cfg.image_token_id).sum()) == sum(map(len, features))
    assert isinstance(model.answer([picture(300, 100), picture(90, 200)], "Which?", max_new_tokens=3), str)


# -- mixed sizes in one batch --------------------------------------------------------------------------------


@torch.no_grad()
def test_features_of_mixed_sizes_are_those_of_each_picture_alone_in_order(model):
    _, pixels = row(model, 1, (1, 4), (2, 3), (1, 4), (3, 2))
    pictures = [stack[0] for stack in pixels]
    mixed = model.encode_images(pictures)
    for picture_, features in zip(pictures, mixed, strict=True):
        alone = model.encode_images(picture_[None])[0]
        assert features.shape == (picture_.shape[1] * picture_.shape[2] // model.cfg.token_side**2, 64)
        assert (features - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_of_mixed_sizes_gives_each_row_what_it_has_alone(model, side):
    rows = [row(model, *spec, seed=number) for number, spec in enumerate(ROWS)]
    ids, mask = pad([ids for ids, _ in rows], side)
    together, _ = model(ids, [pixels for _, pixels in rows], mask)
    size = together.std()  # the tolerance is for outputs of order 1
    for number, (own, pixels) in enumerate(rows):
        alone, _ = model(torch.tensor([own]), [pixels])
        assert (together[number][mask[number].bool()] - alone[0]).abs().max() <= TOLERANCE * size


def test_a_batch_of_mixed_sizes_generates_what_its_rows_generate(model):
    rows = [row(model, *spec, seed=number) for number, spec in enumerate(ROWS)]
    ids, mask = pad([ids for ids, _ in rows])
    together = model.generate(ids, [pixels for _, pixels in rows], mask, max_new_tokens=4, greedy=True)
    for number, (own, pixels) in enumerate(rows):
        alone = model.generate(torch.tensor([own]), pixels or None, max_new_tokens=4, greedy=True)
        assert together[number, : alone.shape[1]].tolist() == alone[0].tolist()


def test_a_flat_list_of_pictures_is_taken_in_reading_order(model):
    ids, pixels = row(model, 5, (1, 4), (2, 2))
    with torch.no_grad():
        nested, _ = model(torch.tensor([ids]), [pixels])
        flat, _ = model(torch.tensor([ids]), [stack[0] for stack in pixels])
    assert torch.equal(nested, flat)


def test_the_loss_of_mixed_sizes_reaches_every_parameter(model):
    rows = [row(model, *spec, seed=number) for number, spec in enumerate(ROWS)]
    ids, mask = pad([ids for ids, _ in rows])
    targets = torch.where((mask == 1) & (ids != model.cfg.image_token_id), ids, -100)
    model.zero_grad()
    _, loss = model(ids, [pixels for _, pixels in rows], mask, targets)
    loss.backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not idle


def test_a_dynamic_model_is_itself_after_saving_and_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.from_pretrained(tmp_path).eval()
    assert loaded.cfg == model.cfg and loaded.cfg.dynamic
    ids, pixels = row(model, 5, (2, 3))
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([ids]), pixels)[0], model(torch.tensor([ids]), pixels)[0])


def test_tokens_and_features_of_a_row_must_agree(model):
    ids, pixels = row(model, 5, (2, 3))
    with pytest.raises(ImageTokenMismatch, match="row 0 has 5 image tokens, its 1 tiles make 6 features"):
        model(torch.tensor([ids[1:]]), [pixels])


def test_a_picture_that_the_model_cannot_see_is_refused_with_both_sizes(model):
    cfg = model.cfg
    side, most = cfg.token_side, cfg.max_img_size
    for height, width in ((side, side + 1), (side, most + side), (0, side)):
        with pytest.raises(
            ImageError, match=f"{height}x{width} pixels.*multiples of {side}, at most max_img_size={most}"
        ):
            model(torch.tensor([[cfg.image_token_id, 5]]), torch.zeros(1, 3, height, width))


def test_a_model_of_one_square_refuses_other_sizes():
    model = VisionLanguageModel(preset("tiny_dinov3_smollm"), load_backbone=False)
    with pytest.raises(ImageError, match=r"\(1, 3, 64, 96\), vit_img_size=64"):
        model(torch.tensor([[model.cfg.image_token_id] * 6 + [5]]), torch.zeros(1, 3, 64, 96))


def test_a_prompt_of_more_image_tokens_than_positions_names_both_numbers():
    cfg = preset("tiny_dinov3_smollm", max_img_size=256, lm_max_position_embeddings=60)
    model = VisionLanguageModel(cfg, load_backbone=False)
    ids, pixels = row(model, 5, (8, 8))
    with pytest.raises(ValueError, match="69 positions.*lm_max_position_embeddings=60"):
        model(torch.tensor([ids]), pixels)


# -- pixel shuffle of rectangles -----------------------------------------------------------------------------


@given(rows=st.integers(1, 5), cols=st.integers(1, 5), factor=st.integers(1, 3))
@settings(deadline=None)
def test_pixel_shuffle_of_a_rectangle_is_a_bijection_that_keeps_neighbours_together(rows, cols, factor):
    grid = (rows * factor, cols * factor)
    numbers = torch.arange(grid[0] * grid[1] * 2).view(1, -1, 2)
    shuffled = pixel_shuffle(numbers, factor, grid)
    assert shuffled.shape == (1, rows * cols, 2 * factor**2)
    assert sorted(shuffled.flatten().tolist()) == numbers.flatten().tolist()
    map_ = numbers.view(*grid, 2)
    for token in range(rows * cols):
        top, left = token // cols * factor, token % cols * factor
        want = map_[top : top + factor, left : left + factor].flatten().tolist()
        assert shuffled[0, token].tolist() == want


def test_pixel_shuffle_refuses_a_grid_that_does_not_fit():
    with pytest.raises(ValueError, match="12 patches do not form a grid of 3x4 whose sides 2 divides"):
        pixel_shuffle(torch.zeros(1, 12, 2), 2, (3, 4))
    with pytest.raises(ValueError, match="12 patches do not form a grid of 4x4"):
        pixel_shuffle(torch.zeros(1, 12, 2), 2, (4, 4))


# -- configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "tiny_original_small",
            {"max_img_size": 128},
            "max_img_size=128.*image_token and vision_encoder dinov2 or dinov3",
        ),
        ("tiny_dinov3_smollm", {"vit_cls_flag": False}, "vit_cls_flag=False, but 'dinov3' has a CLS token"),
        ("tiny", {"vit_cls_flag": True}, "vit_cls_flag=True, but 'siglip' has no CLS token"),
        ("tiny", {"vit_n_registers": 4}, "vit_n_registers=4.*'dinov3'"),
        ("tiny_dinov3_smollm", {"vit_position_grid": 5}, "vit_position_grid=5.*'dinov2'"),
        (
            "tiny_dinov3_smollm",
            {"vit_rope_rescale": 0.5},
            "vit_rope_rescale=0.5: expected a number from 1 up",
        ),
        ("tiny_dinov3_smollm", {"vit_rope_shift": -1.0}, "vit_rope_shift=-1.0: expected a number from 0 up"),
        ("tiny_dinov3_smollm", {"vit_n_registers": 10**6}, "vit_n_registers=1000000: expected 0 to 1024"),
        ("tiny_dinov3_smollm", {"image_std": (1.0, 0.0, 1.0)}, "image_std"),
    ],
)
def test_a_contradiction_is_refused_with_its_values(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        preset(name, **changes)


@pytest.mark.parametrize("name", [name for name in PRESETS if "dino" in name])
def test_a_dino_config_goes_through_json_unchanged(name):
    for cfg in (preset(name), preset(name, max_img_size=1024)):
        again, ignored = VLMConfig.from_json_dict(json.loads(json.dumps(cfg.to_json_dict())))
        assert again == cfg and not ignored


@pytest.mark.parametrize("language", sorted(LANGUAGE))
@pytest.mark.parametrize("vision", sorted(VISION))
def test_every_encoder_goes_with_every_language_model(vision, language):
    cfg = mix(vision, language)
    assert (cfg.vision_encoder, cfg.language_model) == (vision, language)
    with torch.device("meta"):
        model = VisionLanguageModel(cfg, load_backbone=False)
    assert model.MP.proj.weight.shape == (
        cfg.lm_hidden_dim,
        cfg.vit_hidden_dim * cfg.mp_pixel_shuffle_factor**2,
    )


def test_named_presets_are_mixes():
    assert mix() == preset("default")
    assert mix("dinov3", "gemma") == preset("dinov3_gemma")
    assert mix("dinov2", "llama") == preset("dinov2_smollm")


@pytest.mark.parametrize("size", sorted(DINOV3))
def test_the_size_of_dinov3_is_chosen_by_name(size):
    assert mix("dinov3", dinov3_model=size).vit_model_type == DINOV3[size]["vit_model_type"]


def test_the_large_dinov3_of_the_documents_is_taken_with_a_warning():
    with pytest.warns(UserWarning, match="no vitl14.*vitl16"):
        assert mix("dinov3", dinov3_model="vitl14") == mix("dinov3", dinov3_model="vitl16")


def test_a_mix_of_unknown_parts_is_told_which_exist():
    with pytest.raises(UnknownBackbone, match="vision_encoder 'clip'.*siglip, dinov2, dinov3"):
        mix("clip")
    with pytest.raises(UnknownBackbone, match="dinov3_model 'huge'.*vits16plus, vitb16, vitl16"):
        mix("dinov3", dinov3_model="huge")
    with pytest.raises(
        ConfigError, match="dinov3_model='vitb16' goes with vision_encoder='dinov3', not 'siglip'"
    ):
        mix(dinov3_model="vitb16")


def test_sizes_are_read_from_the_backbones_own_config(tmp_path):
    base = {
        "hidden_size": 768, "num_attention_heads": 12, "image_size": 518, "patch_size": 14, "mlp_ratio": 4,
        "num_hidden_layers": 12, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(base))
    cfg = with_hub_sizes(mix("dinov2", vit_model_type=str(tmp_path)), "vit_model_type")
    assert cfg == preset("dinov2_smollm", **{**DINOV2["base"], "vit_model_type": str(tmp_path)})
    with pytest.raises(SourceNotFound, match="absent"):
        with_hub_sizes(mix("dinov2", vit_model_type=str(tmp_path / "absent")), "vit_model_type")


# -- command line --------------------------------------------------------------------------------------------


def asked(*options: str) -> VLMConfig | None:
    return config_of(parser().parse_args(["generate", *options]))


def test_the_command_line_mixes_and_lets_pictures_keep_their_shape(tmp_path):
    assert asked(
        "--vision_encoder", "dinov3", "--dinov3_model", "vitb16", "--language_model", "gemma"
    ) == mix("dinov3", "gemma", "vitb16")
    assert asked("--use_preset", "dinov3_gemma", "--max_img_size", "1024").dynamic
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": 768, "num_attention_heads": 12, "image_size": 518})
    )
    cfg = asked("--vision_encoder", "dinov2", "--vit_model_type", str(tmp_path))
    assert (cfg.vit_hidden_dim, cfg.vit_position_grid) == (768, 37)
    assert asked("--checkpoint", "somewhere") is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "which model?"),
        (["--use_preset", "tiny", "--vision_encoder", "dinov3"], "--vision_encoder puts a model together"),
        (["--checkpoint", ".", "--language_model", "gemma"], "which model?"),
        (["--checkpoint", ".", "--max_img_size", "64"], "--max_img_size changes a preset"),
        (["--vision_encoder", "siglip", "--dinov3_model", "vitb16"], "goes with vision_encoder='dinov3'"),
    ],
)
def test_options_that_do_not_go_together_are_one_line_and_exit_code_2(options, complaint, capsys):
    assert main(["generate", *options]) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1


def test_the_command_answers_about_pictures_of_two_shapes(tmp_path, capsys):
    for name, size in (("wide.png", (300, 90)), ("tall.png", (60, 200))):
        picture(*size).save(tmp_path / name)
    options = ["--use_preset", "tiny_dinov3_smollm", "--max_img_size", "256", "--generations", "1", "--json"]
    pictures = [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    assert main(["generate", *options, "--max_new_tokens", "2", "--image", *pictures]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tiles"] == 2 and len(facts["generations"]) == 1
    assert facts["prompt_tokens"] > 8 * 2 + 2 * 6  # 8x2 and 2x6 squares of 32 pixels, and the words
