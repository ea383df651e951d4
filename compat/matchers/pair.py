"""The two locks side by side: what several matchers need to know of the whole, each worked out once.

Weights are drawn by key name, so numbers of two models whose keys differ are not comparable; and one cause
shows in many facts (a removed key has no gradient either). `causes` names the rule that already tells of it.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from compat.matchers.change import ABSENT, part, same
from compat.ranges import numbers_of

TOLERANCES = Path(__file__).parents[1] / "tolerances.toml"
SECTIONS = (
    "crossing", "config.field", "config.effect", "config.derived", "train_config.field", "train_config.derived",
    "train_config.schedule", "train_config.rate", "script", "state", "saved", "saved_alias", "init", "signature",
    "returns", "tokenizer.special", "tokenizer.text", "tokenizer.chat", "processor", "data", "numbers", "greedy",
    "sampling", "dropout", "gradient", "loss_curve", "activation", "refusals", "packed", "backbone_weights_resized",
    "backbone_weights", "backbones", "cost.flops", "cost.peak", "cost",
)  # fmt: skip
REMADE = {"shape": "LOAD.key_reshaped", "persistent": "LOAD.persistence", "dtype": "LOAD.dtype"}


@cache
def section_of(path: str) -> tuple[str, str]:
    """("config.field", "lm_hidden_dim"); a path of no section that we know is its own: ("", path)."""
    for section in SECTIONS:
        if path == section or path.startswith(section + "."):
            return section, path[len(section) + 1 :]
    return "", path


@cache
def tolerances() -> dict:
    return read_tolerances(TOLERANCES)


def read_tolerances(path: Path) -> dict:
    with open(path, "rb") as file:
        return tomllib.load(file)


class Pair:
    """facts of A and B, each {path: value}; devices: where they were measured."""

    crossed = False  # B's numbers are under A's weights, whatever the keys
    promised = False  # that B's files load in A

    def __init__(self, a: dict, b: dict, devices: tuple[str, str] = ("cpu", "cpu"), allowed: dict | None = None):
        self.a, self.b, self.devices = a, b, devices
        self.of_a, self.of_b = _by_section(a), _by_section(b)
        self.allowed = allowed or tolerances()

    def both(self, section: str) -> Iterator[tuple[str, Any, Any]]:
        """(name, old, new) of every fact of a section that both sides hold."""
        b = self.of_b.get(section, {})
        return ((name, old, b[name]) for name, old in self.of_a.get(section, {}).items() if name in b)

    # -- measured values -----------------------------------------------------------------------------------

    def tolerance(self, *quantity: str) -> dict:
        """The looser of the two devices' entries, from tolerances.toml."""
        table = self.allowed
        for name in quantity:
            table = table[name]
        rows = [table[device.partition(":")[0]] for device in self.devices]
        return {name: max(row[name] for row in rows) for name in rows[0]}

    def apart(self, old: Any, new: Any, *quantity: str) -> float | None:
        """How far two numbers, or lists of them, lie apart relative to their size; None when equal enough.

        Infinity where they cannot be compared: another length, or one is NaN and the other is not.
        """
        if same(old, new):
            return None
        olds, news = _numbers(old), _numbers(new)
        if olds is None or news is None or len(olds) != len(news):
            return math.inf
        allowed = self.tolerance(*quantity)
        scale = max(_rms(olds), _rms(news))
        difference = max((abs(x - y) for x, y in zip(olds, news, strict=True)), default=0.0)
        if not math.isfinite(scale) or math.isnan(difference):
            return math.inf
        return None if difference <= max(allowed["relative"] * scale, allowed["floor"]) else difference / scale

    @cached_property
    def global_norm(self) -> float:
        norms = [_numbers(value) or [] for value in self.of_a.get("gradient", {}).values()]
        return math.sqrt(sum(x * x for norm in norms for x in norm if math.isfinite(x)))

    def case_differs(self, case: str) -> float | None:
        """How far the logits of a case lie apart; None where they agree or a side has none."""
        quantity = ("logits", "bf16" if case.startswith("bf16") else "fp32")
        sizes = []
        for fact in ("logits", "rms"):
            old, new = self.a.get(f"numbers.{case}.{fact}", ABSENT), self.b.get(f"numbers.{case}.{fact}", ABSENT)
            if old is not ABSENT and new is not ABSENT:
                sizes.append(self.apart(old, new, *quantity))
        return max((size for size in sizes if size is not None), default=None)

    @cached_property
    def first_difference(self) -> str:
        """The first module whose output differs, and the last before it that agrees; empty when all agree.

        A module that holds a differing one differs because of it, so the innermost is named.
        """
        modules: dict[str, Any] = {}
        for name, value in sorted(self.of_b.get("activation", {}).items()):
            modules.setdefault(name.partition(".")[2], value)
        calls = [
            (name.partition(".")[2], self.apart(value, modules[name.partition(".")[2]], "activation") is not None)
            for name, value in sorted(self.of_a.get("activation", {}).items())
            if name.partition(".")[2] in modules
        ]
        differing = {module for module, differs in calls if differs}
        around = {
            ".".join(parts[:end]) for parts in (module.split(".") for module in differing) for end in range(len(parts))
        }
        agreed = ""
        for module, differs in calls:
            if differs and module not in around:
                return f"{module or 'the model itself'}" + (f" ({agreed} before it agrees)" if agreed else "")
            if not differs:
                agreed = module
        return ""

    # -- keys ----------------------------------------------------------------------------------------------

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Lost key -> new key of the same shape, dtype, kind and layer numbers: suspected, not proved."""
        places: dict[tuple, list[str]] = {}
        for key, value in self.of_b.get("state", {}).items():
            if key not in self.of_a.get("state", {}):
                places.setdefault(_kind(key, value), []).append(key)
        found = {}
        for key, value in self.of_a.get("state", {}).items():
            if key in self.of_b.get("state", {}):
                continue
            free = places.get(_kind(key, value), [])
            best = max(free, key=lambda other: (alike(key, other), -free.index(other)), default="")
            if best and alike(key, best):
                found[key] = best
                free.remove(best)
        return found

    @cached_property
    def causes(self) -> dict[str, str]:
        """Key -> the rule that tells of its change: what else changed of that key follows from it."""
        a, b, found = self.of_a.get("state", {}), self.of_b.get("state", {}), {}
        for old, new in self.renamed.items():
            found[old] = found[new] = "LOAD.key_renamed"
        for key in a:
            if key not in b:
                found.setdefault(key, "LOAD.key_removed")
        for key, value in b.items():
            if key not in a:
                found.setdefault(key, "LOAD.tied_key_added" if self.loads_by_tie(value) else "LOAD.key_required")
        for key, old, new in self.both("state"):
            for name, rule in REMADE.items():
                if not same(part(old, name), part(new, name)):
                    found.setdefault(key, rule)
            was, now = part(old, "tied_to"), part(new, "tied_to")
            if not same(was, now):
                ties = [isinstance(tied, str) for tied in (was, now)]
                rule = "LOAD.tie_moved" if all(ties) else "LOAD.tie_broken" if ties[0] else "LOAD.tie_made"
                for tied in (key, was, now):
                    if isinstance(tied, str):
                        found.setdefault(tied, rule)
        return found

    def loads_by_tie(self, value: Any) -> bool:
        """A new key that is another name of a tensor A has: files store tied tensors once."""
        return part(value, "tied_to") in self.of_a.get("state", {})

    @cached_property
    def redrawn(self) -> bool:
        """The two models cannot have been given the same weights."""
        if self.crossed:
            return False
        kept = {"LOAD.persistence", "LOAD.tied_key_added", "LOAD.dtype"}
        return any(rule not in kept and not self._unsaved(key) for key, rule in self.causes.items())

    def _unsaved(self, key: str) -> bool:
        held = [facts["state"][key] for facts in (self.of_a, self.of_b) if key in facts.get("state", {})]
        return all(part(value, "persistent") is False for value in held)

    # -- calls ---------------------------------------------------------------------------------------------

    @cached_property
    def calls(self) -> tuple[dict[str, dict], dict[str, dict]]:
        """Of A and of B: {method: {argument: fact}}."""
        found = []
        for facts in (self.of_a, self.of_b):
            methods: dict[str, dict] = {}
            for name, value in facts.get("signature", {}).items():
                method, _, argument = name.rpartition(".")
                methods.setdefault(method, {})[argument] = value
            found.append(methods)
        return found[0], found[1]


def _by_section(facts: dict) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for path, value in facts.items():
        section, name = section_of(path)
        found.setdefault(section, {})[name] = value
    return found


def _kind(key: str, value: Any) -> tuple:
    stated = [repr(part(value, name)) for name in ("shape", "dtype", "persistent", "trainable")]
    return (*stated, numbers_of(key))


def alike(one: str, other: str) -> int:
    """How many components two names share at their beginning and at their end."""
    a, b = one.split("."), other.split(".")
    shared = 0
    for pairs in (zip(a, b, strict=False), zip(reversed(a), reversed(b), strict=False)):
        for x, y in pairs:
            if x != y:
                break
            shared += not x.isdigit()
    return shared


def _numbers(value: Any) -> list[float] | None:
    """A number or nested lists of them, flat; NaN and infinities may be strings. None for anything else."""
    if isinstance(value, list):
        inner = [_numbers(item) for item in value]
        return None if None in inner else [x for numbers in inner for x in numbers or ()]
    if isinstance(value, str):
        return [float(value)] if value.lower() in ("nan", "inf", "-inf") else None
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rms(numbers: list[float]) -> float:
    return math.sqrt(sum(x * x for x in numbers) / len(numbers)) if numbers else 0.0
