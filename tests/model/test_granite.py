"""Idefics3 checkpoints (Granite-Docling, SmolVLM) against transformers: weights, config files, answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nanovlm import VisionLanguageModel, preset
from nanovlm.checkpoint import Checkpoint
from nanovlm.errors import ConfigError, WeightsError
from nanovlm.granite_docling import Idefics3, save_for_transformers
from nanovlm.hub import weight_files
from nanovlm.weights import to_hub
from tests.hub_server import hub as hub
from tests.model.helpers import pad, scale
from tests.model.idefics3 import (
    PUBLISHED,
    PUBLISHED_PICTURES,
    TOLERANCE,
    asked,
    difference,
    reference,
    same_positions,
    saved,
    transformers,
    written,
)
from tests.model.idefics3 import granite as granite

# -- weights ----------------------------------------------------------------------------------------------


@same_positions
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tied": False},
        {"tile": 54, "patch": 2, "shuffle": 3},  # SmolVLM-2.2B's 27 patches a side
        {"tile": 52, "patch": 2},  # Idefics3-8B's 26
        {"head_dim": 32},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(tmp_path, shape):
    theirs = reference(**shape)
    ours = VisionLanguageModel.from_pretrained(saved(theirs, tmp_path)).eval()
    side, slots = ours.cfg.vit_img_size, 2 * ours.cfg.mp_image_token_length
    ids = torch.randint(0, 250, (2, slots + 12))
    ids[:, 4 : 4 + slots] = ours.cfg.image_token_id
    pixels = torch.randn(2, 2, 3, side, side)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels).logits
        got, loss = ours(ids, pixels)
        other, _ = ours(ids, -pixels)
    assert loss is None
    assert difference(got, want) <= TOLERANCE
    assert (got - other)[:, -1].abs().max() > 0.01, "the picture must count"


@same_positions
def test_a_smolvlm_checkpoint_gives_the_logits_of_transformers(tmp_path):
    config = reference().config.to_dict()
    config["vision_config"]["model_type"] = "smolvlm_vision"
    theirs = scale(transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(**{**config, "model_type": "smolvlm"})
    ))  # fmt: skip
    ours = VisionLanguageModel.from_pretrained(saved(theirs, tmp_path)).eval()
    ids = torch.tensor([[5, *[ours.cfg.image_token_id] * 4, 9, 10]])
    pixels = torch.randn(1, 1, 3, 64, 64)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels).logits
        assert difference(ours(ids, pixels)[0], want) <= TOLERANCE


@same_positions
def test_what_we_write_for_transformers_loads_there_strictly(tmp_path, granite):
    _, ours, _ = granite
    save_for_transformers(ours, tmp_path)
    kind = transformers.Idefics3ForConditionalGeneration
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids, pixels = torch.tensor([[5, *[ours.cfg.image_token_id] * 4, 9, 10]]), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = theirs.eval()(input_ids=ids, pixel_values=pixels[None]).logits
        assert difference(ours(ids, pixels)[0], want) <= TOLERANCE
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert again.cfg.replace(lm_tokenizer="x") == ours.cfg.replace(lm_tokenizer="x")


def test_a_folder_we_save_gives_the_same_model_again(tmp_path, granite):
    _, ours, _ = granite
    ours.save_pretrained(tmp_path)
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert again.cfg == ours.cfg
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_only_an_idefics3_is_written_as_one(tmp_path):
    model = VisionLanguageModel(preset("tiny"), load_backbone=False)
    with pytest.raises(ConfigError, match="fake_image_token"):
        save_for_transformers(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    saved(reference(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"missing: decoder\.blocks\.3"):
        VisionLanguageModel.from_pretrained(tmp_path)


# -- the published model ----------------------------------------------------------------------------------


def published_names():
    """{name: shape} of the published file, its tied head left out as the file does."""
    shapes = {
        "model.vision_model.embeddings.patch_embedding.weight": (768, 3, 16, 16),
        "model.vision_model.embeddings.patch_embedding.bias": (768,),
        "model.vision_model.embeddings.position_embedding.weight": (1024, 768),
        "model.vision_model.post_layernorm.weight": (768,),
        "model.vision_model.post_layernorm.bias": (768,),
        "model.connector.modality_projection.proj.weight": (576, 12288),
        "model.text_model.embed_tokens.weight": (100352, 576),
        "model.text_model.norm.weight": (576,),
    }
    for layer in range(12):
        for part, shape in {
            **{f"self_attn.{part}_proj": (768, 768) for part in ("q", "k", "v", "out")},
            "layer_norm1": (768,), "layer_norm2": (768,), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072),
        }.items():  # fmt: skip
            shapes[f"model.vision_model.encoder.layers.{layer}.{part}.weight"] = shape
            shapes[f"model.vision_model.encoder.layers.{layer}.{part}.bias"] = shape[:1]
    for layer in range(30):
        for part, shape in {
            "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
            "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
            "mlp.down_proj": (576, 1536), "input_layernorm": (576,), "post_attention_layernorm": (576,),
        }.items():  # fmt: skip
            shapes[f"model.text_model.layers.{layer}.{part}.weight"] = shape
    return shapes


def test_the_preset_is_what_the_published_config_says(tmp_path):
    found = Idefics3.config(PUBLISHED, written(tmp_path))
    assert found.replace(lm_tokenizer="ibm-granite/granite-docling-258M") == preset("granite_docling")
    assert found.lm_tokenizer == str(tmp_path)


def test_the_published_model_has_257_517_120_parameters_under_the_published_names():
    with torch.device("meta"):
        model = VisionLanguageModel(preset("granite_docling"), load_backbone=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 257_517_120
    shapes = {name: tuple(tensor.shape) for name, tensor in to_hub(model, Idefics3.RULES).items()}
    assert shapes == published_names()
    assert sum(math.prod(shape) for shape in shapes.values()) == 257_517_120


@same_positions
@pytest.mark.slow
def test_logits_at_real_size_are_those_of_transformers(tmp_path):
    theirs = scale(transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**PUBLISHED)))
    written(saved(theirs, tmp_path))
    names = Checkpoint(weight_files(tmp_path)).shapes
    assert names == published_names()
    ours = VisionLanguageModel.from_pretrained(tmp_path).eval()
    assert ours.cfg.replace(lm_tokenizer="x") == preset("granite_docling", lm_tokenizer="x")
    ids = torch.randint(0, 100000, (1, 80))
    ids[0, 3:67] = ours.cfg.image_token_id
    pixels = torch.randn(1, 1, 3, 512, 512)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels).logits
        assert difference(ours(ids, pixels)[0], want) <= TOLERANCE


# -- config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("text_config", {"model_type": "mistral"}, "text_config.model_type='mistral'"),
        ("text_config", {"attention_bias": True}, "text_config.attention_bias=True"),
        ("text_config", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ("text_config", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ("text_config", {"rope_scaling": 2}, "rope_scaling is a int"),
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act='relu'"),
        ("vision_config", {"image_size": 256}, "image_size=256.*512"),
        ("vision_config", {"image_size": [512, 512]}, r"image_size=\[512, 512\]"),
        ("pictures", {"do_image_splitting": False}, "do_image_splitting=False"),
        ("pictures", {"resample": 3}, "resample=3"),
        ("pictures", {"size": {"height": 512, "width": 512}}, "longest_edge"),
        ("pictures", {"size": {"longest_edge": 2000}}, "max_img_size=2000"),
        ("pictures", {"size": {"longest_edge": 8192}}, "8192.*4096"),
        ("pictures", {"image_std": [0.5, 0, 0.5]}, "image_std"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_variant_that_is_not_built_is_refused_by_name(tmp_path, part, change, says):
    config, pictures = json.loads(json.dumps(PUBLISHED)), dict(PUBLISHED_PICTURES)
    (pictures if part == "pictures" else config[part]).update(change)
    with pytest.raises(ConfigError, match=says):
        VisionLanguageModel.from_pretrained(written(tmp_path, config, pictures))


def test_what_a_config_leaves_out_is_the_default_of_transformers(tmp_path):
    # 224 pixels in patches of 32, its own default, make 7 a side, which the shuffle of 2 cannot halve
    parts = {"text_config": {"vocab_size": 128300}, "vision_config": {"image_size": 256}}
    theirs, config = transformers.Idefics3Config(**parts), {"model_type": "idefics3", **parts}
    ours = Idefics3.config(config, tmp_path)
    vision, text = theirs.vision_config, theirs.text_config
    assert (ours.vit_hidden_dim, ours.vit_inter_dim, ours.vit_n_blocks, ours.vit_n_heads) == (
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads,
    )  # fmt: skip
    assert (ours.vit_img_size, ours.vit_patch_size, ours.vit_ln_eps) == (
        vision.image_size, vision.patch_size, vision.layer_norm_eps,
    )  # fmt: skip
    assert (ours.lm_hidden_dim, ours.lm_n_blocks, ours.lm_n_kv_heads, ours.lm_rms_eps) == (
        text.hidden_size, text.num_hidden_layers, text.num_key_value_heads, text.rms_norm_eps,
    )  # fmt: skip
    assert (ours.image_token_id, ours.lm_tie_weights) == (theirs.image_token_id, theirs.tie_word_embeddings)


def load_and_ask(repo: str) -> tuple[str, list[int]]:
    """Runs in a process of its own, with the Hub's environment."""
    model = VisionLanguageModel.from_pretrained(repo)
    return model.cfg.lm_tokenizer, model.prepare(None, "What is this?")[0][0].tolist()


