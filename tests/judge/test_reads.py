"""What is read of a config is noted, so that a field is looked at only from where it is read on."""

from __future__ import annotations

import dataclasses

import pytest

from compat.child.adapters.configs import config_values, noted_reads


@dataclasses.dataclass
class Config:
    width: int = 8
    depth: int = 2
    name: str = "x"

    @property
    def size(self) -> int:
        return self.width * self.depth


class Table(dict):
    width: int = 8

    def __init__(self, width: int = 8) -> None:
        super().__init__(width=width)


class Sealed(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise RuntimeError("this class is final")


class Final(metaclass=Sealed):
    def __init__(self, width: int = 8) -> None:
        self.width = width


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (lambda config: config.depth, {"depth"}),
        (lambda config: config.size, {"size", "width", "depth"}),
        (lambda config: config_values(config), set()),
        (lambda config: config_values(config)["name"], {"name"}),
        (lambda config: config_values(config).get("name"), {"name"}),
        (lambda config: vars(config), {"width", "depth", "name"}),
        (lambda config: dataclasses.replace(config).depth, {"width", "depth", "name"}),
        (lambda config: repr(config), {"width", "depth", "name"}),
    ],
)
def test_a_read_is_noted_and_collecting_all_values_is_none(read, names):
    with noted_reads(Config) as seen:
        read(Config())
    assert {name for name in seen if not name.startswith("__")} - {"__class__"} == names
    assert "__getattribute__" not in vars(Config)


class Renamed:
    def __init__(self, width: int = 8) -> None:
        self.width = width

    def __getattribute__(self, name: str) -> object:
        return super().__getattribute__("width" if name == "hidden" else name)


@pytest.mark.parametrize("kind", [Table, Final, Renamed])
def test_every_field_counts_as_read_where_reads_cannot_be_seen(kind):
    with noted_reads(kind) as seen:
        assert "width" in seen
