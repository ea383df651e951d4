"""One changed fact, as a matcher sees it, and the plain questions matchers share."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from compat.matchers.pair import Pair


class Absent:
    """The value of a fact that a lock does not hold. There is one: ABSENT."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


class Hit(NamedTuple):
    """What a matcher found: the values to show.

    size: how far apart measured ones lie, None for stated ones. path: where, if not at the fact itself.
    """

    old: Any
    new: Any
    size: float | None = None
    path: str = ""


@dataclass(frozen=True)
class Change:
    """section: "state", "config.field", ... name: the rest of the path. old, new: never equal, may be ABSENT."""

    path: str
    section: str
    name: str
    old: Any
    new: Any
    pair: Pair

    @property
    def added(self) -> bool:
        return self.old is ABSENT

    @property
    def removed(self) -> bool:
        return self.new is ABSENT

    @property
    def both(self) -> bool:
        return not self.added and not self.removed


def same(old: Any, new: Any) -> bool:
    """Equal as JSON: True is not 1."""
    return old is new or (type(old) is type(new) and old == new and _text(old) == _text(new))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=repr)


def part(value: Any, key: str) -> Any:
    """value[key], ABSENT where there is none."""
    return value.get(key, ABSENT) if isinstance(value, dict) else ABSENT


def differs(change: Change, *keys: str) -> Hit | None:
    """The parts named by keys, where both sides hold the fact and any of them differs."""
    if not change.both:
        return None
    old = {key: part(change.old, key) for key in keys}
    new = {key: part(change.new, key) for key in keys}
    moved = [key for key in keys if not same(old[key], new[key])]
    if not moved:
        return None
    if len(moved) == 1:
        return Hit(old[moved[0]], new[moved[0]])
    return Hit({key: old[key] for key in moved}, {key: new[key] for key in moved})


def changed_parts(change: Change) -> set[str]:
    """Names of the parts that differ, of a fact that is an object on both sides."""
    if not isinstance(change.old, dict) or not isinstance(change.new, dict):
        return set()
    names = {*change.old, *change.new}
    return {name for name in names if not same(part(change.old, name), part(change.new, name))}


def type_names(annotation: Any) -> set[str]:
    """The types an annotation admits, however it is spelled: Optional[int] and int | None are one."""
    text = re.sub(r"\b(?!Optional|Union|Annotated)(\w+)\[[^\[\]]*\]", r"\1", str(annotation))  # list[int] is a list
    names = {word.rpartition(".")[2].lower() for word in re.findall(r"[\w.]+", text)}
    spelled = {"optional", "union", "annotated", "nonetype", "none", "final", "class", "any"}
    return names - spelled