def test_a_repository_on_the_hub_brings_its_own_tokenizer(hub, granite):
    _, ours, _ = granite
    files = {path.name: path.read_bytes() for path in Path(ours.cfg.lm_tokenizer).iterdir()}
    hub.add("any/granite", files)
    with hub.client() as online:
        assert online(load_and_ask, "any/granite") == (
            "any/granite", ours.prepare(None, "What is this?")[0][0].tolist(),
        )  # fmt: skip


# -- answers and training ---------------------------------------------------------------------------------


@same_positions
def test_greedy_answers_are_those_of_transformers(granite, picture):
    theirs, ours, their_processor = granite
    inputs = asked(their_processor, [picture(90, 60)], "What is this?")
    want = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    ids, tiles = ours.prepare(picture(90, 60), "What is this?")
    got = ours.generate(ids, tiles, max_new_tokens=12, greedy=True)
    assert got.tolist() == want[:, : got.shape[1]].tolist()


def test_cached_generation_is_what_whole_forwards_give(granite, picture):
    _, ours, _ = granite
    ids, tiles = ours.prepare([picture(90, 60), picture(60, 200)], "Which is wider?")
    got = ours.generate(ids, tiles, max_new_tokens=8, greedy=True, eos_token_id=-1)
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat((ids, ours(ids, tiles)[0][:, -1:].argmax(-1)), dim=1)
    assert got.tolist() == ids[:, -8:].tolist()


