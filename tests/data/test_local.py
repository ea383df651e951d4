"""A folder of pictures with a JSONL file: rows, faults, permissions, Docling and multiple choice."""

from __future__ import annotations

import itertools
import json
import os

import pytest

from nanovlm.data.local import LocalRows
from nanovlm.errors import BadRow, DataError
from tests.data.helpers import built, ids_of, picture

KINDS = ("no JSON", "unreadable picture", "no text")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("cat", "dog"):
        picture().save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def write(folder, rows, name="data.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def said(number, *pictures):
    texts = [{"user": f"q {number}", "assistant": f"a {number} é"}]
    return {"images": [f"pictures/{name}.png" for name in pictures], "texts": texts, "id": f"row {number}"}


def test_rows_of_all_files_are_numbered_and_pictures_found_beside_them(folder):
    write(folder, [said(0, "cat"), "", said(1), "  "], "a.jsonl")
    write(folder, [said(2, "dog", "cat")], "b.jsonl")
    rows = LocalRows(folder)
    assert [rows[number]["id"] for number in range(len(rows))] == ["row 0", "row 1", "row 2"]
    training, validation = built(train_dataset_path=str(folder), val_ratio=0.34, batch_size=1)
    names = ids_of(list(itertools.islice(training, 2))) + ids_of(list(validation))
    assert sorted(names) == ["row 0", "row 1", "row 2"]


def test_faulty_lines_are_skipped_and_counted(folder):
    rows = [said(n, "cat") for n in range(8)] + ["{not json", "[1]", said(10, "missing"), {"images": []}]
    write(folder, rows)
    with pytest.raises(BadRow, match="data.jsonl, row 8"):
        LocalRows(folder)[8]
    training, _ = built(train_dataset_path=str(folder), val_ratio=0.01, batch_size=1)
    list(itertools.islice(training, 22))
    assert {"no JSON", "unreadable picture"} <= set(training.stats["skipped"]) <= {*KINDS}


def test_the_split_depends_on_the_seed_alone(folder):
    write(folder, [said(n) for n in range(50)])
    held_out = [
        ids_of(list(built(train_dataset_path=str(folder), val_ratio=0.2, seed=seed)[1])) for seed in (0, 0, 1)
    ]
    assert held_out[0] == held_out[1] != held_out[2] and len(held_out[0]) == 10


def test_too_few_rows_for_two_halves_are_told(folder):
    write(folder, [said(0)])
    with pytest.raises(DataError, match="has 1 rows; .* hold out 1, and at least one must be on either side"):
        built(train_dataset_path=str(folder))
    write(folder, [])
    with pytest.raises(DataError, match="has no row: expected a .jsonl file with lines such as"):
        built(train_dataset_path=str(folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_told(folder):
    write(folder, [said(0)])
    folder.chmod(0)
    try:
        with pytest.raises(DataError, match="permission denied"):
            built(train_dataset_path=str(folder))
    finally:
        folder.chmod(0o755)


def test_a_refused_folder_or_file_is_told_whoever_runs(folder, monkeypatch):
    write(folder, [said(0), said(1, "cat")])

    def refuse(*arguments, **named):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.iterdir", refuse)
        with pytest.raises(DataError, match="may not be read: permission denied"):
            built(train_dataset_path=str(folder))
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.open", refuse)
        with pytest.raises(DataError, match="data.jsonl cannot be read: Permission denied"):
            built(train_dataset_path=str(folder))
    training, _ = built(train_dataset_path=str(folder), val_ratio=0.5, batch_size=1)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    training.reading.source.chosen[:] = 1
    with pytest.raises(DataError, match="cannot be used; the last: unreadable picture: row 1: .*Permission denied"):
        next(training)


def test_granite_docling_is_fed_by_the_same_call(folder):
    page = {
        "images": ["pictures/cat.png", "pictures/dog.png"],
        "texts": [
            {"user": "Convert this page to docling.", "assistant": "<doctag>x</doctag>", "source": "DoclingMatix"},
            {"user": "<formula>", "assistant": "<formula>x^2</formula>", "source": "SynthFormulaNet"},
        ],
    }
    write(folder, [page] * 4)
    training, _ = built("tiny_granite_docling", train_dataset_path=str(folder), val_ratio=0.25, batch_size=2)
    batch = next(training)
    tokenizer = training.reading.encoder.tokenizer
    taught = tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert taught == "<doctag>x</doctag><|im_end|><formula>x^2</formula><|im_end|>"
    assert [len(images) for images in batch["images"]] == [2, 2]


def test_multiple_choice_is_a_task_of_any_source(folder):
    rows = [
        {"image": "pictures/cat.png", "question": "What?", "choices": ["cat", "dog"], "correct_choice_idx": n % 2}
        for n in range(6)
    ]
    write(folder, rows)
    training, _ = built(train_dataset_path=str(folder), task="aokvqa-mcq", val_ratio=0.2, batch_size=1)
    tokenizer = training.reading.encoder.tokenizer
    taught = {
        tokenizer.decode(batch["labels"][batch["labels"] != -100]) for batch in itertools.islice(training, 5)
    }
    assert taught == {"A<|im_end|>", "B<|im_end|>"}
