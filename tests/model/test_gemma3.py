"""Gemma 3 against transformers', its sliding window, and what it generates."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm import VisionLanguageModel, VLMConfig, preset
from nanovlm.checkpoint import Checkpoint, write_tensors
from nanovlm.errors import ConfigError
from nanovlm.generate import position_ids
from nanovlm.hub import weight_files
from nanovlm.language.gemma3 import Gemma3, RMSNorm, window_mask
from nanovlm.layers import causal_mask
from nanovlm.weights import load, to_hub
from tests.model.helpers import pad

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5  # fp32, outputs of order 1
WINDOW = 8

# config.json of google/gemma-3-270m-it, without the fields that say nothing about the architecture
PUBLISHED = {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
    "use_bidirectional_attention": False, "vocab_size": 262144,
}  # fmt: skip
# its model.safetensors: {name with * for the layer: shape}; nothing but parameters, the head's among them not
PUBLISHED_KEYS = {
    "model.embed_tokens.weight": (262144, 640),
    "model.layers.*.self_attn.q_proj.weight": (1024, 640),
    "model.layers.*.self_attn.k_proj.weight": (256, 640),
    "model.layers.*.self_attn.v_proj.weight": (256, 640),
    "model.layers.*.self_attn.o_proj.weight": (640, 1024),
    "model.layers.*.self_attn.q_norm.weight": (256,),
    "model.layers.*.self_attn.k_norm.weight": (256,),
    "model.layers.*.mlp.gate_proj.weight": (2048, 640),
    "model.layers.*.mlp.up_proj.weight": (2048, 640),
    "model.layers.*.mlp.down_proj.weight": (640, 2048),
    "model.layers.*.input_layernorm.weight": (640,),
    "model.layers.*.post_attention_layernorm.weight": (640,),
    "model.layers.*.pre_feedforward_layernorm.weight": (640,),
    "model.layers.*.post_feedforward_layernorm.weight": (640,),
    "model.norm.weight": (640,),
}


def tiny(**changes) -> VLMConfig:
    """Two sliding layers, a full one, and a sliding one again; queries scaled by a number of their own."""
    sizes = {"lm_n_blocks": 4, "lm_sliding_window": WINDOW, "lm_query_pre_attn_scalar": 24}
    return preset("tiny_siglip2_gemma", **{**sizes, **changes})


def reference_config(cfg: VLMConfig):
    kinds = ["sliding_attention"] * (cfg.lm_sliding_window_pattern - 1) + ["full_attention"]
    return transformers.Gemma3TextConfig(
        hidden_size=cfg.lm_hidden_dim, intermediate_size=cfg.lm_inter_dim, num_hidden_layers=cfg.lm_n_blocks,
        num_attention_heads=cfg.lm_n_heads, num_key_value_heads=cfg.lm_n_kv_heads, head_dim=cfg.lm_head_dim,
        vocab_size=cfg.lm_vocab_size, rms_norm_eps=cfg.lm_rms_eps, rope_theta=float(cfg.lm_re_base),
        rope_local_base_freq=float(cfg.lm_re_base_local), sliding_window=cfg.lm_sliding_window,
        layer_types=(kinds * cfg.lm_n_blocks)[: cfg.lm_n_blocks],
        query_pre_attn_scalar=cfg.lm_query_pre_attn_scalar,
        max_position_embeddings=cfg.lm_max_position_embeddings, tie_word_embeddings=cfg.lm_tie_weights,
    )  # fmt: skip


def drawn(module, seed=0):
    """Weights that keep activations of order 1: norms scale by 1 + weight, embeddings by the root of D."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5)
    return module.eval()


def both(cfg, folder):
    """(transformers' model, ours loaded from the file it wrote)."""
    reference = drawn(transformers.Gemma3ForCausalLM(reference_config(cfg)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(folder)
    return reference, filled(Gemma3(cfg), folder)


def filled(module, folder):
    load(
        module,
        Checkpoint(weight_files(folder)),
        Gemma3.RULES,
        prefixes=Gemma3.PREFIXES,
        ignored=Gemma3.IGNORED,
    )
    return module.eval()


def logits(ours, ids, valid=None):
    embeds = ours.embed(ids)
    mask = None if valid is None else causal_mask(valid)
    return ours.head(ours(embeds, position_ids(embeds, valid), mask))


def difference(ours, theirs):
    assert 0.2 < theirs.std() < 20, "the comparison needs outputs of order 1"
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return both(tiny(), tmp_path_factory.mktemp("gemma"))


@pytest.fixture
def ids():
    return torch.randint(3, 259, (2, 3 * WINDOW))


# -- parity -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_gives_the_numbers_of_transformers_beyond_the_window(pair, ids):
    reference, ours = pair
    assert difference(logits(ours, ids), reference(ids).logits) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2])
