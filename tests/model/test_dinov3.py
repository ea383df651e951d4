"""DINOv3 against transformers, both ways, and what is its own: rotation by centres, registers, SwiGLU."""

from __future__ import annotations

import pytest
import torch

from nanovlm import VLMConfig, preset
from nanovlm.checkpoint import Checkpoint, write_tensors
from nanovlm.errors import ConfigError, ImageError
from nanovlm.presets import DINOV3
from nanovlm.registry import canonical
from nanovlm.vision.dinov3 import Dinov3, PatchRotary, patch_centres
from nanovlm.weights import load, to_hub
from tests.model.helpers import scale

TOLERANCE = 1e-5
# What the Hub's config.json files say.
BASE = {
    "attention_dropout": 0.0, "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_size": 768,
    "image_size": 224, "initializer_range": 0.02, "intermediate_size": 3072, "key_bias": False,
    "layer_norm_eps": 1e-05,
    "layerscale_value": 1.0, "mlp_bias": True, "model_type": "dinov3_vit", "num_attention_heads": 12,
    "num_channels": 3, "num_hidden_layers": 12, "num_register_tokens": 4, "patch_size": 16,
    "pos_embed_jitter": None, "pos_embed_rescale": 2.0, "pos_embed_shift": None, "proj_bias": True,
    "query_bias": True, "rope_theta": 100.0, "use_gated_mlp": False, "value_bias": True,
}  # fmt: skip
HUB = {
    "vits16plus": {
        **BASE, "hidden_act": "silu", "hidden_size": 384, "intermediate_size": 1536,
        "num_attention_heads": 6, "use_gated_mlp": True,
    },
    "vitb16": BASE,
    "vitl16": {
        **BASE, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
}  # fmt: skip
PARAMETERS = {"vits16plus": 28_692_864, "vitb16": 85_660_416, "vitl16": 303_129_600}  # with the mask token
KEYS = {"vits16plus": 235, "vitb16": 211, "vitl16": 415}
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2,
    "image_size": 64,
}  # fmt: skip
TINY = {"gated": {**HUB["vits16plus"], **SMALL}, "plain": {**BASE, **SMALL}}


def config(hub: dict) -> VLMConfig:
    """A config whose encoder is the one that a Hub config.json describes."""
    fields = Dinov3.hub_fields(hub)
    size = fields["vit_img_size"]
    return preset("tiny_dinov3_smollm").replace(**fields, mp_pixel_shuffle_factor=1, max_img_size=size)


def pair(hub: dict, folder):
    """(transformers' model, ours with its weights, its file)."""
    transformers = pytest.importorskip("transformers")
    theirs = scale(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**hub)))
    theirs.save_pretrained(folder)
    stored = Checkpoint([folder / "model.safetensors"])
    with torch.device("meta"):
        ours = Dinov3(config(hub))
    load(ours, stored, Dinov3.RULES, prefixes=Dinov3.PREFIXES, ignored=Dinov3.IGNORED)
    return theirs, ours.eval(), stored


@torch.no_grad()
def difference(theirs, ours, height: int, width: int, seed: int = 0) -> float:
    """Largest difference of the patches' features for pictures of one size."""
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    torch.manual_seed(seed)
    want = theirs(pixel_values=pixels).last_hidden_state[:, 5:]
    torch.manual_seed(seed)
    got = ours(pixels)
    assert got.shape == want.shape and want.std() > 0.3
    return float((got - want).abs().max())


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request, tmp_path_factory):
    return *pair(TINY[request.param], tmp_path_factory.mktemp("dinov3")), TINY[request.param]


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (48, 160), (160, 16)])
def test_patches_equal_transformers_on_every_grid(tiny, size):
    theirs, ours, _, _ = tiny
    assert difference(theirs, ours, *size) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("size", sorted(HUB))
def test_patches_equal_transformers_at_real_dimensions(tmp_path, size):
    theirs, ours, _ = pair(HUB[size], tmp_path)
    assert difference(theirs, ours, 224, 224) <= TOLERANCE
    assert difference(theirs, ours, 96, 256) <= TOLERANCE


