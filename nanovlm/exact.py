"""Share of exact answers, beside what a model would get that does not look.

Unusual: three controls come with every score. ``chance`` gives the family's commonest answer always; ``blank``
asks the model about a grey picture of the same size; ``shuffled`` shows it the picture of the family's next row.
A model that answers from the text alone is as good with them as without.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from nanovlm.errors import DataError
from nanovlm.images import get_image_processor
from nanovlm.prompts import question

if TYPE_CHECKING:
    from nanovlm.vlm import VisionLanguageModel

GREY = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class Score:
    """Shares of 0 to 1 of ``rows`` rows; blank and shuffled are None where they were not asked for."""

    rows: int
    exact: float
    chance: float
    blank: float | None = None
    shuffled: float | None = None


def score(
    model: VisionLanguageModel,
    rows: Iterable[Mapping[str, Any]],
    *,
    controls: bool = True,
    batch_size: int = 128,
    max_new_tokens: int | None = None,
) -> dict[str, Score]:
    """{family: Score} of rows with pictures and one turn, whose ``family`` says how they are grouped.

    Answers are made greedily; exact means equal but for white space at the ends. The model's mode is restored.
    Raises DataError without rows.
    """
    asked = [_Asked.of(row) for row in rows]
    if not asked:
        raise DataError("no rows to score")
    if max_new_tokens is None:
        max_new_tokens = 1 + max(len(model.tokenizer.encode(each.answer, False)) for each in asked)
    shown = {"exact": [each.pictures for each in asked]}
    if controls:
        shown["blank"] = [[Image.new("RGB", picture.size, GREY) for picture in each.pictures] for each in asked]
        shown["shuffled"] = _next_of_family(asked)
    training = model.training
    model.eval()
    try:
        right = {
            name: [
                _same(said, each.answer)
                for said, each in zip(
                    answers(model, [each.question for each in asked], pictures, max_new_tokens, batch_size),
                    asked,
                    strict=True,
                )
            ]
            for name, pictures in shown.items()
        }
    finally:
        model.train(training)
    found = {}
    for family in dict.fromkeys(each.family for each in asked):
        members = [number for number, each in enumerate(asked) if each.family == family]
        shares = {name: sum(ok[number] for number in members) / len(members) for name, ok in right.items()}
        commonest = Counter(asked[number].answer for number in members).most_common(1)[0][1]
        found[family] = Score(len(members), chance=commonest / len(members), **shares)
    return found


def mean(scores: Mapping[str, Score], families: Sequence[str] | None = None, name: str = "exact") -> float:
    """The macro-average of one share over families, all of them unless named."""
    shares = [getattr(scores[family], name) for family in families or scores]
    return sum(shares) / len(shares)


def table(scores: Mapping[str, Score], families: Sequence[str] | None = None) -> str:
    """A line a family, in percent; the mean over ``families`` (all unless named), and the others below it."""
    families = [family for family in scores if families is None or family in families]
    names = ["exact", *(name for name in ("chance", "blank", "shuffled") if mean_of(scores, name))]
    lines = [f"{'family':<12}{'rows':>6}" + "".join(f"{name:>10}" for name in names)]

    def line(title: str, count: int, shares: Sequence[float]) -> str:
        return f"{title:<12}{count:>6}" + "".join(f"{100 * share:>10.1f}" for share in shares)

    def of(family: str) -> str:
        return line(family, scores[family].rows, [getattr(scores[family], name) for name in names])

    lines += [of(family) for family in families]
    total = sum(scores[family].rows for family in families)
    lines.append(line("mean", total, [mean(scores, families, name) for name in names]))
    lines += [of(family) + "  (apart)" for family in scores if family not in families]
    return "\n".join(lines)


def mean_of(scores: Mapping[str, Score], name: str) -> bool:
    """Whether a share was measured."""
    return all(getattr(each, name) is not None for each in scores.values())


def answers(
    model: VisionLanguageModel,
    questions: Sequence[str],
    pictures: Sequence[Sequence[Image.Image]],
    max_new_tokens: int,
    batch_size: int = 128,
) -> list[str]:
    """Greedy answers to questions about pictures, in batches padded on the left."""
    process = get_image_processor(model.cfg)
    device = model.MP.proj.weight.device
    out: list[str] = []
    for start in range(0, len(questions), batch_size):
        ids, images = [], []
        batch = slice(start, start + batch_size)
        for text, shown in zip(questions[batch], pictures[batch], strict=True):
            made = [process(picture) for picture in shown]
            ids.append(question(model.cfg, model.tokenizer, text, [grid for _, grid in made]))
            images.append([tiles.to(device) for tiles, _ in made])
        longest = max(map(len, ids))
        pad = model.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        new = model.generate(input_ids, images, mask, max_new_tokens, greedy=True)
        out += model.tokenizer.batch_decode(new, skip_special_tokens=True)
    return out


@dataclasses.dataclass(frozen=True)
class _Asked:
    family: str
    question: str
    answer: str
    pictures: list[Image.Image]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _Asked:
        turn = row["texts"][0]
        return cls(turn.get("family", "all"), turn["user"], turn["assistant"], list(row["images"]))


def _next_of_family(asked: Sequence[_Asked]) -> list[list[Image.Image]]:
    """For each row the pictures of its family's next one, the last's of the first."""
    following: dict[int, int] = {}
    for family in {each.family for each in asked}:
        members = [number for number, each in enumerate(asked) if each.family == family]
        following.update(zip(members, [*members[1:], members[0]], strict=True))
    return [asked[following[number]].pictures for number in range(len(asked))]


def _same(said: str, answer: str) -> bool:
    return said.strip() == answer.strip()
