"""Which tokens a loss counts, against the template's own rendering, token by token.

The oracle knows nothing of marks: what an assistant says is what the template writes after a conversation that
ends with the generation prompt, up to and with the token that ends a turn.
"""

from __future__ import annotations

import jinja2
import pytest

from nanovlm import get_tokenizer
from nanovlm.config import CHATML
from nanovlm.prompts import conversation
from tests.data.helpers import parts, row
from tests.model.idefics3 import ROLES

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role'])"
    " + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# name -> (template, the tokens of it that are special, what ends a turn)
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>", "<bos>"], "<end_of_turn>"),
    "granite": (ROLES, ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"], "<|end_of_text|>"),
}
TURNS = {
    "one": [("what?", "a cat")],
    "three": [("what?", "a cat"), ("where?", "on the mat,\nasleep"), ("sure?", "yes")],
    "twice the same": [("a", "a"), ("a", "a")],
    "the question's words": [("say model assistant", "model"), ("assistant", "assistant\n")],
    "spaces": [(" q ", "  two before, one after "), ("q", "\n")],
    "specials in words": [
        ("<|im_end|> <end_of_turn>", "<|im_end|><end_of_turn><|end_of_text|>"),
        ("q", "<|im_start|>x"),
    ],
    "other letters": [("çé?", "日本 🙂"), ("и", "ж")],
}


def tokenizer_of(name: str):
    template, specials, _ = TEMPLATES[name]
    extra = {f"special_{number}": token for number, token in enumerate(specials)}
    tokens = {"image_token": "<|image|>", "global_image_token": "<|global_image|>", **extra}
    made = get_tokenizer("byte", tokens, template)
    if "<bos>" in specials:
        made.bos_token = "<bos>"
    return made


def expected(name: str, tokenizer, turns) -> tuple[list[int], list[bool]]:
    """Ids of the rendered text and which of them are the assistant's, piece after piece of it."""
    template, specials, closing = TEMPLATES[name]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    shown = environment.from_string(template)

    def render(messages, prompt=False):
        return shown.render(messages=messages, add_generation_prompt=prompt, bos_token="<bos>")

    def words(text):  # specials in words are spelled in letters
        return tokenizer._words.encode(text, add_special_tokens=False).ids

    def spelled(text, said):
        """Ids of text whose specials outside ``said`` are meant."""
        ids = []
        while text:
            start = next((part for part in sorted(said, key=len, reverse=True) if part and text.startswith(part)), None)
            token = next((token for token in specials if text.startswith(token)), None)
            if start is not None:
                ids, text = ids + words(start), text[len(start) :]
            elif token is not None:
                ids, text = ids + [tokenizer.convert_tokens_to_ids(token)], text[len(token) :]
            else:
                ids, text = ids + words(text[0]), text[1:]
        return ids

    ids, counts, messages, before = [], [], [], ""
    for user, assistant in turns:
        asked = [*messages, {"role": "user", "content": user}]
        prefix = render(asked, True)
        messages = [*asked, {"role": "assistant", "content": assistant}]
        after = render(messages)
        assert after.startswith(prefix) and prefix.startswith(before)
        answer = after[len(prefix) :]
        inner = assistant.strip() if name == "gemma" else assistant
        assert answer.startswith(inner + closing)
        for text, learned, said in (
            (prefix[len(before) :], False, [user.strip() if name == "gemma" else user]),
            (inner, True, [inner]),
            (closing, True, []),
            (answer[len(inner + closing) :], False, []),
        ):
            new = spelled(text, said)
            ids += new
            counts += [learned] * len(new)
        before = after
    return ids, counts


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", TURNS)
def test_exactly_the_assistants_words_are_learned(name, case):
    tokenizer = tokenizer_of(name)
    ids, counts = conversation(tokenizer, TURNS[case])
    want_ids, want_counts = expected(name, tokenizer, TURNS[case])
    assert ids == want_ids
    assert counts == want_counts


@pytest.mark.parametrize("name", ["tiny_original_small", "v0.2"])
def test_without_a_template_an_answer_follows_its_question_and_ends(name):
    changes = {} if name != "v0.2" else {"lm_chat_template": ""}
    if name == "v0.2":
        tokenizer = get_tokenizer("byte", {"image_token": "<|image|>"})
    else:
        tokenizer = parts(name, **changes)[1]
    ids, counts = conversation(tokenizer, [("a?", "b"), ("<|im_end|>?", "d")])
    assert tokenizer.decode(ids) == "Question: a? Answer:b<|im_end|>Question: <|im_end|>? Answer:d<|im_end|>"
    said = [i for i, learned in zip(ids, counts, strict=True) if learned]
    assert tokenizer.decode(said) == "b<|im_end|>d<|im_end|>"
    assert ids.count(tokenizer.eos_token_id) == 2, "an end token in a question's words stays words"


def test_markup_of_documents_is_meant_in_answers_and_words_in_questions():
    tokenizer = get_tokenizer(
        "byte", {"image_token": "<image>", "fake_image_token": "<fake>", "global_image_token": "<global-img>"}, CHATML
    )
    tokenizer.backend.add_special_tokens(["<doctag>", "</doctag>", "<row_6_col_6>", "<|other|>"])
    assert tokenizer.markup == ["<doctag>", "</doctag>"]
    ids, counts = conversation(tokenizer, [("<doctag>?", "<doctag>x</doctag><image><|im_end|>")])
    tag, picture, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<doctag>", "<image>", "<|im_end|>"))
    assert ids.count(tag) == 1 and counts[ids.index(tag)], "in the question it is words"
    assert picture not in ids
    assert ids.count(end) == 2, "the turn of the user and that of the assistant"


def test_labels_are_shifted_once():
    from tests.data.helpers import encoder

    sample = encoder()(row("cat", "dog"), "x")
    ids, labels = sample["input_ids"], sample["labels"]
    places = (labels != -100).nonzero()[:, 0]
    assert (labels[places] == ids[places + 1]).all() and labels[-1] == -100
    assert encoder().tokenizer.decode(labels[places]) == "cat<|im_end|>dog<|im_end|>"
