"""When an answer is right: the VQA rule for open ones, the letter of a choice.

Unusual: where fewer people answered than the rule's ten, as many must agree as there can be, at most three; a
single answer must be met exactly. Source: https://visualqa.org/evaluation.html.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanovlm.data.rows import LETTERS

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_<>@`,?!*:]""")


def normalised(text: str) -> str:
    """An answer as the VQA rule compares it: no case, articles or punctuation, numbers as digits."""
    text = _COMMA.sub("", text.replace("\n", " ").replace("\t", " ").strip().lower())
    text = _PERIOD.sub("", _PUNCTUATION.sub(" ", text))
    words = [NUMBERS.get(word, word) for word in text.split() if word not in ARTICLES]
    return " ".join(words)


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """0 to 1: the mean, over the people left out, of min(others who said so / 3, 1). Raises ValueError without any."""
    if not answers:
        raise ValueError("no answers to compare with")
    mine, theirs = normalised(said), [normalised(answer) for answer in answers]
    if len(theirs) == 1:
        return float(mine == theirs[0])
    enough = min(3, len(theirs) - 1)
    agreeing = theirs.count(mine)
    return sum(min(1.0, (agreeing - (answer == mine)) / enough) for answer in theirs) / len(theirs)


def letter_of(said: str, options: Sequence[str]) -> int | None:
    """The number of the option that a generated answer chooses; None where it chooses none.

    A letter alone or marked ("B", "B.", "(B)", "the answer is B"), else an option said in full.
    """
    letters = LETTERS[: len(options)]
    found = re.match(rf"\s*\(?([{letters}])(?![\w'])", said) or re.search(
        rf"(?:answer|option|choice)\W+(?:is\W+)?\(?([{letters}])(?![\w'])", said, re.IGNORECASE
    )
    if found and found[1] in letters:
        return letters.index(found[1])
    whole = [normalised(option) for option in options]
    return whole.index(normalised(said)) if normalised(said) in whole else None
