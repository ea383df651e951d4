"""Weight files: saving and loading is identity, damage is named, and nothing half-loaded comes back."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nanovlm import VisionLanguageModel, VLMConfig, preset
from nanovlm.checkpoint import Checkpoint, write_tensors, write_text
from nanovlm.errors import ConfigError, SourceNotFound, WeightsError
from nanovlm.weights import CONCAT, Rule, load, to_hub
from tests.model.helpers import prompt, tiles, tiny_config, tiny_model

GENERATIONS = ["v0.1", "v0.2", "main"]


def saved(tmp_path, model=None):
    (model or tiny_model()).save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


def rewrite(path, change):
    """Change the header of a safetensors file with ``change(header)``, which may return raw bytes instead."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    new = change(header)
    new = new if isinstance(new, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_saving_then_loading_is_identity(tmp_path, generation, tied):
    model = tiny_model(generation, lm_tie_weights=tied)
    model.save_pretrained(tmp_path)
    again = VisionLanguageModel.from_pretrained(tmp_path).eval()
    assert again.cfg == model.cfg
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert (again.decoder.head.weight is again.decoder.token_embedding.weight) == tied
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert all(parameter.requires_grad for parameter in again.parameters())
    ids, pixels = torch.tensor([prompt(model.cfg, 6, 1)]), tiles(model.cfg, 1)
    assert torch.equal(model(ids, pixels)[0], again(ids, pixels)[0])


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 99),
    blocks=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    shuffle=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
)
def test_any_model_comes_back_as_it_was_saved(tmp_path_factory, seed, blocks, heads, shuffle, tied):
    folder = tmp_path_factory.mktemp("any")
    cfg = preset(
        "tiny", lm_n_blocks=blocks, lm_n_kv_heads=heads, mp_pixel_shuffle_factor=shuffle, lm_tie_weights=tied
    )
    torch.manual_seed(seed)
    model = VisionLanguageModel(cfg)
    model.save_pretrained(folder)
    again = VisionLanguageModel.from_pretrained(folder)
    assert again.cfg == cfg
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_tied_model_stays_tied_when_it_is_trained_after_loading(tmp_path):
    saved(tmp_path)
    model = VisionLanguageModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.decoder.head.weight.add_(1)
    assert torch.equal(model.decoder.head.weight, model.decoder.token_embedding.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_file_of_any_precision_loads_in_the_precision_asked_for(tmp_path, dtype):
    path = saved(tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"decoder.token_embedding.weight": "decoder.head.weight"})
    model = VisionLanguageModel.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.MP.proj.weight, tensors["MP.proj.weight"].float())
    half = VisionLanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.decoder.rotary_embd.inv_freq.dtype == torch.float32


def test_rotary_frequencies_come_from_the_file_or_are_computed(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    changed = tensors["decoder.rotary_embd.inv_freq"] * 0.5
    save_file({**tensors, "decoder.rotary_embd.inv_freq": changed}, path)
    assert torch.equal(VisionLanguageModel.from_pretrained(tmp_path).decoder.rotary_embd.inv_freq, changed)
    save_file({name: tensor for name, tensor in tensors.items() if "inv_freq" not in name}, path)
    computed = VisionLanguageModel.from_pretrained(tmp_path).decoder.rotary_embd.inv_freq
    assert torch.equal(computed, tensors["decoder.rotary_embd.inv_freq"]) and not computed.is_meta


def test_both_names_of_a_tied_tensor_may_be_in_the_file_if_they_agree(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    twin = tensors["decoder.head.weight"].clone()
    save_file({**tensors, "decoder.token_embedding.weight": twin}, path)
    assert torch.equal(VisionLanguageModel.from_pretrained(tmp_path).decoder.head.weight, twin)
    save_file({**tensors, "decoder.token_embedding.weight": twin + 1}, path)
    with pytest.raises(WeightsError, match="differ, but lm_tie_weights=True"):
        VisionLanguageModel.from_pretrained(tmp_path)


def test_an_untied_config_over_a_tied_file_names_the_field(tmp_path):
    saved(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "lm_tie_weights": False}))
    with pytest.raises(WeightsError, match="missing: decoder.token_embedding.weight.*lm_tie_weights=True"):
        VisionLanguageModel.from_pretrained(tmp_path)