def test_around_the_windows_edge_every_length_agrees(pair, ids, length):
    reference, ours = pair
    assert difference(logits(ours, ids[:, :length]), reference(ids[:, :length]).logits) <= TOLERANCE


@torch.no_grad()
def test_token_by_token_with_a_cache_it_stays_with_transformers(pair, ids):
    reference, ours = pair
    prompt = WINDOW - 3  # the cache outgrows the window while it is read
    whole = reference(ids).logits
    theirs = reference(ids[:, :prompt], use_cache=True)
    cache = ours.new_cache(2, ids.shape[1])
    positions = torch.arange(ids.shape[1]).expand(2, -1)
    hidden = ours(ours.embed(ids[:, :prompt]), positions[:, :prompt], None, cache)
    cache.advance(prompt)
    assert difference(ours.head(hidden), theirs.logits) <= TOLERANCE
    for at in range(prompt, ids.shape[1]):
        step = ids[:, at : at + 1]
        theirs = reference(step, past_key_values=theirs.past_key_values, use_cache=True)
        hidden = ours(ours.embed(step), positions[:, at : at + 1], None, cache)
        cache.advance(1)
        assert difference(ours.head(hidden), theirs.logits) <= TOLERANCE, at
        assert difference(ours.head(hidden)[:, 0], whole[:, at]) <= TOLERANCE, at


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_the_numbers_of_transformers(pair, ids, side):
    reference, ours = pair
    rows = [ids[0].tolist(), ids[1, : 2 * WINDOW].tolist()]
    padded, mask = pad(rows, side)
    valid = mask.bool()
    theirs = reference(
        padded, attention_mask=mask, position_ids=position_ids(padded[..., None], valid)
    ).logits
    assert difference(logits(ours, padded, valid)[valid], theirs[valid]) <= TOLERANCE


@torch.no_grad()
def test_what_we_write_under_the_hubs_names_loads_in_transformers(ids, tmp_path):
    cfg = tiny()
    ours = drawn(Gemma3(cfg), seed=1)
    write_tensors(tmp_path / "model.safetensors", to_hub(ours, Gemma3.RULES), {"format": "pt"})
    reference_config(cfg).save_pretrained(tmp_path)
    reference, report = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert difference(logits(ours, ids), reference.eval()(ids).logits) <= TOLERANCE


@torch.no_grad()
def test_an_untied_head_is_read_from_the_file(ids, tmp_path):
    reference, ours = both(tiny(lm_tie_weights=False), tmp_path)
    assert ours.head.weight is not ours.token_embedding.weight
    assert difference(logits(ours, ids), reference(ids).logits) <= TOLERANCE


@torch.no_grad()
def test_in_bf16_embeddings_and_norms_round_where_transformers_rounds(ids, tmp_path):
    cfg = tiny(lm_hidden_dim=40)  # its root, the embeddings' scale, is no bf16 number
    reference, ours = (model.bfloat16() for model in both(cfg, tmp_path))
    x = ours.embed(ids)
    assert torch.equal(x, reference.model.embed_tokens(ids))
    assert torch.equal(ours.blocks[0].norm1(x), reference.model.layers[0].input_layernorm(x))
    error = (logits(ours, ids).float() - reference(ids).logits.float()).abs().mean()
    assert error < 0.03  # a few units in the last place of a number around 1


@torch.no_grad()
def test_norms_compute_in_float32_in_a_bf16_model():
    norm = drawn(RMSNorm(64, 1e-6))
    x = 100 * torch.randn(4, 64)
    low, exact = norm.bfloat16(), x.bfloat16()
    wide = (
        exact.float() / (exact.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + low.weight.float())
    )
    assert torch.equal(low(exact), wide.bfloat16())


