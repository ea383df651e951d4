"""Prompts: image strings, chat templates in a sandbox, words that look special, what a loss counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm import get_tokenizer
from nanovlm.config import CHATML
from nanovlm.errors import ImageTokenMismatch, PromptError
from nanovlm.prompts import Trusted, get_image_string, image_string, question
from nanovlm.templates import render
from tests.model.helpers import tiny_config

GEMMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)


def tokenizer_of(generation="main", template=CHATML):
    cfg = tiny_config(generation)
    return get_tokenizer("byte", cfg.vlm_extra_tokens, template)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


# -- image strings --------------------------------------------------------------------------------------


def test_one_tile_is_its_global_view():
    assert image_string(tokenizer_of(), [(1, 1)], 2) == "<|global_image|><|image|><|image|>"


def test_tiles_follow_the_global_view_in_reading_order():
    want = "<|global_image|>III<row_1_col_1>III<row_1_col_2>III<row_2_col_1>III<row_2_col_2>III"
    assert image_string(tokenizer_of(), [(2, 2)], 3) == want.replace("I", "<|image|>")


def test_several_pictures_are_numbered():
    want = "<image: 0><|global_image|><|image|><image: 1><|global_image|><|image|>"
    assert image_string(tokenizer_of(), [(1, 1), (1, 1)], 1) == want


def test_without_a_global_token_every_tile_is_announced():
    tokenizer = get_tokenizer("byte", {"image_token": "<I>", "r1c1": "<11>", "r1c2": "<12>"})
    assert image_string(tokenizer, [(1, 2)], 1) == "<11><I><12><I>"
    assert image_string(tokenizer, [(1, 1)], 1) == "<11><I>"


def test_a_single_square_picture_is_not_announced():
    assert image_string(tokenizer_of("v0.2"), [(1, 1)], 3) == "<|image|>" * 3


def test_features_in_front_of_the_text_need_no_string():
    assert image_string(tokenizer_of("v0.1"), [(1, 1)], 3) == ""


def test_a_grid_beyond_the_extra_tokens_is_refused():
    with pytest.raises(ImageTokenMismatch, match="grid of 1x9 tiles, but there is no extra token r1c9"):
        image_string(tokenizer_of(), [(1, 9)], 1)


def test_upstreams_names_give_the_same_text():
    tokenizer = tokenizer_of()
    ours = image_string(tokenizer, [(2, 1), (1, 1)], 4)
    assert get_image_string(tokenizer, splitted_image_counts=[(2, 1), (1, 1)], mp_image_token_length=4) == ours != ""


# -- words that look special ----------------------------------------------------------------------------


def test_a_conversation_has_the_ids_of_its_rendered_text():
    tokenizer = tokenizer_of()
    messages = [user(image_string(tokenizer, [(1, 2)], 4) + "What is this?"), said("a cat"), user("sure?")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>user\n<|global_image|><|image|>") and text.endswith(
        "<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == tokenizer.encode(text)


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a <|image|> b", "<|im_<|im_end|>end|>", "x<row_1_col_1>", "<|im_end|", "<"]
)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_special_token_in_somebodys_words_stays_words(text, role):
    tokenizer = tokenizer_of()
    ids = tokenizer.apply_chat_template([{"role": role, "content": text}])
    written = f"{role}\n"
    assert ids == [1, *(3 + b for b in written.encode()), *(3 + b for b in text.encode()), 2, 3 + ord("\n")]
    assert tokenizer.decode(ids) == f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_a_special_token_in_a_role_stays_words_too():
    tokenizer = tokenizer_of()
    assert tokenizer.apply_chat_template([{"role": "<|im_end|>", "content": ""}]).count(2) == 1


def test_text_before_and_after_an_image_string_is_not_trusted():
    tokenizer = tokenizer_of()
    pictures = image_string(tokenizer, [(1, 1)], 4)
    ids = tokenizer.apply_chat_template([user("<|image|>" + pictures + "<|image|>")])
    assert ids.count(tokenizer.image_token_id) == 4 and ids.count(tokenizer.global_image_token_id) == 1
    assert isinstance("a" + pictures + "b", Trusted)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|image|>", "<|im_", "end|>", "<", "|", "\n\n1", " ", "é", "\ufdd0"]),
        max_size=8,
    )
)
def test_no_words_ever_become_a_special_token(pieces):
    tokenizer = tokenizer_of()
    text = "".join(pieces)
    ids = tokenizer.apply_chat_template([user(text)])
    assert ids == [1, *(3 + b for b in b"user\n"), *(3 + b for b in text.encode()), 2, 3 + ord("\n")]


def test_words_between_marks_keep_their_context():
    """Breaking a token must not break the white space before a digit, or a merge, beside it."""
    from nanovlm.tokenizer import Tokenizer
    from tests.model.test_tokenizer import small_backend

    tokenizer = Tokenizer(small_backend(), {"eos_token": "<|im_end|>"}, {"image_token": "<|image|>"}, CHATML)
    ids = tokenizer.apply_chat_template([user("the  5 <|im_end|>\n\n12")])
    plain = small_backend()
    plain.encode_special_tokens = True
    assert ids == [1, *plain.encode("user\nthe  5 <|im_end|>\n\n12").ids, 2, *plain.encode("\n").ids]


@pytest.mark.parametrize("generation", ["v0.1", "v0.2"])
def test_older_generations_ask_in_their_own_words(generation):
    cfg = tiny_config(generation)
    tokenizer = get_tokenizer(cfg)
    ids = question(cfg, tokenizer, "a <|im_end|>?", [(1, 1)])
    text = "Question: a <|im_end|>? Answer:"
    slots = [] if generation == "v0.1" else [259] * cfg.mp_image_token_length
    assert ids == slots + [3 + b for b in text.encode()]


def test_a_question_of_main_goes_through_the_template():
    cfg = tiny_config()
    tokenizer = get_tokenizer(cfg)
    text = tokenizer.decode(question(cfg, tokenizer, "why?", [(1, 1)]))
    assert (
        text == f"<|im_start|>user\n<|global_image|>{'<|image|>' * 4}why?<|im_end|>\n<|im_start|>assistant\n"
    )


# -- several conversations, and what a loss counts ------------------------------------------------------


def test_a_list_of_conversations_gives_a_list_of_rows_as_upstream_calls_it():
    tokenizer = tokenizer_of()
    one, two = [user("a")], [user("bb")]
    rows = tokenizer.apply_chat_template([one, two], tokenize=True, add_generation_prompt=True)
    assert rows == [tokenizer.apply_chat_template(x, add_generation_prompt=True) for x in (one, two)]
    both = tokenizer.apply_chat_template([one, two], return_dict=True)
    assert both["attention_mask"] == [[1] * len(row) for row in both["input_ids"]]


def counted(tokenizer, messages):
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert len(out["assistant_masks"]) == len(out["input_ids"])
    runs, before = [], 0
    for token, counts in zip(out["input_ids"], out["assistant_masks"], strict=True):
        if counts:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = counts
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, GEMMA_LIKE])
def test_a_loss_counts_the_assistants_words_and_their_end(template):
    tokenizer = tokenizer_of(template=template)
    messages = [user("assistant: no"), said("A cat."), user("really?"), said("yes <|im_end|> é")]
    assert counted(tokenizer, messages) == ["A cat.<|im_end|>", "yes <|im_end|> é<|im_end|>"]


def test_a_template_that_trims_still_trims_and_the_loss_follows():
    tokenizer = tokenizer_of(template=GEMMA_LIKE)
    assert counted(tokenizer, [user(" q "), said("  a \n")]) == ["a<|im_end|>"]
    assert "<start>model\na<|im_end|>" in tokenizer.apply_chat_template([said("  a \n")], tokenize=False)


def test_white_space_that_the_template_keeps_around_an_answer_is_counted():
    tokenizer = tokenizer_of()
    assert (
        tokenizer.apply_chat_template([said("  a")], tokenize=False)
        == "<|im_start|>assistant\n  a<|im_end|>\n"
    )
    assert counted(tokenizer, [said("  a")]) == ["  a<|im_end|>"]


def test_an_empty_answer_counts_its_end_alone():
    assert counted(tokenizer_of(), [user("q"), said("")]) == ["<|im_end|>"]


def test_content_in_parts_is_rendered_and_counted():
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}"
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "hi <|im_end|>"}]}]
    assert counted(tokenizer_of(template=template), messages) == ["hi <|im_end|><|im_end|>"]


@pytest.mark.parametrize("messages", [["hello"], [{"content": "no role"}], [3]])
def test_a_message_that_is_none_is_refused(messages):
    with pytest.raises(PromptError, match="a message is a dict"):
        tokenizer_of().apply_chat_template(messages)


# -- the sandbox ----------------------------------------------------------------------------------------

ATTACKS = {
    "an endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop over text": "{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'x' * 10 ** 9 }}",
    "a long list": "{% set x = [1] * 100000000 %}",
    "a wide format": "{{ '%1000000000d' % 3 }}",
    "a wide format call": "{{ '{:1000000000}'.format(3) }}",
    "a wide padding": "{{ 'x'.ljust(1000000000) }}",
    "a large power": "{{ 9 ** 9 ** 9 }}",
    "doubled": "{% set n = namespace(s='xy') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "joined": "{% set n = namespace(s='xy') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "the interpreter": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a mutation": "{{ messages.append(1) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "bad syntax": "{% for %}",
    "an unknown name": "{{ messages[0].nothing.at.all }}",
    "replacing": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "the filter that replaces": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "joining with much": "{{ ('y' * 100000).join(['a'] * 100000) }}",
    "the filter that joins": "{{ (['a'] * 100000) | join('y' * 100000) }}",
    "wide tabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "a file": "{% include 'config.json' %}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_cannot_take_the_machine(attack):
    import time

    start = time.perf_counter()
    with pytest.raises(PromptError, match="chat template"):
        render(ATTACKS[attack], {"messages": [{"role": "user", "content": "x"}], "x": "y" * 3000})
    assert time.perf_counter() - start < 8


def test_a_template_can_refuse_a_conversation_in_its_own_words():
    with pytest.raises(PromptError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", {})


def test_what_real_templates_use_works():
    template = (
        "{%- for m in messages if m.role != 'system' -%}"
        "{%- if loop.first and not loop.last -%}[{{ loop.length }}]{%- endif -%}"
        "{{ m['content'].split('|')[-1].strip() | upper }}"
        "{%- if loop.index > 1 -%}{%- break -%}{%- endif -%}{%- endfor -%}"
        "{{ {'é': [1]} | tojson }}"
    )
    messages = [{"role": "system", "content": "s"}, user("a|b "), user("c"), user("d")]
    assert render(template, {"messages": messages}) == '[3]BC{"é": [1]}'
