"""Gemma's kinds of tokens and turns, in small: what follows the vocabulary, and what ends an answer."""

from __future__ import annotations

import json

import pytest
import torch

from nanovlm import VisionLanguageModel, get_tokenizer
from nanovlm.errors import TokenizerError
from tests.model.test_gemma3 import drawn, tiny

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
WORDS = ["user", "model", "hello", "there", "what", "is", "this", "a", "cat", "\n"]
ROWS = len(SPECIAL) + len(WORDS)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}"
    "\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture
def gemma_tokenizer_folder(tmp_path):
    """A tokenizer as Gemma's repositories have it: one added token more than the model of text has rows."""
    import tokenizers

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    backend.add_special_tokens([*SPECIAL, "<image_soft_token>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    assert backend.token_to_id("<image_soft_token>") == ROWS
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    soft = {str(ROWS): {"content": "<image_soft_token>", "special": True}}
    config = {**named, "chat_template": TURNS, "added_tokens_decoder": soft}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(tmp_path)


def gemma_config(folder, **changes):
    return tiny(lm_tokenizer=folder, lm_base_vocab_size=ROWS, **changes)


def test_extra_tokens_follow_the_models_rows_and_the_soft_token_is_left_out(gemma_tokenizer_folder):
    tokenizer = get_tokenizer(gemma_config(gemma_tokenizer_folder))
    assert tokenizer.image_token_id == ROWS
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") is None
    assert len(tokenizer) == ROWS + 66
    as_written = get_tokenizer(gemma_tokenizer_folder)
    assert as_written.convert_tokens_to_ids("<image_soft_token>") == ROWS


def test_a_vocabulary_of_another_size_is_refused_with_both_numbers(gemma_tokenizer_folder):
    cfg = gemma_config(gemma_tokenizer_folder).replace(lm_base_vocab_size=ROWS + 7)
    with pytest.raises(TokenizerError, match=f"{ROWS + 1} .*{ROWS + 7}"):
        get_tokenizer(cfg)


def test_without_a_template_of_the_config_the_tokenizers_own_is_used(gemma_tokenizer_folder):
    cfg = gemma_config(gemma_tokenizer_folder)
    assert cfg.lm_chat_template == ""
    tokenizer = get_tokenizer(cfg)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " a cat "}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\na cat<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1  # the template wrote it; the post-processor must not again


def test_the_end_of_a_turn_ends_an_answer_and_is_what_a_loss_counts_last(gemma_tokenizer_folder):
    tokenizer = get_tokenizer(gemma_config(gemma_tokenizer_folder))
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert tokenizer.eos_token_id == 1
    assert tokenizer.end_token_ids == (1, turn)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, counts in zip(made["input_ids"], made["assistant_masks"], strict=True) if counts]
    assert learned[-1] == turn


@pytest.mark.parametrize("token", ["<eos>", "<end_of_turn>"])
def test_generation_stops_at_either_end(gemma_tokenizer_folder, token):
    model = drawn(VisionLanguageModel(gemma_config(gemma_tokenizer_folder, lm_tie_weights=False), False))
    wanted = model.tokenizer.convert_tokens_to_ids(token)
    ids = torch.tensor([model.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])])
    with torch.no_grad():
        hidden = model.decoder(model.decoder.embed(ids), torch.arange(ids.shape[1])[None])[0, -1]
        model.decoder.head.weight[wanted] = 10 * hidden / hidden.norm()  # the likeliest, whatever was drawn
    assert model.generate(ids, None, max_new_tokens=5, greedy=True).tolist() == [[wanted]]


def test_a_row_that_ended_its_turn_is_filled_with_the_end_token():
    model = drawn(VisionLanguageModel(tiny(lm_tie_weights=False), load_backbone=False))
    ids = torch.randint(3, 259, (2, 6))
    first, second = model.generate(ids, None, max_new_tokens=6, greedy=True, eos_token_id=0).tolist()
    turn = next(token for token in first if token not in second)
    kept = first.index(turn) + 1
    assert kept < 6, "the seed must leave something to fill"
    new = model.generate(ids, None, max_new_tokens=6, greedy=True, eos_token_id=(0, turn))
    assert new.tolist() == [first[:kept] + [0] * (6 - kept), second]