def test_shards_with_an_index_load_as_one_file(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()
    model = VisionLanguageModel.from_pretrained(tmp_path)
    assert torch.equal(model.decoder.norm.weight, tensors["decoder.norm.weight"])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceNotFound, match="names the shard model-00002-of-00002.safetensors"):
        VisionLanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/elsewhere/model.safetensors", "model.bin", "a/model.safetensors"]
)
def test_an_index_may_not_leave_its_folder(tmp_path, name):
    saved(tmp_path).unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"MP.proj.weight": name}})
    )
    with pytest.raises(WeightsError, match="in the same folder"):
        VisionLanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "not json"]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    saved(tmp_path).unlink()
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match="index.json"):
        VisionLanguageModel.from_pretrained(tmp_path)


PROJ = "MP.proj.weight"


def lie(**claim):
    def change(header):
        header[PROJ].update(claim)

    return change


def overlap(header):
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    header[names[1]]["shape"] = header[names[0]]["shape"]


def twice(header):
    text = json.dumps(header)
    return (text[:-1] + f', "{PROJ}": ' + json.dumps(header[PROJ]) + "}").encode()


HEADERS = {
    "claims": lie(shape=[10**9, 10**9]),
    "malformed": lie(shape=[-1, 5]),
    "has dtype F8_E4M3": lie(dtype="F8_E4M3"),
    "appears twice": twice,
    "overlaps": overlap,
    "is no JSON": lambda header: b"{nothing",
    "expected an object": lambda header: b"[]",
    "the header describes": lambda header: b"{}",
    "__metadata__": lambda header: header.update(__metadata__={"a": 1}),
}


@pytest.mark.parametrize("message", HEADERS)
def test_a_damaged_header_is_named_before_memory_is_taken(tmp_path, message):
    rewrite(saved(tmp_path), HEADERS[message])
    with pytest.raises(WeightsError) as caught:
        VisionLanguageModel.from_pretrained(tmp_path)
    assert message in str(caught.value) and "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 8, 200, -1])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, size):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match="truncated|cut off"):
        VisionLanguageModel.from_pretrained(tmp_path)


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    path = saved(tmp_path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])
    with pytest.raises(WeightsError, match="header of"):
        VisionLanguageModel.from_pretrained(tmp_path)


def test_weights_of_another_shape_name_both(tmp_path):
    saved(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "lm_inter_dim": 96}))
    with pytest.raises(WeightsError, match=r"gate_proj.weight: \(128, 64\) in the file, \(96, 64\) here"):
        VisionLanguageModel.from_pretrained(tmp_path)


def spoil(name, tensor):
    """A change to a file's tensors by which the one called ``name`` does not fit any more."""
    return lambda tensors: tensors.update({name: tensor})


