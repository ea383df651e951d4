"""The matrix of what is judged: combos.toml, read with the standard library alone.

A combo says which backbones a run stands for. Our own model is built from its preset; a fork is built
from its own config class, and the combo then only labels the run.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

MATRIX = Path(__file__).with_name("combos.toml")
SCALES = ("tiny", "full")


class UnknownCombo(ValueError):
    """A combo name that combos.toml does not hold; the message lists those it does."""


@dataclass(frozen=True)
class Combo:
    name: str
    vision: str
    language: str
    presets: dict[str, str]
    default: bool = False

    def as_dict(self, scale: str = "tiny") -> dict[str, str]:
        """What a question carries. Raises KeyError for a scale the combo has no preset for."""
        return {
            "name": self.name,
            "vision": self.vision,
            "language": self.language,
            "preset": self.presets[scale],
            "scale": scale,
        }


def load(path: Path = MATRIX) -> dict[str, Combo]:
    """Every combo by name, in the file's order. Raises ValueError naming the combo that is wrong."""
    with open(path, "rb") as file:
        tables = tomllib.load(file)
    combos = {}
    for name, table in tables.items():
        try:
            combo = Combo(name=name, **table)
        except TypeError as error:
            raise ValueError(f"{path.name}: [{name}] {error}") from None
        missing = [scale for scale in SCALES if scale not in combo.presets]
        if missing:
            raise ValueError(f"{path.name}: [{name}] names no preset for scale {', '.join(missing)}")
        combos[name] = combo
    return combos


def choose(names: list[str] | None, path: Path = MATRIX) -> list[Combo]:
    """The combos named, each once and in the order given; without names the default ones."""
    combos = load(path)
    if not names:
        return [combo for combo in combos.values() if combo.default]
    unknown = [name for name in names if name not in combos]
    if unknown:
        raise UnknownCombo(f"no combo named {', '.join(map(repr, unknown))}; there are: {', '.join(combos)}")
    return [combos[name] for name in dict.fromkeys(names)]
