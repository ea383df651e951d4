"""The VQA rule, letters, and options read out of a question."""

from __future__ import annotations

import pytest

from nanovlm.evaluate.questions import options_in
from nanovlm.evaluate.scoring import letter_of, normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("said", "answers", "worth"),
    [
        ("Red.", ["red"] * 10, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),  # of three who said so one is left out three times: 2/3, else 1
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("green", ["red"] + ["blue"] * 9, 0.0),
        ("the two dogs", ["2 dogs"], 1.0),
        ("two dogs", ["3 dogs"], 0.0),
        ("a", ["a", "b"], 0.5),
    ],
)
def test_an_open_answer_is_worth_what_the_vqa_rule_says(said, answers, worth):
    assert vqa_accuracy(said, answers) == pytest.approx(worth)


def test_nobody_to_compare_with_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        vqa_accuracy("red", [])


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The Red, ball!", "red ball"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("  none\nof them ", "0 of them"),
        ("", ""),
    ],
)
def test_answers_are_compared_without_case_articles_and_punctuation(text, same):
    assert normalised(text) == same


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("B", 1),
        ("(C) a hat", 2),
        (" A.", 0),
        ("The answer is D", 3),
        ("Answer: b", None),  # a small b is a word's, not an option's
        ("a cat", 0),
        ("E", None),
        ("Because", None),
        ("Apples are red", None),
        ("", None),
        ("hat", 2),
    ],
)
def test_a_generated_answer_chooses_by_its_letter_or_in_full(said, number):
    assert letter_of(said, ["cat", "dog", "a hat", "none of them"]) == number


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (
            "Which is right?\nOptions: A: The cat is red., B: It is on A, the mat, C: 3: 4, D: None",
            ("The cat is red", "It is on A, the mat", "3: 4", "None"),
        ),
        ("Question: x?\nChoices:\n(A) 135\n(B) 140\n(C) 145\n(D) 150", ("135", "140", "145", "150")),
        ("What?\nA. one\nB. two", ("one", "two")),
        ("Vitamin A: good or bad?", ()),
        ("Is B: right?", ()),
    ],
)
def test_options_are_read_out_of_a_question(text, options):
    assert options_in(text) == options
