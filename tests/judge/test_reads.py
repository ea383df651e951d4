"""What is read of a config is noted, so that a field is looked at only from where it is read on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from compat.child.adapters.configs import config_values, noted_reads
from compat.child.effects import effects


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

    def __delattr__(cls, name: str) -> None:
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


@pytest.mark.parametrize("kind", [Table, Renamed])
def test_every_field_counts_as_read_where_reads_cannot_be_seen(kind):
    with noted_reads(kind) as seen:
        assert "width" in seen


def test_a_class_that_lets_nobody_change_it_is_watched_and_left_as_it_was():
    with noted_reads(Final) as seen:
        assert "width" not in seen and Final().width == 8 and "width" in seen
    assert "__getattribute__" not in vars(Final)


@dataclasses.dataclass
class Settings:
    width: int = 8
    told: int = 3
    limit: int = 5
    idle: int = 7


class Restless(torch.nn.Module):
    """Draws where it should not, moves a buffer in training, and reads fields that do nothing."""

    def __init__(self, cfg: Settings) -> None:
        super().__init__()
        self.cfg, self.norm = cfg, torch.nn.BatchNorm1d(4)
        self.layer = torch.nn.Linear(4, cfg.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.layer(self.norm(x)), 0.5)


class Adapter:
    """As much of one as `effects` asks."""

    device, tokenizer, config = "cpu", None, Settings()

    class subject:
        config_class = Settings

        @staticmethod
        def function(name: str) -> None:
            return None

    def build_model(self, config: Settings, load_backbone: bool = False) -> Restless:
        return Restless(config)

    def find_tokenizer(self) -> None:
        return None

    def batch(self, rows: list, padding: str = "left") -> torch.Tensor:
        return torch.arange(8.0).reshape(2, 4)

    def logits(self, batch: torch.Tensor) -> list[torch.Tensor]:
        return [self.model(batch)]

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch).sum() + 0 * self.model.cfg.told

    def generate(self, batch: torch.Tensor, new: int) -> list:
        return self.model(batch).tolist()[: max(1, self.model.cfg.limit)]


def test_a_look_that_was_left_out_changes_no_later_one():
    found = effects(Adapter.subject, Adapter(), [{}], {})
    assert found == {"width": "changes", "told": "nothing", "limit": "nothing", "idle": "nothing"}
