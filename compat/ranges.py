"""Many dotted names as few patterns: `blocks.{0..29}.attn.q_proj.weight`. Exact: `expand` gives back every name.

Only components that are whole numbers vary, and a set of them is written in full ({0..3,7}), so nothing is
summed up. Names are merged along one component at a time when everything else is equal, sets included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product

Part = str | frozenset[int]

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # 007 is a name, and so is a number no layer has
_RANGE = re.compile(r"\{([0-9]+(?:\.\.[0-9]+)?(?:,[0-9]+(?:\.\.[0-9]+)?)*)\}(?=\.|$)")


def group(names: Iterable[str]) -> list[str]:
    """Patterns that together name exactly `names`, in the order of the first name each holds."""
    order: dict[tuple[Part, ...], int] = {}
    for place, name in enumerate(names):
        order.setdefault(tuple(_part(text) for text in name.split(".")), place)
    longest = max((len(parts) for parts in order), default=0)
    for position in range(longest):
        merged: dict[tuple, tuple[set[int], int]] = {}
        kept: dict[tuple[Part, ...], int] = {}
        for parts, place in order.items():
            numbers = parts[position] if position < len(parts) else ""
            if isinstance(numbers, frozenset):
                others = (parts[:position], parts[position + 1 :])
                held, first = merged.get(others, (set(), place))
                merged[others] = (held | numbers, min(first, place))
            else:
                kept[parts] = place
        for (before, after), (held, first) in merged.items():
            kept[(*before, frozenset(held), *after)] = first
        order = kept
    return [".".join(_text(part) for part in parts) for parts in sorted(order, key=order.__getitem__)]


def expand(pattern: str) -> list[str]:
    """Every name of a pattern that `group` made, numbers counting up."""
    choices: list[list[str]] = []
    at = 0
    while True:
        if found := _RANGE.match(pattern, at):
            choices.append([str(number) for number in _numbers(found[1])])
            at = found.end()
        else:
            end = pattern.find(".", at)
            end = len(pattern) if end < 0 else end
            choices.append([pattern[at:end].replace("{{", "{").replace("}}", "}")])
            at = end
        if at == len(pattern):
            return [".".join(parts) for parts in product(*choices)]
        at += 1


def numbers_of(name: str) -> tuple[int, ...]:
    """The layer numbers in a name, in order: (3,) of blocks.3.attn.q_proj.weight."""
    return tuple(int(text) for text in name.split(".") if _NUMBER.fullmatch(text))


def _part(text: str) -> Part:
    return frozenset({int(text)}) if _NUMBER.fullmatch(text) else text


def _text(part: Part) -> str:
    if isinstance(part, str):
        return part.replace("{", "{{").replace("}", "}}")
    runs: list[list[int]] = []
    for number in sorted(part):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(low) if low == high else f"{low}..{high}" for low, high in runs)
    return text if len(part) == 1 else "{" + text + "}"


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for run in text.split(","):
        low, _, high = run.partition("..")
        found += range(int(low), int(high or low) + 1)
    return found
