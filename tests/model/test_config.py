"""VLMConfig and the presets: three generations of config.json, derived values, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nanovlm import PRESETS, TrainConfig, VLMConfig, preset
from nanovlm.errors import ConfigError, NanoVLMError, UnknownBackbone, UnknownPreset
from nanovlm.registry import language_model, vision_encoder
from tests.model.helpers import tiny_config

VIT = [
    "vit_hidden_dim",
    "vit_inter_dim",
    "vit_patch_size",
    "vit_img_size",
    "vit_n_heads",
    "vit_dropout",
    "vit_n_blocks",
    "vit_ln_eps",
    "vit_cls_flag",
    "vit_model_type",
]
LM = [
    "lm_hidden_dim",
    "lm_inter_dim",
    "lm_rms_eps",
    "lm_re_base",
    "lm_max_position_embeddings",
    "lm_vocab_size",
    "lm_n_heads",
    "lm_n_kv_heads",
    "lm_dropout",
    "lm_n_blocks",
    "lm_attn_scaling",
    "lm_max_length",
    "lm_use_tokens",
    "lm_tie_weights",
    "lm_model_type",
    "lm_tokenizer",
]
REST = ["mp_pixel_shuffle_factor", "vlm_load_backbone_weights", "vlm_checkpoint_path"]
EXTENDED = [
    "lm_base_vocab_size",
    "extra_token_amount",
    "mp_image_token_length",
    "vlm_extra_tokens",
    "hf_repo_name",
]
FIELDS = {  # what upstream's VLMConfig of each generation has, and refuses anything beyond
    "v0.1": {*VIT, *LM, *REST, "lm_eos_token_id"},
    "v0.2": {*VIT, *LM, *REST, *EXTENDED, "lm_eos_token_id"},
    "main": {*VIT, *LM, *REST, *EXTENDED, "lm_chat_template", "max_img_size", "resize_to_max_side_len"},
}

# The published 450M and 230M, as far as they differ from the presets.
SMOL_360M = {
    "lm_hidden_dim": 960,
    "lm_inter_dim": 2560,
    "lm_n_heads": 15,
    "lm_n_kv_heads": 5,
    "lm_n_blocks": 32,
}
SMOL_135M = {
    "lm_hidden_dim": 576,
    "lm_inter_dim": 1536,
    "lm_n_heads": 9,
    "lm_n_kv_heads": 3,
    "lm_n_blocks": 30,
}
PUBLISHED = {
    "222M": lambda: preset("original_small"),
    "450M": lambda: preset(
        "original_small",
        **SMOL_360M,
        vit_img_size=256,
        lm_vocab_size=49153,
        lm_tokenizer="HuggingFaceTB/SmolLM2-360M-Instruct",
        vlm_extra_tokens={"image_token": "<|image|>"},
    ),
    "460M-8k": lambda: preset("default"),
    "230M-8k": lambda: preset("default", **SMOL_135M, lm_max_length=8192),
}


def through_json(cfg: VLMConfig) -> tuple[VLMConfig, tuple[str, ...]]:
    return VLMConfig.from_json_dict(json.loads(json.dumps(cfg.to_json_dict())))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_comes_back_from_json_unchanged(name):
    cfg = PUBLISHED[name]()
    assert through_json(cfg) == (cfg, ())


@pytest.mark.parametrize(
    ("name", "generation"), [("222M", "v0.1"), ("450M", "v0.2"), ("460M-8k", "main"), ("230M-8k", "main")]
)
def test_json_has_exactly_the_fields_of_its_generation_of_upstream(name, generation):
    cfg = PUBLISHED[name]()
    assert cfg.generation == generation
    assert set(cfg.to_json_dict()) == FIELDS[generation] - ({"lm_eos_token_id"} - set(cfg.to_json_dict()))
    assert set(cfg.to_json_dict()) >= FIELDS[generation] - {"lm_eos_token_id"}


@pytest.mark.parametrize("change", [{"hf_repo_name": "mine"}, {"lm_chat_template": "{{ messages }}"}])
def test_a_field_beyond_the_generation_is_written_only_when_it_says_something(change):
    plain, changed = preset("original_small"), preset("original_small", **change)
    assert not set(change) & set(plain.to_json_dict())
    assert set(changed.to_json_dict()) - set(plain.to_json_dict()) == set(change)
    assert through_json(changed)[0] == changed


def test_the_default_config_is_the_default_preset():
    assert VLMConfig() == preset("default")


def test_unknown_fields_of_a_config_json_are_ignored_and_named():
    values = {**preset("tiny").to_json_dict(), "lm_new_idea": 3, "comment": "hello"}
    assert VLMConfig.from_json_dict(values) == (preset("tiny"), ("comment", "lm_new_idea"))


def test_a_config_json_without_harmless_fields_loads_with_what_upstream_means():
    values = preset("default").to_json_dict()
    for name in (
        "lm_re_base",
        "vit_ln_eps",
        "lm_tie_weights",
        "lm_chat_template",
        "vlm_checkpoint_path",
        "lm_base_vocab_size",
    ):
        del values[name]
    assert VLMConfig.from_json_dict(values) == (preset("default"), ())


@pytest.mark.parametrize(
    "name", ["lm_hidden_dim", "vit_n_heads", "lm_tokenizer", "mp_pixel_shuffle_factor", "lm_vocab_size"]
)
def test_a_config_json_without_a_deciding_field_is_refused_by_name(name):
    values = preset("original_small").to_json_dict()
    del values[name]
    with pytest.raises(ConfigError, match=name):
        VLMConfig.from_json_dict(values)


def test_a_transformers_config_json_is_told_apart():
    with pytest.raises(ConfigError, match="model_type='llama'"):
        VLMConfig.from_json_dict({"model_type": "llama", "hidden_size": 64})


CONTRADICTIONS = {
    "vit_patch_size=10": {"vit_patch_size": 10},
    "lm_n_heads=5": {"lm_n_heads": 5},
    "lm_n_kv_heads=3": {"lm_n_kv_heads": 3},
    "mp_pixel_shuffle_factor=3 does not divide; these do: 1, 2, 4": {"mp_pixel_shuffle_factor": 3},
    "mp_image_token_length=9": {"mp_image_token_length": 9},
    "lm_vocab_size=300": {"lm_vocab_size": 300},
    "extra_token_amount=5": {"extra_token_amount": 5, "lm_vocab_size": 264},
    "max_img_size=100": {"max_img_size": 100},
    "10x10 tiles of 64, but vlm_extra_tokens has no r1c9": {"max_img_size": 640},
    "lm_use_tokens=True": {"lm_use_tokens": True},
    "vit_cls_flag=True": {"vit_cls_flag": True},
    "lm_hidden_dim='64'": {"lm_hidden_dim": "64"},
    "lm_hidden_dim=True": {"lm_hidden_dim": True},
    "lm_hidden_dim=64.5": {"lm_hidden_dim": 64.5},
    "lm_n_blocks=0": {"lm_n_blocks": 0},
    "lm_n_blocks=None": {"lm_n_blocks": None},
    "lm_rms_eps=nan": {"lm_rms_eps": float("nan")},
    "lm_dropout=1.0": {"lm_dropout": 1},
    "lm_hidden_dim=1000000000": {"lm_hidden_dim": 10**9},
    "lm_re_base": {"lm_re_base": 10**400},
    "lm_attn_scaling": {"lm_attn_scaling": 10**400},
    "parameters": {"lm_hidden_dim": 32768, "lm_inter_dim": 131072, "lm_n_blocks": 500, "lm_n_heads": 256},
    "vlm_extra_tokens": {"vlm_extra_tokens": ["<|image|>"]},
    "two names to one token": {"vlm_extra_tokens": {"image_token": "<x>", "global_image_token": "<x>"}},
    "did you mean 'lm_n_heads'": {"lm_n_head": 4},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_a_contradiction_is_refused_with_its_values(message):
    with pytest.raises(ConfigError) as caught:
        preset("tiny", **CONTRADICTIONS[message])
    assert message in str(caught.value)


@pytest.mark.parametrize("generation", ["v0.1", "v0.2"])
def test_a_model_without_tiles_has_no_larger_picture(generation):
    with pytest.raises(ConfigError, match="one square picture"):
        tiny_config(generation, max_img_size=128)


def test_numbers_that_json_does_not_tell_apart_are_taken():
    cfg = preset("tiny", lm_re_base=100000.0, lm_attn_scaling=1, lm_dropout=0)
    assert (type(cfg.lm_re_base), type(cfg.lm_attn_scaling), type(cfg.lm_dropout)) == (int, float, float)


def test_replace_lets_dependent_fields_follow():
    cfg = preset("tiny").replace(vit_img_size=32, mp_pixel_shuffle_factor=1, extra_token_amount=70)
    assert (cfg.mp_image_token_length, cfg.lm_vocab_size) == (4, 329)
    assert cfg.vit_grid == 2
    with pytest.raises(ConfigError, match="no field"):
        cfg.replace(vit_image_size=64)


def test_a_config_shares_no_dict_with_others():
    tokens = dict(preset("tiny").vlm_extra_tokens)
    cfg = preset("tiny", vlm_extra_tokens=tokens)
    tokens["more"] = "<more>"
    assert "more" not in cfg.vlm_extra_tokens


def test_the_image_token_follows_the_base_vocabulary():
    assert preset("default").image_token_id == 49152
    assert tiny_config("v0.2").image_token_id == 259
    assert tiny_config("v0.1").image_token_id is None


def test_an_unknown_preset_names_the_near_one_and_all():
    with pytest.raises(UnknownPreset, match="did you mean 'tiny'") as caught:
        preset("tinny")
    assert all(name in str(caught.value) for name in PRESETS)


def test_an_unknown_backbone_names_those_there_are():
    with pytest.raises(UnknownBackbone, match="siglip"):
        vision_encoder("vit-nothing")
    assert language_model("llama") is language_model("smollm")
    assert preset("tiny", language_model="llama") == preset("tiny")


def test_every_preset_builds_a_config():
    assert {preset(name).generation for name in PRESETS} >= {"v0.1", "main"}


def test_the_222m_preset_has_its_own_tokenizer():
    assert preset("original_small").lm_tokenizer == "HuggingFaceTB/cosmo2-tokenizer"


def test_errors_are_value_errors_of_one_family():
    assert issubclass(UnknownPreset, NanoVLMError) and issubclass(NanoVLMError, ValueError)


def test_learning_rates_default_to_the_backbones_and_zero_freezes():
    assert TrainConfig().learning_rates == {"MP": 0.00512, "vision_encoder": 5e-5, "decoder": 5e-5}
    rates = TrainConfig(lr_backbones=1e-4, lr_language_backbone=0, freeze_vision_encoder=True).learning_rates
    assert rates == {"MP": 0.00512, "vision_encoder": 0.0, "decoder": 0.0}


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"lr_mp": -1.0}, {"val_ratio": 1.0}, {"num_workers": -1}, {"lr_mp": "1"}]
)
def test_an_impossible_training_value_is_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        TrainConfig(**change)


def test_nothing_is_uploaded_or_logged_unless_asked():
    cfg = TrainConfig()
    assert not cfg.log_wandb and cfg.hf_repo_name is None and cfg.wandb_entity is None


def test_presets_and_configs_cost_no_torch():
    code = (
        "import sys, nanovlm; nanovlm.preset('default'); nanovlm.TrainConfig(); print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.strip() == "False", shown.stderr
