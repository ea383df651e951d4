"""Questions of the benchmarks: rows of MMStar and A-OKVQA, and drawings, in one form.

Unusual: MMStar writes its options into the question; they are read out of it again, and where that fails the
letters stand for themselves.

Sources: https://huggingface.co/datasets/Lin-Chen/MMStar, https://huggingface.co/datasets/HuggingFaceM4/A-OKVQA.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from nanovlm.data.rows import LETTERS, choice_question, open_lazily
from nanovlm.data.synthetic import COLOURS, PLACES, SHAPES, WORDS, HeldOut
from nanovlm.errors import BadRow, DataError

HELD_OUT = 1000  # drawings, where --max-samples does not say
_MARKED = re.compile(r"(?:^|(?<=[\s,;]))\(?([A-Z])(?:\)|:|\.)\s+")
# What a drawing's answer is one of, by the family of the question.
CHOICES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS), "shape": SHAPES, "count": ("1", "2", "3", "4", "5"), "position": tuple(PLACES),
    "comparison": tuple(COLOURS), "digits": tuple("0123456789"), "charts": tuple(COLOURS), "words": WORDS,
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question: ``options`` and ``right``, the number of one, where there is a choice; ``answers`` of people.

    lettered: the question as one to be answered with a letter. said: what choosing each option is to say.
    """

    task: str
    id: str
    picture: Image.Image
    text: str
    lettered: str = ""
    options: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    right: int | None = None
    answers: tuple[str, ...] = ()


def mmstar(row: Mapping[str, Any], number: int) -> Question:
    """A row of Lin-Chen/MMStar: index, question, image, answer (a letter). Raises BadRow."""
    text, answer = row.get("question"), str(row.get("answer") or "").strip()
    if not isinstance(text, str) or len(answer) != 1 or answer not in LETTERS:
        raise BadRow("no choice", f"question={text!r:.60}, answer={answer!r}; MMStar has a question and a letter")
    options = options_in(text)
    if LETTERS.index(answer) >= len(options):
        options = tuple(LETTERS[: max(4, LETTERS.index(answer) + 1)])
    letters = tuple(LETTERS[: len(options)])
    return Question(
        "mmstar", str(row.get("index", number)), _picture(row), text, f"{text}\nAnswer with the letter.", options,
        letters, LETTERS.index(answer),
    )  # fmt: skip


def options_in(text: str) -> tuple[str, ...]:
    """The options that a question lists as "A: one, B: two", "(A) one" or "A. one"; none where letters are missing."""
    listed = text[max(text.rfind("Options:"), text.rfind("Choices:"), 0) :]
    marks = list(_MARKED.finditer(listed))
    for first in (number for number, mark in enumerate(marks) if mark[1] == "A"):
        run = [mark for want, mark in zip(LETTERS, marks[first:], strict=False) if mark[1] == want]
        if len(run) > 1 and [m[1] for m in marks[first : first + len(run)]] == [m[1] for m in run]:
            ends = [mark.start() for mark in run[1:]] + [len(listed)]
            return tuple(
                listed[mark.end() : end].strip().rstrip(",;.").strip() for mark, end in zip(run, ends, strict=True)
            )
    return ()


def aokvqa(row: Mapping[str, Any], number: int) -> Question:
    """A row of HuggingFaceM4/A-OKVQA. A test split has no answers: its rows are BadRow."""
    text, options, right = row.get("question"), row.get("choices"), row.get("correct_choice_idx")
    if not isinstance(text, str) or not isinstance(options, Sequence) or isinstance(options, str):
        raise BadRow("no choice", "no question with choices; A-OKVQA has question, choices, image")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise BadRow("no choice", f"correct_choice_idx={right!r} is none of {len(options)} choices")
    answers = () if row.get("difficult_direct_answer") else _answers(row.get("direct_answers"))
    said = tuple(map(str, options))
    return Question(
        "aokvqa", str(row.get("question_id", number)), _picture(row), text, choice_question(text, said), said, said,
        right, answers,
    )  # fmt: skip


