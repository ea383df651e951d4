"""The Hub's stand-in: the real client finds small files where it looks, the same ones on every machine."""

from __future__ import annotations

import json

import pytest

from compat.child import hub

pytest.importorskip("huggingface_hub")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path


def fetched(home, name, file):
    from huggingface_hub import hf_hub_download

    return hf_hub_download(name, file, cache_dir=home / "hub", local_files_only=True)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_the_real_client_finds_each_file(home, file):
    hub.add_repository("somebody/some-model", "language")
    with open(fetched(home, "somebody/some-model", file), "rb") as stream:
        assert len(stream.read()) > 100


def test_what_nobody_asked_for_is_not_there(home):
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub.add_repository("somebody/words", "tokenizer")
    for name, file in (("somebody/words", "model.safetensors"), ("somebody/other", "config.json")):
        with pytest.raises(LocalEntryNotFoundError):
            fetched(home, name, file)


def test_a_repository_is_written_once(home):
    first = hub.add_repository("a/b", "tokenizer")
    with open(f"{first}/config.json", "w") as stream:
        stream.write("{}")
    assert hub.add_repository("a/b", "language") == first
    with open(f"{first}/config.json") as stream:
        assert stream.read() == "{}"


@pytest.mark.parametrize("role", ["vision", "language"])
def test_weights_have_the_shapes_and_are_the_same_everywhere(home, role, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    first = load_file(fetched_weights(home, "a/b", role))
    shapes = hub.vision_shapes() if role == "vision" else hub.language_shapes()
    assert {key: tuple(tensor.shape) for key, tensor in first.items()} == shapes
    monkeypatch.setenv("HF_HOME", str(tmp_path / "second"))
    again, other = (load_file(fetched_weights(tmp_path / "second", name, role)) for name in ("a/b", "a/c"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    values = [tensor for tensor in first.values() if tensor.numel() > 8]
    assert len({tuple(tensor.flatten()[:4].tolist()) for tensor in values}) == len(values)  # no two alike


def fetched_weights(home, name, role):
    hub.add_repository(name, role)
    return fetched(home, name, "model.safetensors")


def test_config_and_weights_agree(home):
    hub.add_repository("a/lm", "language")
    with open(fetched(home, "a/lm", "config.json")) as stream:
        config = json.load(stream)
    shapes = hub.language_shapes()
    assert shapes["model.embed_tokens.weight"] == (config["vocab_size"], config["hidden_size"])
    assert sum(key.endswith("q_proj.weight") for key in shapes) == config["num_hidden_layers"]
    kv = config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (kv, config["hidden_size"])
    vision = hub.vision_config()["vision_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    assert hub.vision_shapes()["vision_model.embeddings.position_embedding.weight"] == (
        patches,
        vision["hidden_size"],
    )


def test_the_tokenizer_takes_any_text_apart_and_together():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(hub.tokenizer_files()["tokenizer.json"]))
    assert tokenizer.get_vocab_size() == hub.BASE_VOCABULARY
    for text in ("Hello", "größe 日本語 🙂", "\n\n12 \t x", " a  b ", "".join(map(chr, range(32, 127)))):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text and all(len(hub.SPECIAL) <= i < hub.BASE_VOCABULARY for i in ids)
    marked = tokenizer.encode("<|im_start|>user<|im_end|>").ids
    assert (marked[0], marked[-1]) == (1, 2) and min(marked[1:-1]) >= len(hub.SPECIAL)
    assert len(tokenizer.encode("the cat and the hat").ids) < 13  # merges do happen
    assert len(tokenizer.encode("2024").ids) == 4  # a digit a token


def test_a_tokenizer_of_the_target_s_own_is_not_compared_with_the_file():
    tokenizers = pytest.importorskip("tokenizers")
    from compat.child.readings import same_vocabulary

    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode()

    class Drifting:  # the file's vocabulary, taken apart otherwise
        def encode(self, text):
            return reference.encode(text + " ").ids

        def decode(self, ids):
            return reference.decode(ids)

    reference = tokenizers.Tokenizer.from_str(json.dumps(hub.tokenizer_files()["tokenizer.json"]))
    texts = ["the cat", "x   42"]
    assert [same_vocabulary(kind(), reference, texts) for kind in (Bytes, Drifting)] == [False, True]


def test_the_vocabulary_is_one_to_one():
    files = hub.tokenizer_files()
    vocabulary = files["vocab.json"]
    assert (
        sorted(vocabulary.values()) == list(range(hub.BASE_VOCABULARY))
        and files["tokenizer.json"]["model"]["vocab"] == vocabulary
    )
    assert sorted(map(ord, hub.byte_symbols()))[-1] < 512 and len(set(hub.byte_symbols())) == 256


@pytest.mark.slow  # for the import of transformers
def test_transformers_reads_the_configs(home):
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    hub.add_repository("a/lm", "language")
    hub.add_repository("a/vit", "vision")
    language = AutoConfig.from_pretrained("a/lm", cache_dir=home / "hub", local_files_only=True)
    vision = AutoConfig.from_pretrained("a/vit", cache_dir=home / "hub", local_files_only=True)
    assert (language.model_type, language.hidden_size) == ("llama", hub.LANGUAGE["hidden_size"])
    assert (vision.model_type, vision.vision_config.patch_size) == ("siglip", hub.VISION["patch_size"])
