"""Rows of every format: Cauldron, FineVision, Docling, A-OKVQA, and what is no row."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from nanovlm.data.rows import Reader, choice_question, multiple_choice, open_lazily
from nanovlm.errors import BadRow, ConfigError, ImageError
from tests.data.helpers import encoder, picture, row


def encoded(kind: str = "PNG", size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    picture(*size).save(buffer, kind)
    return buffer.getvalue()


def kind_of(row_) -> str:
    with pytest.raises(BadRow) as caught:
        Reader()(row_)
    return caught.value.kind


@pytest.mark.parametrize("form", ["pil", "bytes", "hub", "path", "hub path", "single"])
def test_a_picture_comes_in_any_form(tmp_path, form):
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    images = {
        "pil": [picture()], "bytes": [encoded()], "hub": [{"bytes": encoded(), "path": None}], "path": [str(path)],
        "hub path": [{"bytes": None, "path": str(path)}], "single": encoded(),
    }[form]  # fmt: skip
    made = Reader()({"images": images, "texts": row()["texts"]})
    assert [found.size for found in made.pictures] == [(40, 30)]


@pytest.mark.parametrize("images", [None, [], "absent"])
def test_a_row_of_text_alone_is_a_row(images):
    one = {"images": images, **{"texts": row("yes")["texts"]}}
    if images == "absent":
        del one["images"]
    sample = encoder()(one, "x")
    assert sample["images"] == [] and encoder().tokenizer.image_token_id not in sample["input_ids"]


def test_several_pictures_and_turns_keep_their_order():
    made = Reader()(row("a", "b", "c", pictures=3))
    assert len(made.pictures) == 3
    assert [answer for _, answer in made.turns] == ["a", "b", "c"]
    sample = encoder()(row("a", "b", "c", pictures=3), "x")
    assert len(sample["images"]) == 3


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        ({"images": [b"nothing"], "texts": row()["texts"]}, "unreadable picture"),
        ({"images": [encoded()[:20]], "texts": row()["texts"]}, "unreadable picture"),
        ({"images": ["/nowhere/a.png"], "texts": row()["texts"]}, "unreadable picture"),
        ({"images": ["a\0b"], "texts": row()["texts"]}, "unreadable picture"),
        ({"images": [None], "texts": row()["texts"]}, "no picture"),
        ({"images": [3], "texts": row()["texts"]}, "no picture"),
        ({"images": []}, "no text"),
        ({"texts": []}, "no text"),
        ({"texts": "hello"}, "no text"),
        ({"texts": [{"user": "q"}]}, "no text"),
        ({"texts": [{"user": "q", "assistant": None}]}, "no text"),
        ({"texts": [{"user": "q", "assistant": " \n"}]}, "no answer"),
        (3, "no text"),
    ],
)
def test_what_is_no_row_says_why(broken, kind):
    assert kind_of(broken) == kind


def test_a_picture_that_breaks_off_is_found_when_it_is_decoded():
    whole = encoded("JPEG", (400, 300))
    made = encoder().encode({"images": [whole[: len(whole) // 2]], "texts": row()["texts"]}, "row 7")
    with pytest.raises(BadRow, match="row 7: the picture cannot be decoded"):
        encoder().finish(made)


def test_too_many_pictures_and_too_many_tokens_are_told_with_both_numbers():
    with pytest.raises(BadRow, match="3 pictures; max_images_per_example=2"):
        Reader(max_pictures=2)(row(pictures=3))
    with pytest.raises(BadRow, match=r"r: \d+ tokens; at most 50 fit"):
        encoder(max_length=50)(row("x" * 100), "r")


@pytest.mark.parametrize("name", ["relevance", "image_correspondence", "visual_dependency", "formatting"])
def test_each_rating_filters_its_turns(name):
    rated = row("a", "b", "c", **{f"{name}_ratings": [5, 2, None]})
    assert [answer for _, answer in Reader({name: 3})(rated).turns] == ["a", "c"]
    assert len(Reader({name: 1})(rated).turns) == 3
    short = row("a", "b", **{f"{name}_ratings": [1]})
    assert [answer for _, answer in Reader({name: 3})(short).turns] == ["b"], "what is unrated passes"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_text_is_made_for_the_picture_as_it_will_be_turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture(60, 200).save(buffer, "JPEG", exif=exif)
    sample = encoder()({"images": [buffer.getvalue()], "texts": row()["texts"]}, "x")
    tokens = int((sample["input_ids"] == encoder().tokenizer.image_token_id).sum())
    assert tokens == len(sample["images"][0]) * encoder().tokens_per_cell


@pytest.mark.parametrize(
    "name", ["tiny", "tiny_granite_docling", "tiny_dinov3_gemma", "tiny_original_small", "tiny_dinov2_smollm"]
)
@pytest.mark.parametrize("size", [(64, 64), (200, 30), (31, 99), (500, 400)])
def test_a_grid_told_from_the_size_is_the_processors(name, size):
    process = encoder(name).image_processor
    assert process.grid(*size) == tuple(process(picture(*size))[1])


# -- Docling --------------------------------------------------------------------------------------------


def test_docling_rows_have_pictures_turns_and_a_source():
    pages = {
        "images": [encoded(), encoded()],
        "texts": [
            {"user": "Convert to docling.", "assistant": "<doctag>a</doctag>", "source": "DoclingMatix"},
            {"user": "<formula>", "assistant": "<formula>x^2</formula>", "source": "SynthFormulaNet"},
        ],
    }
    sample = encoder("tiny_granite_docling")(pages, "page")
    tokenizer = encoder("tiny_granite_docling").tokenizer
    taught = tokenizer.decode(sample["labels"][sample["labels"] != -100])
    assert taught == "<doctag>a</doctag><|im_end|><formula>x^2</formula><|im_end|>"
    assert [len(tiles) for tiles in sample["images"]] == [5, 5]


# -- multiple choice ------------------------------------------------------------------------------------


def aokvqa(**changes):
    return {
        "image": picture(), "question_id": "22MexNkBPpdZGX6sxbxVBH", "question": "What is the man by?",
        "choices": ["bed", "boat", "desk", "car"], "correct_choice_idx": 2, "direct_answers": "['desk']", **changes,
    }  # fmt: skip


def test_a_multiple_choice_row_asks_with_letters_and_is_answered_by_one():
    sample = encoder(task="aokvqa-mcq")(aokvqa(), "x")
    tokenizer = encoder().tokenizer
    assert tokenizer.decode(sample["labels"][sample["labels"] != -100]) == "C<|im_end|>"
    assert sample["id"] == "22MexNkBPpdZGX6sxbxVBH" and len(sample["images"]) == 1
    text = tokenizer.decode(sample["input_ids"])
    assert "What is the man by?\nChoices:\nA. bed\nB. boat\nC. desk\nD. car\nAnswer with the letter.<|im_end|>" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"choices": ["bed"], "correct_choice_idx": 0}, "1 options; expected 2 to 26"),
        ({"correct_choice_idx": None}, "correct_choice_idx=None is none of 4 choices"),
        ({"correct_choice_idx": 4}, "correct_choice_idx=4 is none of 4 choices"),
        ({"choices": None}, "reads question, choices, image"),
        ({"image": None}, "without the picture"),
    ],
)
def test_a_choice_that_is_none_says_why(changes, reason):
    with pytest.raises(BadRow, match=reason):
        multiple_choice(aokvqa(**changes))


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="no task 'vqa'; there are: aokvqa-mcq"):
        encoder(task="vqa")
    assert choice_question("q", ["a", "b"]).endswith("B. b\nAnswer with the letter.")


def test_a_bomb_is_a_bad_row(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadRow, match="decompression bomb"):
        open_lazily(encoded())
    assert issubclass(BadRow, ValueError) and not issubclass(BadRow, ImageError)
