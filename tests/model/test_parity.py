"""Our backbones against transformers': the same random weights, through files under the Hub's names."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from nanovlm import VisionLanguageModel, preset
from nanovlm.checkpoint import Checkpoint, write_tensors
from nanovlm.errors import ConfigError, WeightsError
from nanovlm.hub import weight_files
from nanovlm.language.llama import Llama
from nanovlm.vision.siglip import Siglip
from nanovlm.weights import load, to_hub
from tests.model.helpers import scale

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5  # fp32, outputs of order 1


def siglip_config(cfg, **changes):
    return transformers.SiglipVisionConfig(
        hidden_size=cfg.vit_hidden_dim,
        intermediate_size=cfg.vit_inter_dim,
        num_hidden_layers=cfg.vit_n_blocks,
        num_attention_heads=cfg.vit_n_heads,
        image_size=cfg.vit_img_size,
        patch_size=cfg.vit_patch_size,
        layer_norm_eps=cfg.vit_ln_eps,
        **changes,
    )


def llama_config(cfg, **changes):
    return transformers.LlamaConfig(
        **{
            "hidden_size": cfg.lm_hidden_dim,
            "intermediate_size": cfg.lm_inter_dim,
            "num_hidden_layers": cfg.lm_n_blocks,
            "num_attention_heads": cfg.lm_n_heads,
            "num_key_value_heads": cfg.lm_n_kv_heads,
            "vocab_size": cfg.lm_vocab_size,
            "rms_norm_eps": cfg.lm_rms_eps,
            "rope_theta": float(cfg.lm_re_base),
            "tie_word_embeddings": cfg.lm_tie_weights,
            "max_position_embeddings": cfg.lm_max_position_embeddings,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )


def saved(reference, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(folder, **options)
    return Checkpoint(weight_files(folder))


def filled(module, stored):
    kind = type(module)
    report = load(module, stored, kind.RULES, prefixes=kind.PREFIXES, ignored=kind.IGNORED)
    return module.eval(), report


def difference(ours, theirs):
    assert 0.2 < theirs.std() < 20, "the comparison needs outputs of order 1"
    return (ours - theirs).abs().max().item()


def check_siglip(cfg, folder):
    reference = scale(transformers.SiglipVisionModel(siglip_config(cfg)))
    ours, _ = filled(Siglip(cfg), saved(reference, folder))
    pixels = torch.randn(2, 3, cfg.vit_img_size, cfg.vit_img_size)
    with torch.no_grad():
        assert difference(ours(pixels), reference(pixels).last_hidden_state) <= TOLERANCE


def check_llama(cfg, folder, length=40):
    reference = scale(transformers.LlamaForCausalLM(llama_config(cfg)))
    ours, report = filled(Llama(cfg), saved(reference, folder))
    assert report.computed == ["rotary_embd.inv_freq"]
    ids = torch.randint(0, cfg.lm_vocab_size, (2, length))
    positions = torch.arange(length).expand(2, -1)
    with torch.no_grad():
        logits = ours.head(ours(ours.embed(ids), positions))
        assert difference(logits, reference(ids).logits) <= TOLERANCE


def test_siglip_gives_the_numbers_of_transformers(tmp_path):
    check_siglip(preset("tiny"), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_gives_the_numbers_of_transformers(tmp_path, tied):
    check_llama(preset("tiny", lm_tie_weights=tied), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["original_small", "default"])
def test_siglip_at_real_size_gives_the_numbers_of_transformers(tmp_path, name):
    check_siglip(preset(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["original_small", "default"])
def test_llama_at_real_size_gives_the_numbers_of_transformers(tmp_path, name):
    check_llama(preset(name), tmp_path)


def test_left_padded_rows_give_the_numbers_of_transformers(tmp_path):
    cfg = preset("tiny")
    reference = scale(transformers.LlamaForCausalLM(llama_config(cfg)))
    ours, _ = filled(Llama(cfg), saved(reference, tmp_path))
    from nanovlm.generate import position_ids
    from nanovlm.layers import causal_mask

    ids, mask = torch.randint(0, 259, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    with torch.no_grad():
        embeds = ours.embed(ids)
        logits = ours.head(ours(embeds, position_ids(embeds, mask), causal_mask(mask)))
        want = reference(ids, attention_mask=mask.long(), position_ids=position_ids(embeds, mask)).logits
    assert difference(logits[mask], want[mask]) <= TOLERANCE


def test_what_we_write_under_the_hubs_names_loads_in_transformers(tmp_path):
    cfg = preset("tiny")
    vision, language = scale(Siglip(cfg)), scale(Llama(cfg), seed=1)
    for part, prefix, config, name in (
        (vision, "vision_model.", siglip_config(cfg, vision_use_head=False), "SiglipVisionModel"),
        (language, "", llama_config(cfg), "LlamaForCausalLM"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_tensors(folder / "model.safetensors", to_hub(part, part.RULES, prefix), {"format": "pt"})
        config.save_pretrained(folder)
        theirs, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            if part is vision:
                pixels = torch.randn(1, 3, 64, 64)
                assert difference(vision(pixels), theirs.eval()(pixels).last_hidden_state) <= TOLERANCE
            else:
                ids = torch.randint(0, 300, (1, 20))
                logits = language.head(language(language.embed(ids), torch.arange(20)[None]))
                assert difference(logits, theirs.eval()(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_both_spellings_of_siglip_names_load(tmp_path, prefix):
    cfg = preset("tiny")
    original = scale(Siglip(cfg))
    extras = {
        f"{prefix}head.probe": torch.zeros(1, 1, 32),
        "logit_scale": torch.zeros(1),
        "text_model.final.bias": torch.zeros(3),
    }
    path = tmp_path / "model.safetensors"
    write_tensors(path, {**to_hub(original, Siglip.RULES, prefix), **extras}, {"format": "pt"})
    again, report = filled(Siglip(cfg), Checkpoint([path]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(original.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert sorted(report.ignored) == sorted(extras)


def test_positions_are_interpolated_to_another_picture_size_as_transformers_does(tmp_path):
    small, large = preset("tiny"), preset("tiny", vit_img_size=128)
    reference = scale(transformers.SiglipVisionModel(siglip_config(small)))
    ours, report = filled(Siglip(large), saved(reference, tmp_path))
    assert report.reshaped["patch_embedding.position_embedding"] == ((16, 32), (1, 64, 32))
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        want = reference(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert difference(ours(pixels), want) <= TOLERANCE


def test_an_extended_vocabulary_keeps_the_files_rows_first(tmp_path):
    cfg = preset("tiny")
    reference = scale(transformers.LlamaForCausalLM(llama_config(cfg, vocab_size=cfg.lm_base_vocab_size)))
    fresh = Llama(cfg)
    drawn = fresh.token_embedding.weight[cfg.lm_base_vocab_size :].clone()
    ours, _ = filled(fresh, saved(reference, tmp_path))
    table = ours.token_embedding.weight
    assert torch.equal(table[: cfg.lm_base_vocab_size], reference.model.embed_tokens.weight)
    assert torch.equal(table[cfg.lm_base_vocab_size :], drawn) and drawn.std() > 0
    assert ours.head.weight is table


def test_shards_load_as_one_file(tmp_path):
    cfg = preset("tiny")
    reference = scale(transformers.LlamaForCausalLM(llama_config(cfg)))
    stored = saved(reference, tmp_path, max_shard_size="100KB")
    assert len(weight_files(tmp_path)) > 1
    ours, _ = filled(Llama(cfg), stored)
    assert torch.equal(ours.blocks[2].mlp.up_proj.weight, reference.model.layers[2].mlp.up_proj.weight)


def backbones(folder, cfg, **changes):
    """Folders of a SigLIP and a Llama of the config's shape, and the config that names them."""
    vision = scale(transformers.SiglipVisionModel(siglip_config(cfg)))
    language = scale(
        transformers.LlamaForCausalLM(llama_config(cfg, vocab_size=cfg.lm_base_vocab_size, **changes))
    )
    saved(vision, folder / "vision")
    saved(language, folder / "language")
    named = cfg.replace(vit_model_type=str(folder / "vision"), lm_model_type=str(folder / "language"))
    return vision, language, named


