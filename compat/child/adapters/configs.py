"""A target's config class, whatever it is: fields, defaults, an instance of given values; and calls by name."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys

from ..protocol import NotSupported, theirs


def signature_names(function):
    """Names of the parameters a method takes, without self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def fitting(function, by_name):
    """The entries of ``by_name`` that ``function`` takes. Raises NotSupported for a required one it lacks."""
    chosen = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name == "self":
            continue
        if by_name.get(name) is not None:
            chosen[name] = by_name[name]
        elif parameter.default is parameter.empty:
            raise NotSupported(
                f"{getattr(function, '__qualname__', function)} wants '{name}', which no probe can supply"
            )
    return chosen


def field_names(cls):
    """Field names of a config class: dataclass fields, else constructor arguments and class attributes."""
    if dataclasses.is_dataclass(cls):
        return list(declared(cls))
    names = [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "args", "kwargs")]
    plain = [n for n, v in vars(cls).items() if not n.startswith("_") and not callable(v)]
    return list(dict.fromkeys(names + plain + list(vars(blank(cls)))))


def blank(cls):
    """An instance with all defaults."""
    with theirs():
        return cls()


def config_default(cls, name):
    """A field's default, or None when it has none."""
    if dataclasses.is_dataclass(cls):
        for f in dataclasses.fields(cls):
            if f.name == name:
                return (
                    f.default_factory()
                    if f.default_factory is not dataclasses.MISSING
                    else (None if f.default is dataclasses.MISSING else f.default)
                )
        return None
    return getattr(blank(cls), name, None)


def make_config(cls, values):
    """An instance of ``cls`` with ``values``: through its constructor where it takes them, else by attribute."""
    taken = inspect.signature(cls.__init__).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    config = cls(**{name: value for name, value in values.items() if free or name in taken})
    for name, value in values.items():
        if getattr(config, name, None) != value:
            setattr(config, name, value)
    return config


def config_values(config):
    """Values of a config instance."""
    if dataclasses.is_dataclass(config):
        return Values((name, getattr(config, name)) for name in declared(type(config)))
    return Values((name, getattr(config, name)) for name in field_names(type(config)) if hasattr(config, name))


class Values(dict):
    """A config's values by field: looking one up is reading it, walking over all is not."""

    read = set()  # names, of any config, since noted_reads began

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


@contextlib.contextmanager
def noted_reads(kind):
    """The names, as a set that grows, of what is read of configs of a class inside the block.

    All names where reads cannot be seen: of a class that is a table as well, that gives its attributes by a way of
    its own, or that is made in C.
    """
    reach, fields, seen = kind.__getattribute__, field_names(kind), False

    def noting(self, name):
        if sys._getframe(1).f_globals is not globals():  # config_values collects
            Values.read.update(fields if name == "__dict__" else (name,))
        return reach(self, name)

    Values.read.clear()
    if reach is object.__getattribute__ and not hasattr(kind, "__getitem__"):
        with contextlib.suppress(TypeError):  # a class made in C
            type.__setattr__(kind, "__getattribute__", noting)  # whatever its metaclass says
            seen = True
    if not seen:
        Values.read.update(fields)
    try:
        yield Values.read
    finally:
        if seen:
            type.__delattr__(kind, "__getattribute__")


@functools.lru_cache(maxsize=16)  # every batch asks
def declared(cls):
    """Names of a dataclass's fields."""
    return tuple(f.name for f in dataclasses.fields(cls))
