"""Parameter names, shapes and ties of the published nanoVLM checkpoints, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanovlm import VisionLanguageModel, VLMConfig, preset
from nanovlm.weights import own_names
from tests.model.helpers import tiny_config, tiny_model
from tests.model.test_config import PUBLISHED

SHARED = (
    Path(__file__).parents[3] / "shared" / "keys"
)  # beside a developer's checkout; facts below stand alone
TOTALS = {"222M": 222_081_600, "450M": 450_614_400, "460M-8k": 460_113_984, "230M-8k": None}


def on_meta(cfg: VLMConfig) -> VisionLanguageModel:
    with torch.device("meta"):
        return VisionLanguageModel(cfg, load_backbone=False)


def upstream_shapes(cfg: VLMConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as upstream's state_dict has them."""
    d, f, p = cfg.vit_hidden_dim, cfg.vit_inter_dim, cfg.vit_patch_size
    h, g, v = cfg.lm_hidden_dim, cfg.lm_inter_dim, cfg.lm_vocab_size
    head = h // cfg.lm_n_heads
    kv = head * cfg.lm_n_kv_heads
    shapes = {
        "vision_encoder.patch_embedding.position_embedding": (1, (cfg.vit_img_size // p) ** 2, d),
        "vision_encoder.patch_embedding.conv.weight": (d, 3, p, p),
        "vision_encoder.patch_embedding.conv.bias": (d,),
        "vision_encoder.layer_norm.weight": (d,),
        "vision_encoder.layer_norm.bias": (d,),
        "decoder.token_embedding.weight": (v, h),
        "decoder.rotary_embd.inv_freq": (head // 2,),
        "decoder.norm.weight": (h,),
        "decoder.head.weight": (v, h),
        "MP.proj.weight": (h, d * cfg.mp_pixel_shuffle_factor**2),
    }
    for n in range(cfg.vit_n_blocks):
        linear = {"attn.qkv_proj": (3 * d, d), "attn.out_proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
        for name, shape in {**linear, "ln1": (d,), "ln2": (d,)}.items():
            shapes[f"vision_encoder.blocks.{n}.{name}.weight"] = shape
            shapes[f"vision_encoder.blocks.{n}.{name}.bias"] = shape[:1]
    for n in range(cfg.lm_n_blocks):
        for name, shape in {
            "attn.q_proj": (h, h),
            "attn.k_proj": (kv, h),
            "attn.v_proj": (kv, h),
            "attn.out_proj": (h, h),
            "mlp.gate_proj": (g, h),
            "mlp.up_proj": (g, h),
            "mlp.down_proj": (h, g),
            "norm1": (h,),
            "norm2": (h,),
        }.items():
            shapes[f"decoder.blocks.{n}.{name}.weight"] = shape
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_ties_are_those_of_the_published_checkpoint(name):
    cfg = PUBLISHED[name]()
    model = on_meta(cfg)
    state = model.state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == upstream_shapes(cfg)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert model.decoder.head.weight is model.decoder.token_embedding.weight
    if TOTALS[name]:
        assert sum(parameter.numel() for parameter in model.parameters()) == TOTALS[name]


@pytest.mark.parametrize("generation", ["v0.1", "v0.2", "main"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_file_keeps_the_head_and_names_the_embedding_as_its_alias(tmp_path, generation, tied):
    model = tiny_model(generation, lm_tie_weights=tied)
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        kept = set(upstream_shapes(model.cfg)) - ({"decoder.token_embedding.weight"} if tied else set())
        assert set(file.keys()) == kept
        assert (file.metadata() or {}) == (
            {"decoder.token_embedding.weight": "decoder.head.weight"} if tied else {}
        )


def test_what_upstream_itself_wrote_has_the_same_keys_and_shapes():
    """Where the recorded key lists are at hand; the facts above hold without them."""
    for file in sorted(SHARED.glob("nanoVLM-*.state_dict.json")):
        facts = json.loads(file.read_text())
        model = on_meta(VLMConfig.from_json_dict(facts["config"])[0])
        assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == {
            key: entry["shape"] for key, entry in facts["state_dict"].items()
        }
        assert sorted(own_names(model)) == facts["saved_keys"]
    assert upstream_shapes(preset("tiny")).keys() == on_meta(tiny_config()).state_dict().keys()