@pytest.mark.slow
@torch.no_grad()
def test_at_real_dimensions_it_gives_the_numbers_of_transformers(tmp_path):
    cfg = preset("siglip2_gemma", vlm_extra_tokens={"image_token": "<|image|>"}, max_img_size=512,
                 resize_to_max_side_len=False)  # fmt: skip
    cfg = cfg.replace(vlm_extra_tokens={}, extra_token_amount=0)
    reference, ours = both(cfg, tmp_path)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 268_098_176
    ids = torch.randint(3, 262144, (1, 520))  # past the window of 512
    theirs = reference(ids, logits_to_keep=12).logits
    embeds = ours.embed(ids)
    hidden = ours(embeds, position_ids(embeds, None))
    assert difference(ours.head(hidden[:, -12:]), theirs) <= TOLERANCE


# -- the Hub's files ----------------------------------------------------------------------------------------


def published_config() -> VLMConfig:
    tokens = {"vlm_extra_tokens": {}, "extra_token_amount": 0}  # only text: as the Hub has it
    return preset("siglip2_gemma", **tokens, max_img_size=512)


def test_keys_and_shapes_are_those_of_the_hubs_file():
    with torch.device("meta"):
        model = Gemma3(published_config())
    written = to_hub(model, Gemma3.RULES)
    assert len(written) == 236
    patterns = {re.sub(r"\.\d+\.", ".*.", name): tuple(tensor.shape) for name, tensor in written.items()}
    assert patterns == PUBLISHED_KEYS
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176


def test_it_holds_no_buffer():
    assert not list(Gemma3(tiny()).buffers())


def test_the_preset_has_the_numbers_of_the_published_config():
    cfg = published_config()
    assert Gemma3.hub_fields(PUBLISHED) == {name: getattr(cfg, name) for name in Gemma3.hub_fields(PUBLISHED)}


def test_transformers_own_config_file_says_the_same(tmp_path):
    cfg = tiny()
    reference_config(cfg).save_pretrained(tmp_path)
    fields = Gemma3.hub_fields(json.loads((tmp_path / "config.json").read_text()))
    expected = {**{name: getattr(cfg, name) for name in fields}, "lm_base_vocab_size": cfg.lm_vocab_size}
    assert fields == expected


def test_an_older_config_file_gives_the_pattern_as_a_number():
    config = {
        name: value for name, value in PUBLISHED.items() if "layer" not in name and "pattern" not in name
    }
    assert Gemma3.hub_fields({**config, "sliding_window_pattern": 4})["lm_sliding_window_pattern"] == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_types", ["full_attention", "sliding_attention"] * 9),
        ("attention_bias", True),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("hidden_activation", "silu"),
        ("rope_scaling", {"factor": 8.0, "rope_type": "linear"}),
        ("use_bidirectional_attention", True),
    ],
)
def test_a_variant_that_is_not_built_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        Gemma3.hub_fields({**PUBLISHED, name: value})


def test_a_scaled_rotary_base_of_transformers_5_is_refused():
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    with pytest.raises(ConfigError, match="rope_type of full_attention='linear'"):
        Gemma3.hub_fields({**PUBLISHED, "rope_parameters": rope})


def test_the_width_of_a_head_follows_the_sizes_unless_it_was_given():
    cfg = preset("tiny")
    assert (cfg.lm_head_dim, cfg.replace(lm_n_heads=2).lm_head_dim) == (16, 32)
    assert "lm_head_dim" not in cfg.to_json_dict()
    given = cfg.replace(lm_head_dim=24)
    assert given.replace(lm_n_heads=2).lm_head_dim == 24
    assert VLMConfig.from_json_dict(given.to_json_dict()) == (given, ())
    with pytest.raises(ConfigError, match="lm_head_dim=23"):
        cfg.replace(lm_head_dim=23)


def test_fields_of_gemma_are_refused_elsewhere():
    with pytest.raises(ConfigError, match="lm_sliding_window=64 is read by language_model='gemma' alone"):
        preset("tiny", lm_sliding_window=64)


def test_a_vision_language_model_starts_from_the_published_files(tmp_path):
    reference, _ = both(tiny(extra_token_amount=0, vlm_extra_tokens={}, max_img_size=64), tmp_path)
    cfg = tiny(lm_model_type=str(tmp_path))
    model = VisionLanguageModel(cfg)
    table = reference.get_input_embeddings().weight
    assert torch.equal(model.decoder.token_embedding.weight[: len(table)], table)
    assert len(model.decoder.token_embedding.weight) == len(table) + 66
    assert model.decoder.head.weight is model.decoder.token_embedding.weight


