"""The tokenizer: ids are tokenizer.json's, special tokens are attributes, and words stay words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nanovlm import get_tokenizer, preset
from nanovlm.errors import PromptError, SourceNotFound, TokenizerError, WeightsError

SHARED = Path(__file__).parents[3] / "shared"  # beside a developer's checkout; the facts below stand alone
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Runs of white space that SmolLM2's merges join, and the texts on which losing its digit rule shows: with the
# rule a run keeps together before a digit, without it the last space of a run stands alone.
MERGES = ["Ċ Ċ", "Ġ Ġ", "ĠĠ Ġ", "ĉ ĉ", "Ġ Ċ", "t h", "th e", "Ġ the"]
DRIFT = {
    "\n\n12": ["ĊĊ", "1", "2"],
    "  5": ["ĠĠ", "5"],
    "a \n1": ["a", "ĠĊ", "1"],
    "x   42": ["x", "ĠĠĠ", "4", "2"],
    "\t\t7": ["ĉĉ", "7"],
    "\n9": ["Ċ", "9"],
    "(2)": ["(", "2", ")"],
    "o.  2": ["o", ".", "ĠĠ", "2"],
    " the  the": ["Ġthe", "Ġ", "Ġthe"],
}


def small_backend():
    """SmolLM2's kind of tokenizer in small: digits apart, then byte-level BPE."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    for merge in MERGES:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(merge.split()) for merge in MERGES])
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend


@pytest.fixture
def folder(tmp_path):
    """A tokenizer's files as the Hub has them."""
    small_backend().save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "unk_token": "<|endoftext|>",
        "pad_token": None,
        "tokenizer_class": "GPT2Tokenizer",
        "chat_template": "{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def byte():
    cfg = preset("tiny")
    return get_tokenizer("byte", cfg.vlm_extra_tokens, cfg.lm_chat_template)


@pytest.mark.parametrize("text", DRIFT)
def test_white_space_before_a_digit_keeps_together(folder, text):
    tokenizer = get_tokenizer(str(folder))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == DRIFT[text]


def test_losing_the_digit_rule_would_show_in_these_texts(folder):
    """The cases can fail: without the rule most of them come out otherwise."""
    drifted = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    drifted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert sum(drifted.encode(text).tokens != tokens for text, tokens in DRIFT.items()) >= 5


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.sampled_from(list(" \n\tathe019.()é🙂<|>")), max_size=20))
def test_ids_are_those_of_tokenizer_json_and_decode_to_the_text(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "small"
    if not folder.exists():
        folder.mkdir()
        small_backend().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = get_tokenizer(str(folder))
    ids = tokenizer.encode(text)
    assert ids == tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(ids) == text


def test_the_published_tokenizer_gives_its_published_ids():
    """Where SmolLM2's files are at hand; the facts above hold without them."""
    name = SHARED / "hub" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    cases = {}
    if name.is_dir():
        drift = json.loads((SHARED / "tokenizers" / "digits_drift_cases.json").read_text())
        cases = {case["text"]: case["tokenizer_json"] for case in drift}
        cases |= json.loads((SHARED / "tokenizers" / "smollm2_reference_encodings.json").read_text())
        tokenizer = get_tokenizer(
            str(name), preset("default").vlm_extra_tokens, preset("default").lm_chat_template
        )
        assert (len(tokenizer), tokenizer.image_token_id, tokenizer.eos_token_id) == (49218, 49152, 2)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Rows:\n\n12"}], add_generation_prompt=True
        )
        assert chat == tokenizer.encode("<|im_start|>user\nRows:\n\n12<|im_end|>\n<|im_start|>assistant\n")
    assert {text: tokenizer.encode(text) for text in cases} == cases
    assert preset("default").image_token_id == 49152


# -- special tokens -------------------------------------------------------------------------------------


