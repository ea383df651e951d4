"""DINOv2 against transformers, both ways, and what is its own: an interpolated table, LayerScale, CLS."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanovlm import VLMConfig, preset
from nanovlm.checkpoint import Checkpoint, write_tensors
from nanovlm.errors import ConfigError, ImageError
from nanovlm.presets import DINOV2
from nanovlm.vision.dinov2 import Dinov2
from nanovlm.weights import load, to_hub
from tests.model.helpers import scale

TOLERANCE = 1e-5
# What the Hub's config.json files say.
SMALL = {
    "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0, "hidden_size": 384, "image_size": 518, "initializer_range": 0.02,
    "layer_norm_eps": 1e-06, "layerscale_value": 1.0, "mlp_ratio": 4, "model_type": "dinov2",
    "num_attention_heads": 6, "num_channels": 3, "num_hidden_layers": 12, "patch_size": 14,
    "qkv_bias": True, "use_swiglu_ffn": False,
}  # fmt: skip
HUB = {"small": SMALL, "base": {**SMALL, "hidden_size": 768, "num_attention_heads": 12}}
PARAMETERS = {"small": 22_056_576, "base": 86_580_480}  # with the mask token
TINY = {
    **SMALL, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 70,
}  # fmt: skip


def config(hub: dict) -> VLMConfig:
    """A config whose encoder is the one that a Hub config.json describes."""
    fields = Dinov2.hub_fields(hub)
    size = fields["vit_img_size"]
    return preset("tiny_dinov2_smollm").replace(**fields, mp_pixel_shuffle_factor=1, max_img_size=size)


def pair(hub: dict, folder):
    """(transformers' model, ours with its weights, its file)."""
    transformers = pytest.importorskip("transformers")
    theirs = scale(transformers.Dinov2Model(transformers.Dinov2Config(**hub)))
    theirs.save_pretrained(folder)
    stored = Checkpoint([folder / "model.safetensors"])
    with torch.device("meta"):
        ours = Dinov2(config(hub))
    load(ours, stored, Dinov2.RULES, prefixes=Dinov2.PREFIXES, ignored=Dinov2.IGNORED)
    return theirs, ours.eval(), stored


@torch.no_grad()
def difference(theirs, ours, height: int, width: int) -> float:
    """Largest difference of the patches' features for pictures of one size."""
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    want = theirs(pixel_values=pixels).last_hidden_state[:, 1:]
    got = ours(pixels)
    assert got.shape == want.shape and want.std() > 0.3
    return float((got - want).abs().max())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return pair(TINY, tmp_path_factory.mktemp("dinov2"))


@pytest.mark.parametrize("size", [(70, 70), (42, 42), (112, 112), (42, 98), (140, 28)])
def test_patches_equal_transformers_at_the_tables_size_and_at_others(tiny, size):
    theirs, ours, _ = tiny
    assert difference(theirs, ours, *size) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("size", sorted(HUB))
def test_patches_equal_transformers_at_real_dimensions(tmp_path, size):
    theirs, ours, _ = pair(HUB[size], tmp_path)
    assert difference(theirs, ours, 224, 224) <= TOLERANCE
    assert difference(theirs, ours, 140, 224) <= TOLERANCE


def test_what_we_write_under_the_hubs_names_loads_in_transformers_and_gives_the_same(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, ours, _ = tiny
    write_tensors(tmp_path / "model.safetensors", to_hub(ours, Dinov2.RULES), {"format": "pt"})
    transformers.Dinov2Config(**TINY).save_pretrained(tmp_path)
    theirs, told = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert difference(theirs.eval(), ours, 70, 70) <= TOLERANCE


def test_a_file_goes_through_ours_and_back_unchanged(tiny):
    _, ours, stored = tiny
    written = to_hub(ours, Dinov2.RULES)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == dict(stored.shapes)
    assert all(torch.equal(tensor, stored.read(name)) for name, tensor in written.items())
    assert written["embeddings.mask_token"].any()


@pytest.mark.parametrize("size", sorted(HUB))
def test_keys_and_shapes_are_those_of_the_published_file(size):
    D = HUB[size]["hidden_size"]
    want = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.mask_token": (1, D),
        "embeddings.position_embeddings": (1, 1370, D),
        "embeddings.patch_embeddings.projection.weight": (D, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (D,),
        "layernorm.weight": (D,),
        "layernorm.bias": (D,),
    }
    for layer in (f"encoder.layer.{i}." for i in range(12)):
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value",
                     "attention.output.dense"):  # fmt: skip
            want |= {f"{layer}{name}.weight": (D, D), f"{layer}{name}.bias": (D,)}
        for name in ("norm1", "norm2"):
            want |= {f"{layer}{name}.weight": (D,), f"{layer}{name}.bias": (D,)}
        want |= {f"{layer}mlp.fc1.weight": (4 * D, D), f"{layer}mlp.fc1.bias": (4 * D,)}
        want |= {f"{layer}mlp.fc2.weight": (D, 4 * D), f"{layer}mlp.fc2.bias": (D,)}
        want |= {f"{layer}layer_scale1.lambda1": (D,), f"{layer}layer_scale2.lambda1": (D,)}
    with torch.device("meta"):
        model = Dinov2(config(HUB[size]))
    written = to_hub(model, Dinov2.RULES)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == want
    assert len(want) == 223 and sum(tensor.numel() for tensor in written.values()) == PARAMETERS[size]


@pytest.mark.parametrize("size", sorted(HUB))
def test_the_presets_numbers_are_those_of_the_hubs_config(size):
    said = Dinov2.hub_fields(HUB[size])
    assert said.pop("vit_img_size") == 518
    assert {name: DINOV2[size][name] for name in said} == said


def test_the_cls_token_is_seen_by_the_patches_and_dropped_on_output(tiny):
    _, ours, _ = tiny
    pixels, turn = torch.randn(1, 3, 70, 42), torch.linspace(-1, 1, 32)
    with torch.no_grad():
        before = ours(pixels)
        ours.patch_embedding.cls_token.add_(turn)
        after = ours(pixels)
        ours.patch_embedding.cls_token.sub_(turn)
    assert before.shape == (1, 5 * 3, 32)
    assert not torch.allclose(before, after, atol=1e-4)


def test_positions_of_a_rectangle_as_large_as_the_table_are_interpolated_too(tiny):
    _, ours, _ = tiny  # a 5x5 table; 25x1 has as many patches
    embedding = ours.patch_embedding
    assert embedding.positions(5, 5) is embedding.position_embedding
    assert not torch.allclose(embedding.positions(25, 1), embedding.position_embedding, atol=1e-3)


def test_a_constant_table_stays_constant_at_every_grid(tiny):
    cfg = config(TINY)
    embedding = Dinov2(cfg).patch_embedding
    nn.init.constant_(embedding.position_embedding, 0.25)
    for grid in ((1, 1), (3, 8), (11, 5)):
        assert torch.allclose(embedding.positions(*grid), torch.tensor(0.25), atol=1e-6)


def test_a_picture_that_is_no_whole_number_of_patches_is_refused(tiny):
    _, ours, _ = tiny
    with pytest.raises(ImageError, match="70x75 pixels is no whole number of patches of 14"):
        ours(torch.zeros(1, 3, 70, 75))


def test_the_prime_native_grid_is_refused_when_the_config_is_built_naming_sizes_and_factors_that_work():
    with pytest.raises(ConfigError, match="37 patches a side") as refused:
        preset("dinov2_smollm", vit_img_size=518)
    for word in ("mp_pixel_shuffle_factor=2", "1, 37", "504", "532", "multiple of 28"):
        assert word in str(refused.value)
    assert preset("dinov2_smollm", vit_img_size=504).mp_image_token_length == 18 * 18


OTHERS = [("use_swiglu_ffn", True), ("hidden_act", "relu"), ("qkv_bias", False)]


@pytest.mark.parametrize(("field", "value"), OTHERS)
def test_a_variant_that_is_not_built_here_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value!r}"):
        Dinov2.hub_fields({**SMALL, field: value})


def test_the_name_outside_the_hub_means_the_hubs():
    cfg = preset("tiny_dinov2_smollm").replace(vit_model_type="facebook/dinov2-vits14")
    assert cfg.vit_model_type == "facebook/dinov2-small"