def test_what_we_write_under_the_hubs_names_loads_in_transformers_and_gives_the_same(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, ours, _, hub = tiny
    write_tensors(tmp_path / "model.safetensors", to_hub(ours, Dinov3.RULES), {"format": "pt"})
    transformers.DINOv3ViTConfig(**hub).save_pretrained(tmp_path)
    theirs, told = transformers.DINOv3ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert difference(theirs.eval(), ours, 64, 96) <= TOLERANCE


def test_a_file_goes_through_ours_and_back_unchanged(tiny):
    _, ours, stored, _ = tiny
    written = to_hub(ours, Dinov3.RULES)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == dict(stored.shapes)
    assert all(torch.equal(tensor, stored.read(name)) for name, tensor in written.items())
    assert written["embeddings.mask_token"].any()


@pytest.mark.parametrize("size", sorted(HUB))
def test_keys_and_shapes_are_those_of_the_published_file(size):
    hub = HUB[size]
    D, inner = hub["hidden_size"], hub["intermediate_size"]
    want = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.mask_token": (1, 1, D),
        "embeddings.register_tokens": (1, 4, D),
        "embeddings.patch_embeddings.weight": (D, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
    }
    for layer in (f"layer.{i}." for i in range(hub["num_hidden_layers"])):
        want |= {f"{layer}attention.{x}_proj.weight": (D, D) for x in "qkvo"}
        want |= {f"{layer}attention.{x}_proj.bias": (D,) for x in "qvo"}
        for name in ("norm1", "norm2"):
            want |= {f"{layer}{name}.weight": (D,), f"{layer}{name}.bias": (D,)}
        for name in ("gate", "up") if hub["use_gated_mlp"] else ("up",):
            want |= {f"{layer}mlp.{name}_proj.weight": (inner, D), f"{layer}mlp.{name}_proj.bias": (inner,)}
        want |= {f"{layer}mlp.down_proj.weight": (D, inner), f"{layer}mlp.down_proj.bias": (D,)}
        want |= {f"{layer}layer_scale1.lambda1": (D,), f"{layer}layer_scale2.lambda1": (D,)}
    with torch.device("meta"):
        model = Dinov3(config(hub))
    written = to_hub(model, Dinov3.RULES)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == want
    assert len(want) == KEYS[size] and sum(tensor.numel() for tensor in written.values()) == PARAMETERS[size]


@pytest.mark.parametrize("size", sorted(HUB))
def test_the_presets_numbers_are_those_of_the_hubs_config(size):
    said = Dinov3.hub_fields(HUB[size])
    assert {name: DINOV3[size][name] for name in said} == said


def test_cls_and_registers_are_seen_by_the_patches_and_dropped_on_output(tiny):
    _, ours, _, _ = tiny
    pixels, turn = torch.randn(1, 3, 32, 64), torch.linspace(-1, 1, 32)
    with torch.no_grad():
        before = ours(pixels)
        assert before.shape == (1, 2 * 4, 32)
        for token in (ours.patch_embedding.cls_token, ours.patch_embedding.register_tokens):
            token.add_(turn)
            assert not torch.allclose(before, ours(pixels), atol=1e-4)
            token.sub_(turn)


def test_centres_lie_between_minus_one_and_one_and_mirror_each_other():
    centres = patch_centres(3, 4, torch.device("cpu"))
    assert centres[:4, 0].tolist() == pytest.approx([-2 / 3] * 4)
    assert centres[:4, 1].tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75])
    assert torch.allclose(centres, -centres.flip(0), atol=1e-6)
    assert patch_centres(1, 1, torch.device("cpu")).tolist() == [[0.0, 0.0]]


def test_tokens_before_the_patches_are_not_rotated():
    cfg = config(TINY["plain"])
    cos, sin = PatchRotary(cfg).eval()(2, 3, torch.zeros(1))
    assert cos.shape == sin.shape == (5 + 6, 16)
    assert (cos[:5] == 1).all() and (sin[:5] == 0).all()
    assert not (cos[5:] == 1).all(1).any()


def augmented(**strengths) -> VLMConfig:
    return config({**TINY["plain"], **strengths})


@pytest.mark.parametrize(
    "strengths",
    [
        {"pos_embed_shift": 0.3, "pos_embed_rescale": None},
        {"pos_embed_jitter": 1.5, "pos_embed_rescale": None},
        {"pos_embed_rescale": 2.0},
        {"pos_embed_shift": 0.3, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0},
    ],
    ids=["shift", "jitter", "rescale", "all"],
)
def test_positions_are_augmented_in_training_alone_and_as_transformers_does(strengths, tmp_path):
    theirs, ours, _ = pair({**TINY["plain"], **strengths}, tmp_path)
    pixels = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        still = ours(pixels)
        assert torch.equal(still, ours(pixels))
        theirs.train(), ours.train()
        assert not torch.allclose(ours(pixels), ours(pixels), atol=1e-4)
        assert not torch.allclose(ours(pixels), still, atol=1e-4)
    assert difference(theirs, ours, 48, 64, seed=5) <= TOLERANCE


def test_without_strengths_training_moves_nothing():
    rotary = PatchRotary(augmented(pos_embed_rescale=None)).train()
    assert torch.equal(rotary(3, 3, torch.zeros(1))[0], rotary.eval()(3, 3, torch.zeros(1))[0])


def test_a_shift_moves_all_patches_alike_and_no_farther_than_it_says():
    rotary = PatchRotary(augmented(pos_embed_shift=0.25, pos_embed_rescale=None)).train()
    centres = patch_centres(4, 4, torch.device("cpu"))
    moved = rotary.augmented(centres) - centres
    assert torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-6)
    assert 0 < moved.abs().max() <= 0.25


def test_a_picture_that_is_no_whole_number_of_patches_is_refused(tiny):
    _, ours, _, _ = tiny
    with pytest.raises(ImageError, match="64x70 pixels is no whole number of patches of 16"):
        ours(torch.zeros(1, 3, 64, 70))


OTHERS = [("key_bias", True), ("hidden_act", "silu"), ("num_channels", 1)]


@pytest.mark.parametrize(("field", "value"), OTHERS)
def test_a_variant_that_is_not_built_here_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value!r}"):
        Dinov3.hub_fields({**BASE, field: value})


def test_heads_that_cannot_turn_by_rows_and_columns_are_refused():
    with pytest.raises(ConfigError, match="heads of 6.*multiple of 4"):
        Dinov3(preset("tiny_dinov3_smollm", vit_hidden_dim=24, vit_n_heads=4))


def test_the_large_model_of_the_documents_is_the_published_one_and_says_so():
    with pytest.warns(UserWarning, match="no vitl14.*using vitl16"):
        assert canonical("vitl14") == "vitl16"
    with pytest.warns(UserWarning, match="vitl16"):
        cfg = preset("tiny_dinov3_smollm").replace(vit_model_type="facebook/dinov3-vitl14-pretrain-lvd1689m")
    assert cfg.vit_model_type == "facebook/dinov3-vitl16-pretrain-lvd1689m"