def test_left_padded_rows_give_what_they_give_alone(granite, picture):
    _, ours, _ = granite
    questions = [(picture(90, 60), "What?"), (None, "Hello"), (picture(60, 300), "And this one?")]
    rows = [ours.prepare(*question) for question in questions]
    ids, mask = pad([row[0].tolist() for row, _ in rows])
    images = [tiles for _, tiles in rows]
    together = ours.generate(ids, images, mask, max_new_tokens=6, greedy=True, eos_token_id=-1)
    with torch.no_grad():
        logits, _ = ours(ids, images, mask)
        for number, (row, tiles) in enumerate(rows):
            alone, _ = ours(row, tiles)
            assert (logits[number, -row.shape[1] :] - alone[0]).abs().max() <= TOLERANCE
            single = ours.generate(row, tiles, max_new_tokens=6, greedy=True, eos_token_id=-1)
            assert together[number].tolist() == single[0].tolist()


@same_positions
def test_the_loss_is_transformers_and_reaches_every_parameter(granite, picture):
    theirs, ours, their_processor = granite
    inputs = asked(their_processor, [picture(90, 60)], "What is this?")
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == ours.cfg.image_token_id, -100)
    with torch.no_grad():
        want = theirs(**inputs, labels=labels).loss
    targets = torch.cat((labels[:, 1:], torch.full((1, 1), -100)), dim=1)  # ours come shifted
    _, loss = ours(ids, list(inputs["pixel_values"]), targets=targets)
    assert abs(loss.item() - want.item()) <= TOLERANCE
    loss.backward()
    without = [name for name, parameter in ours.named_parameters() if not parameter.grad.abs().sum() > 0]
    ours.zero_grad(set_to_none=True)
    assert without == []


def test_the_tiny_twin_answers_about_a_picture_offline(picture):
    model = VisionLanguageModel(preset("tiny_granite_docling")).eval()
    ids, tiles = model.prepare([picture(90, 60)], "What is this?")
    assert [stack.shape for stack in tiles] == [(5, 3, 64, 64)]
    assert (ids == model.cfg.image_token_id).sum() == 5 * model.cfg.mp_image_token_length
    assert isinstance(model.answer(picture(90, 60), "What is this?", max_new_tokens=4), str)