def test_a_model_starts_from_the_backbones_it_names(tmp_path):
    vision, language, cfg = backbones(tmp_path, preset("tiny"))
    model = VisionLanguageModel(cfg)
    assert torch.equal(
        model.vision_encoder.layer_norm.bias,
        dict(vision.named_parameters())[
            next(name for name, _ in vision.named_parameters() if name.endswith("post_layernorm.bias"))
        ],
    )
    assert torch.equal(model.decoder.norm.weight, language.model.norm.weight)
    untouched = VisionLanguageModel(cfg, load_backbone=False)
    assert not torch.equal(untouched.decoder.norm.weight, language.model.norm.weight)


def test_a_backbone_that_computes_otherwise_is_refused_with_both_values(tmp_path):
    _, _, cfg = backbones(tmp_path, preset("tiny"), rms_norm_eps=1e-3)
    with pytest.raises(ConfigError, match=r"lm_rms_eps=1e-05 in the config, 0.001 in"):
        VisionLanguageModel(cfg)


def test_the_rotary_base_is_found_where_either_transformers_keeps_it():
    base = {"hidden_size": 64, "vocab_size": 9}
    old = Llama.hub_fields({**base, "rope_theta": 100000})
    new = Llama.hub_fields({**base, "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}})
    assert old["lm_re_base"] == new["lm_re_base"] == 100000


def test_hub_fields_of_siglip_come_from_the_vision_part_and_the_class_defaults():
    fields = Siglip.hub_fields({"model_type": "siglip", "vision_config": {"image_size": 512}})
    assert all(getattr(preset("default"), name) == value for name, value in fields.items())


@pytest.mark.parametrize(
    ("backbone", "config", "said"),
    [
        (Llama, {"hidden_act": "gelu"}, "hidden_act='gelu' is not built here, only with 'silu'"),
        (Llama, {"attention_bias": True}, "attention_bias=True"),
        (Llama, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
        (Llama, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        (Siglip, {"vision_config": {"hidden_act": "gelu"}}, "hidden_act='gelu'"),
        (Siglip, {"num_channels": 1}, "num_channels=1"),
    ],
)
def test_a_variant_that_would_compute_other_numbers_is_refused(backbone, config, said):
    with pytest.raises(ConfigError, match=said):
        backbone.hub_fields(config)


def test_a_file_with_a_tensor_nobody_asked_for_is_refused_by_name(tmp_path):
    cfg = preset("tiny")
    tensors = to_hub(Llama(cfg), Llama.RULES)
    write_tensors(
        tmp_path / "model.safetensors",
        {**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)},
        {},
    )
    with pytest.raises(WeightsError, match=r"unexpected: model\.layers\.0\.self_attn\.q_norm\.weight"):
        filled(Llama(cfg), Checkpoint([tmp_path / "model.safetensors"]))


def test_the_hubs_config_files_name_no_more_than_they_decide(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 960, "num_attention_heads": 15}))
    assert Llama.hub_fields(json.loads((tmp_path / "config.json").read_text()))["lm_n_kv_heads"] == 15
