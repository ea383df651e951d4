"""Configs, calls and returned values in words that JSON can hold and that do not depend on how they are spelled."""

from __future__ import annotations

import dataclasses
import inspect
import re


def fields(cls):
    """{field: {"type", "default"}} of a config class; a field that must be given has no "default"."""
    from .adapters.configs import config_default, field_names
    from .readings import jsonable

    declared = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    found = {}
    for name in field_names(cls):
        default, field = config_default(cls, name), declared.get(name)
        found[name] = {"type": type_name(field.type) if field else type(default).__name__}
        if not (field and field.default is field.default_factory is dataclasses.MISSING):
            found[name]["default"] = jsonable(default)
    return found


def type_name(annotation):
    """An annotation as one writes it today: ``int``, ``dict[str, str]``, ``float | None``."""
    plain = isinstance(annotation, type) and not hasattr(annotation, "__origin__")
    text = annotation.__name__ if plain else str(annotation).replace("typing.", "")
    text = re.sub(r"\b(Dict|List|Tuple|Set)\[", lambda found: found[1].lower() + "[", text)
    optional = re.fullmatch(r"Optional\[(.*)\]", text)
    return f"{optional[1]} | None" if optional else text.replace("NoneType", "None")


def arguments_of(function):
    """{argument: {"position", "kind", "default" if any}}, without self and cls."""
    from .readings import jsonable

    found = {}
    for p in inspect.signature(function).parameters.values():
        if p.name in ("self", "cls"):
            continue
        placed = p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
        found[p.name] = {"position": len(found) if placed else None, "kind": p.kind.name.lower()}
        if p.default is not p.empty:
            found[p.name]["default"] = jsonable(p.default)
    return found


def described(value, letters):
    """A returned value's type and shapes, its sizes written as letters where there is one."""
    import torch

    if isinstance(value, torch.Tensor):
        shape = [letters.get(size, size) for size in value.shape]
        return {"type": "Tensor", "shape": shape, "dtype": str(value.dtype).replace("torch.", "")}
    if isinstance(value, dict):
        items = [{"name": str(name), **described(item, letters)} for name, item in value.items()]
        return {"type": type(value).__name__, "items": items}
    if isinstance(value, (tuple, list)):
        return {"type": type(value).__name__, "items": [described(item, letters) for item in value]}
    return {"type": type(value).__name__}


def is_plain(value):
    """Whether a default that travelled as JSON is what it was: no repr of an object."""
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and value[:1] != "<")