def test_extra_tokens_are_attributes_with_ids_behind_the_vocabulary(folder):
    tokenizer = get_tokenizer(str(folder), {"image_token": "<|image|>", "r1c1": "<row_1_col_1>"})
    size = len(small_backend().get_vocab())
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<|image|>", size)
    assert (tokenizer.r1c1, tokenizer.r1c1_id, len(tokenizer)) == ("<row_1_col_1>", size + 1, size + 2)
    assert not hasattr(tokenizer, "global_image_token")
    assert tokenizer.encode("a<|image|>b") == [*tokenizer.encode("a"), size, *tokenizer.encode("b")]


def test_padding_is_the_end_token_as_upstream_sets_it(folder):
    tokenizer = get_tokenizer(str(folder))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert (tokenizer.bos_token_id, tokenizer.unk_token_id) == (1, 0)
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    with pytest.raises(TokenizerError, match="not in the vocabulary"):
        tokenizer.eos_token = "<nothing>"


def test_decoding_can_leave_special_tokens_out(byte):
    ids = byte.encode("<|im_start|>hi<|im_end|>")
    assert byte.decode(ids) == "<|im_start|>hi<|im_end|>"
    assert byte.batch_decode([ids, ids[:2]], skip_special_tokens=True) == ["hi", "h"]
    assert byte.decode(torch.tensor(ids), skip_special_tokens=True) == "hi"


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_byte_tokenizer_gives_a_token_a_byte_and_the_text_back(text):
    tokenizer = get_tokenizer("byte")
    ids = tokenizer.encode(text)
    if not any(special in text for special in SPECIAL):
        assert ids == [3 + value for value in text.encode()]
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_of_a_config_fits_its_embedding():
    for name in ("tiny", "tiny_original_small"):
        cfg = preset(name)
        tokenizer = get_tokenizer(cfg)
        assert len(tokenizer) == cfg.lm_vocab_size
        assert getattr(tokenizer, "image_token_id", None) == cfg.image_token_id


def test_a_tokenizer_of_another_size_than_the_config_says_is_refused():
    with pytest.raises(
        TokenizerError, match="259 tokens itself, so its image token is 259; the model's is 300"
    ):
        get_tokenizer(preset("tiny", lm_base_vocab_size=300))
    with pytest.raises(TokenizerError, match="259 tokens, more than lm_vocab_size=200"):
        get_tokenizer(preset("tiny_original_small", lm_base_vocab_size=200))


# -- files ----------------------------------------------------------------------------------------------


def test_a_separate_template_file_comes_before_the_config_and_the_argument_before_both(folder):
    messages = [{"role": "user", "content": "x"}]
    assert get_tokenizer(str(folder)).apply_chat_template(messages, tokenize=False) == "x"
    (folder / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert get_tokenizer(str(folder)).apply_chat_template(messages, tokenize=False) == "file: x"
    given_template = get_tokenizer(str(folder), chat_template="given")
    assert given_template.apply_chat_template(messages, tokenize=False) == "given"


def test_tokens_only_the_config_file_knows_are_added_at_their_ids(folder):
    size = len(small_backend().get_vocab())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(size): {"content": "<late>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert get_tokenizer(str(folder)).encode("<late>") == [size]
    config["added_tokens_decoder"] = {str(size + 7): {"content": "<late>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        TokenizerError, match=f"is {size + 7} in tokenizer_config.json, {size} in tokenizer.json"
    ):
        get_tokenizer(str(folder))


def test_truncation_written_into_tokenizer_json_does_not_cut_prompts(folder):
    backend = small_backend()
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    assert len(get_tokenizer(str(folder)).encode("abcdefgh")) == 8


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_json_is_refused_by_its_path(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        get_tokenizer(str(folder))


def test_a_folder_without_a_tokenizer_or_an_end_token_is_named(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="names no eos_token"):
        get_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(WeightsError, match="expected an object"):
        get_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceNotFound, match="has no tokenizer.json"):
        get_tokenizer(str(folder))


def test_without_a_chat_template_a_conversation_is_refused(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(PromptError, match="no chat template"):
        get_tokenizer(str(folder)).apply_chat_template([{"role": "user", "content": "x"}])
