"""Does a value fit an annotation written as text? Only one that is understood can be contradicted."""

from __future__ import annotations

import re

# JSON knows tuples and sets as lists.
_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
}
_PLAIN |= {"list": (list,), "tuple": (list,), "set": (list,)}


def mismatch(annotation: str, value) -> bool:
    """True when `value` (as JSON gave it) contradicts `annotation`.

    None fits everything: a default of None in a field typed otherwise is a common way to say "not set".
    """
    if value is None:
        return False
    parts = _alternatives(annotation)
    return bool(parts) and not any(_fits(part, value) for part in parts)


def _alternatives(annotation: str) -> list[str]:
    """The plain types an annotation allows; empty when any part of it is not understood."""
    text = annotation.strip().strip("'\"").replace("typing.", "")
    if match := re.fullmatch(r"(?:Optional|Union)\[(.*)\]", text):
        inner = _split(match[1], ",")
    else:
        inner = _split(text, "|")
    names = [re.sub(r"\[.*\]$", "", part).strip().lower() for part in inner]
    names = [re.sub(r"^<class '(\w+)'>$", r"\1", name) for name in names]
    names = [name for name in names if name not in ("none", "nonetype")]
    return names if all(name in _PLAIN for name in names) else []


def _split(text: str, at: str) -> list[str]:
    """Split at `at` outside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c == "[") - (c == "]")
        if c == at and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _fits(name: str, value) -> bool:
    if isinstance(value, bool):
        return name == "bool"
    return isinstance(value, _PLAIN[name])
