"""Benchmarks' rows: small files of the same schema as MMStar's and A-OKVQA's, read with datasets."""

from __future__ import annotations

import io

import pytest

from nanovlm.errors import BadRow, DataError
from nanovlm.evaluate.questions import CHOICES, Question, questions

datasets = pytest.importorskip("datasets", reason="reads benchmarks with datasets, which is not installed")


def png(picture, seed):
    file = io.BytesIO()
    picture(48, 32, seed=seed).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def mmstar(tmp_path, picture):
    """Four rows with MMStar's columns, as parquet files in a folder."""
    texts = [
        "What is shown?\nOptions: A: a cat, B: a dog, C: a hat, D: a pen",
        "How many?\nChoices:\n(A) 1\n(B) 2\n(C) 3\n(D) 4",
        "Which of the four is it?",
        "Broken?\nOptions: A: yes, B: no",
    ]
    rows = {
        "index": [0, 1, 2, 3], "question": texts, "answer": ["A", "C", "D", ""],
        "image": [png(picture, seed) for seed in range(4)],
        "category": ["coarse perception"] * 4, "l2_category": ["image topic"] * 4,
        "meta_info": [{"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}] * 4,
    }  # fmt: skip
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    folder = tmp_path / "mmstar"
    folder.mkdir()
    made.to_parquet(str(folder / "val-00000-of-00001.parquet"))
    return folder


@pytest.fixture
def aokvqa(tmp_path, picture):
    """Three rows with A-OKVQA's columns, two validation and a test row without answers, saved to disk."""

    def rows(count, answered):
        return {
            "image": [png(picture, seed) for seed in range(count)],
            "question_id": [f"q{number}" for number in range(count)],
            "question": ["What is it for?"] * count,
            "choices": [["to eat", "to ride", "to wear", "to read"]] * count,
            "correct_choice_idx": [1 if answered else None] * count,
            "direct_answers": [str(["ride"] * 6 + ["riding"] * 4) if answered else None] * count,
            "difficult_direct_answer": [number == 1 for number in range(count)],
            "rationales": [["it has wheels"] * 3] * count,
        }

    features = datasets.Features(
        {
            "image": datasets.Image(), "question_id": datasets.Value("string"), "question": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")), "correct_choice_idx": datasets.Value("int8"),
            "direct_answers": datasets.Value("string"), "difficult_direct_answer": datasets.Value("bool"),
            "rationales": datasets.List(datasets.Value("string")),
        }
    )  # fmt: skip
    split = {"validation": rows(2, True), "test": rows(1, False)}
    made = datasets.DatasetDict({name: datasets.Dataset.from_dict(part, features) for name, part in split.items()})
    made.save_to_disk(str(tmp_path / "aokvqa"))
    return tmp_path / "aokvqa"


def test_mmstar(mmstar):
    first, second, third, broken = questions("mmstar", source=str(mmstar))
    assert (first.id, first.right, first.options) == ("0", 0, ("a cat", "a dog", "a hat", "a pen"))
    assert first.said == ("A", "B", "C", "D") and first.picture.size == (48, 32) and not first.answers
    assert (second.options, second.right) == (("1", "2", "3", "4"), 2)
    assert (third.options, third.right) == (("A", "B", "C", "D"), 3), "letters stand for options that are not told"
    assert isinstance(broken, BadRow) and "mmstar[3]" in str(broken)


def test_aokvqa(aokvqa):
    easy, hard = questions("aokvqa", source=str(aokvqa))
    assert (easy.id, easy.right, easy.said) == ("q0", 1, ("to eat", "to ride", "to wear", "to read"))
    assert easy.answers == ("ride",) * 6 + ("riding",) * 4
    assert hard.answers == (), "open answers to what the authors call difficult are not scored"
    assert "B. to ride" in easy.lettered and easy.text == "What is it for?"
    (unanswered,) = questions("aokvqa", "test", source=str(aokvqa))
    assert isinstance(unanswered, BadRow) and "correct_choice_idx=None" in str(unanswered)


def test_drawings_have_four_options_and_are_the_same_again():
    asked = list(questions("synthetic", most=48))
    assert asked == list(questions("synthetic", most=60))[:48]
    for each in asked:
        assert isinstance(each, Question) and len(set(each.said)) == 4
        assert each.said[each.right] == each.answers[0]
        assert any(set(each.said) <= set(choices) for choices in CHOICES.values())
    assert len({each.right for each in asked}) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nothing",), "no task 'nothing'; there are: mmstar, aokvqa, synthetic"),
        (("aokvqa", "held_out"), "split 'held_out', cannot be read"),
        (("synthetic", "train"), "draws its own rows"),
    ],
)
def test_what_is_not_there_is_named(aokvqa, words, told):
    source = str(aokvqa) if words[0] == "aokvqa" else None
    with pytest.raises(DataError, match=told):
        list(questions(*words, source=source))


def test_an_empty_folder_is_no_benchmark(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(questions("mmstar", source=str(tmp_path)))