TABLE, QKV = "embeddings.position_embedding.weight", "encoder.layers.1.self_attn.k_proj.weight"
MISFITS = {
    "a position table of 15 rows is no square": spoil(TABLE, torch.ones(15, 32)),
    r"position_embedding: \(16, 31\) in the file": spoil(TABLE, torch.ones(16, 31)),
    r"qkv_proj.weight: \(32, 32\) \+ \(32, 16\) \+ \(32, 32\) in the file": spoil(QKV, torch.ones(32, 16)),
    r"qkv_proj.weight: \(32, 32\) \+ \(16, 32\) \+ \(32, 32\) in the file": spoil(QKV, torch.ones(16, 32)),
    "torch.int8 in the file, torch.float32 here": spoil("post_layernorm.bias", torch.ones(32, dtype=torch.int8)),
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_tensor_that_does_not_fit_is_found_before_the_first_is_filled(tmp_path, message):
    """Through joins, too, whose result is known once they ran: they run without memory first."""
    model = tiny_model().vision_encoder
    tensors = {name: tensor.clone() for name, tensor in to_hub(model, model.RULES).items()}
    MISFITS[message](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    kept = {name: tensor.clone() for name, tensor in tiny_model(seed=1).vision_encoder.state_dict().items()}
    other = tiny_model(seed=1).vision_encoder
    with pytest.raises(WeightsError, match=message):
        load(other, Checkpoint([tmp_path / "model.safetensors"]), model.RULES, ignored=model.IGNORED)
    assert all(torch.equal(kept[name], tensor) for name, tensor in other.state_dict().items())


def test_tied_tensors_that_differ_are_found_before_the_first_is_filled(tmp_path):
    path = saved(tmp_path, tiny_model(lm_tie_weights=False))
    model = tiny_model(seed=1)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match="differ, but lm_tie_weights=True"):
        load(model, Checkpoint([path]))
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    del tensors["MP.proj.weight"]
    save_file({**tensors, "MP.norm.weight": torch.ones(3)}, path)
    with pytest.raises(WeightsError, match=r"missing: MP\.proj\.weight; unexpected: MP\.norm\.weight"):
        VisionLanguageModel.from_pretrained(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    saved(tmp_path).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin, a pickle.*safetensors"):
        VisionLanguageModel.from_pretrained(tmp_path)


def test_a_folder_without_a_config_or_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(SourceNotFound, match="config.json"):
        VisionLanguageModel.from_pretrained(tmp_path)
    with pytest.raises(SourceNotFound, match="no folder"):
        VisionLanguageModel.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SourceNotFound, match="is a file; give the folder"):
        VisionLanguageModel.from_pretrained(file)


@pytest.mark.parametrize("content", ["", "[1]", '{"lm_hidden_dim": 64}', "\x00", "[" * 100_000])
def test_a_config_json_that_is_none_is_refused(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ConfigError, WeightsError)):
        VisionLanguageModel.from_pretrained(tmp_path)


def test_a_file_with_fields_of_the_future_loads_and_says_what_it_ignored(tmp_path, caplog):
    saved(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "lm_thoughts": 12}))
    assert VisionLanguageModel.from_pretrained(tmp_path).cfg == tiny_config()
    assert "lm_thoughts" in caplog.text


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {})
    with pytest.raises(Exception, match="(?i)memory|shar"):
        shared = torch.zeros(4)
        write_tensors(path, {"a": shared, "b": shared[:2]}, {})
    assert torch.equal(load_file(path)["a"], torch.ones(2)) and os.listdir(tmp_path) == ["model.safetensors"]


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    write_text(tmp_path / "one", "1")
    (tmp_path / "two").write_text("2")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "two").stat().st_mode


def test_reading_gives_every_dtype_and_shape_back(tmp_path):
    tensors = {
        "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "bool": torch.tensor([True, False]),
        "half": torch.randn(3).half(), "brain": torch.randn(2, 2).bfloat16(), "whole": torch.arange(5),
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors, {"note": "hello"})
    stored = Checkpoint([tmp_path / "x.safetensors"])
    assert stored.metadata == {"note": "hello"}
    for name, tensor in tensors.items():
        assert torch.equal(stored.read(name), tensor) and stored.read(name).dtype == tensor.dtype


def test_one_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", {"w": torch.ones(1)}, {})
    with pytest.raises(WeightsError, match="w is in two files"):
        Checkpoint([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_a_joined_tensor_is_split_again_when_written(tmp_path):
    module = torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 6, bias=False)})
    rules = [Rule(("q.weight", "k.weight", "v.weight"), "qkv.weight", CONCAT)]
    out = to_hub(module, rules)
    assert [tuple(out[f"{x}.weight"].shape) for x in "qkv"] == [(2, 4)] * 3
    write_tensors(tmp_path / "x.safetensors", out, {})
    again = torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 6, bias=False)})
    report = load(again, Checkpoint([tmp_path / "x.safetensors"]), rules)
    assert torch.equal(again["qkv"].weight, module["qkv"].weight) and report.loaded == ["qkv.weight"]


def test_a_config_saved_by_any_generation_loads_there(tmp_path):
    for generation in GENERATIONS:
        folder = tmp_path / generation
        tiny_model(generation).save_pretrained(folder)
        cfg, ignored = VLMConfig.from_json_dict(json.loads((folder / "config.json").read_text()))
        assert (cfg.generation, ignored) == (generation, ())