def test_a_saved_model_comes_back_with_its_config_and_its_numbers(ids, tmp_path):
    model = drawn(VisionLanguageModel(tiny(), load_backbone=False))
    model.save_pretrained(tmp_path)
    again = VisionLanguageModel.from_pretrained(tmp_path).eval()
    assert again.cfg == model.cfg
    assert torch.equal(again(ids, None)[0], model(ids, None)[0])


# -- the window ---------------------------------------------------------------------------------------------


def test_a_window_is_the_position_and_those_right_before_it():
    mask = window_mask(None, 3, 6, 6, torch.device("cpu"))
    distance = torch.arange(6)[:, None] - torch.arange(6)
    assert torch.equal(mask[0, 0], (distance >= 0) & (distance < 3))


def test_a_sequence_as_long_as_the_window_needs_no_mask():
    assert window_mask(None, 6, 6, 6, torch.device("cpu")) is None
    assert window_mask(None, 6, 1, 6, torch.device("cpu")) is None
    assert window_mask(None, 6, 1, 7, torch.device("cpu"))[0, 0].tolist() == [[False] + [True] * 6]


def test_packed_documents_keep_the_windows_they_have_alone():
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    seen = (documents[:, None] == documents) & torch.ones(9, 9, dtype=torch.bool).tril()
    mask = window_mask(seen[None, None], 3, 9, 9, torch.device("cpu"))[0, 0]
    for start, stop in ((0, 4), (4, 9)):
        alone = window_mask(None, 3, stop - start, stop - start, torch.device("cpu"))[0, 0]
        assert torch.equal(mask[start:stop, start:stop], alone)
    assert not mask[4:, :4].any()


def test_a_sliding_layer_forgets_what_lies_behind_its_window():
    cfg = tiny(lm_n_blocks=1)  # one layer, and it slides
    model = drawn(Gemma3(cfg))
    ids = torch.randint(3, 259, (1, 2 * WINDOW))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 200 + 3
    with torch.no_grad():
        changed = (logits(model, ids) - logits(model, other)).abs().amax(-1)[0] > 0
    assert changed.tolist() == [True] * WINDOW + [False] * WINDOW


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 3 * WINDOW), padding=st.integers(1, 2 * WINDOW), left=st.booleans(),
    seed=st.integers(0, 99), window=st.integers(1, 2 * WINDOW),
)  # fmt: skip
def test_padding_does_not_change_a_row(length, padding, left, seed, window):
    model = drawn(Gemma3(tiny(lm_sliding_window=window)), seed)
    row = torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    padded, mask = pad([row, [5] * (length + padding)], "left" if left else "right")
    with torch.no_grad():
        alone = logits(model, torch.tensor([row]))
        together = logits(model, padded, mask.bool())[0, mask[0].bool()]
    assert (alone[0] - together).abs().max() <= TOLERANCE


# -- generation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return drawn(VisionLanguageModel(tiny(), load_backbone=False))


@torch.no_grad()
def test_cached_generation_equals_asking_again_each_time(model, ids):
    new = model.generate(ids, None, max_new_tokens=WINDOW, greedy=True, eos_token_id=0)
    sequence = ids
    for step in range(new.shape[1]):
        following = model(sequence, None)[0][:, -1].argmax(-1)
        assert torch.equal(following, new[:, step]), step
        sequence = torch.cat((sequence, following[:, None]), dim=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_generates_what_its_rows_generate_alone(model, ids, side):
    rows = [ids[0].tolist(), ids[1, : WINDOW + 1].tolist(), ids[1, :2].tolist()]
    padded, mask = pad(rows, side)
    together = model.generate(padded, None, mask, max_new_tokens=WINDOW, greedy=True, eos_token_id=0)
    for row, new in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), None, max_new_tokens=WINDOW, greedy=True, eos_token_id=0)
        assert new.tolist()[: alone.shape[1]] == alone[0].tolist()


def test_image_features_are_not_scaled_as_words_are(model):
    cfg = model.cfg
    ids = torch.full((1, cfg.mp_image_token_length + 1), cfg.image_token_id)
    ids[0, -1] = 65
    pixels = torch.rand(1, 3, cfg.vit_img_size, cfg.vit_img_size)
    with torch.no_grad():
        embeds = model.embed_prompt(ids, pixels)[0]
        features = model.encode_images(pixels)
        word = model.decoder.token_embedding.weight[65] * cfg.lm_hidden_dim**0.5
    assert torch.allclose(embeds[0, :-1], features[0])
    assert torch.allclose(embeds[0, -1], word)