def synthetic(row: Mapping[str, Any], number: int) -> Question:
    """A held-out drawing with four options, the wrong ones drawn from what its family is answered with."""
    turn = row["texts"][0]
    dice = random.Random(f"options:{row['id']}")
    wrong = [each for each in CHOICES[turn["family"]] if each != turn["assistant"]]
    options = [turn["assistant"], *dice.sample(wrong, 3)]
    dice.shuffle(options)
    said, text = tuple(options), turn["user"]
    return Question(
        "synthetic", row["id"], row["images"][0], text, choice_question(text, said), said, said,
        options.index(turn["assistant"]), (turn["assistant"],),
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A benchmark: where its rows are, which split is meant where none is named, and how a row is read."""

    source: str
    split: str
    read: Callable[[Mapping[str, Any], int], Question]
    open_answers: bool


TASKS = {
    "mmstar": Task("Lin-Chen/MMStar", "val", mmstar, False),
    "aokvqa": Task("HuggingFaceM4/A-OKVQA", "validation", aokvqa, True),
    "synthetic": Task("", "held out", synthetic, True),
}


def questions(
    name: str, split: str | None = None, most: int | None = None, source: str | None = None
) -> Iterator[Question | BadRow]:
    """The first ``most`` questions of a task, a row that cannot be used as BadRow. Raises DataError.

    source: a folder, or another repository, in place of the task's own.
    """
    if name not in TASKS:
        raise DataError(f"no task {name!r}; there are: {', '.join(TASKS)}; others are lmms-eval's")
    task = TASKS[name]
    rows: Any
    if name == "synthetic":
        if source or split not in (None, task.split):
            raise DataError(f"synthetic draws its own rows: {source or split!r} names none; leave it out")
        drawn = HeldOut(HELD_OUT if most is None else most)
        rows = (drawn[number] for number in range(len(drawn)))
    else:
        rows = _rows(source or task.source, split or task.split)
    for number, row in enumerate(itertools.islice(rows, most)):
        try:
            yield task.read(row, number)
        except BadRow as error:
            yield BadRow(error.kind, f"{name}[{number}]: {error}")


def _rows(source: str, split: str) -> Any:
    """Rows of a split, pictures undecoded; of a repository read as they are asked for."""
    try:
        import datasets
    except ImportError:
        raise DataError("benchmarks of the Hub need the package datasets: pip install 'nanovlm[eval]'") from None
    datasets.disable_progress_bars()
    folder = Path(source)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            made = datasets.load_from_disk(source)
            made = made[split] if isinstance(made, datasets.DatasetDict) else made
        elif files := sorted(map(str, [*folder.rglob(f"{split}.parquet"), *folder.rglob(f"{split}-*.parquet")])):
            # by name: the library calls a file val-00000-of-00001 validation
            made = datasets.load_dataset("parquet", data_files={split: files}, split=split)
        else:
            made = datasets.load_dataset(source, split=split, streaming=not folder.is_dir())
        features = made.features or {}
        return made.cast_column("image", datasets.Image(decode=False)) if "image" in features else made
    except Exception as error:  # the library and the Hub's client raise what they like
        said = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise DataError(
            f"{source}, split {split!r}, cannot be read: {type(error).__name__}: {said}. Name a split that it has, "
            "or a folder of parquet files with --data TASK=FOLDER"
        ) from None


def _picture(row: Mapping[str, Any]) -> Image.Image:
    if row.get("image") is None:
        raise BadRow("no picture", "a question about a picture, without the picture")
    picture = open_lazily(row["image"])
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise BadRow("unreadable picture", str(error)) from None
    return picture


def _answers(found: Any) -> tuple[str, ...]:
    """People's answers; A-OKVQA's files hold the list as a text."""
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError):
            raise BadRow("no answer", f"direct_answers={found!r:.60} is no list") from None
    return tuple(map(str, found or ()))
