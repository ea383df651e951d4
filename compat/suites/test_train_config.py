"""The training config: typed as declared, with learning rates that train something and counts that count."""

import math

import pytest

from compat.suites.probes import named
from compat.suites.typed import mismatch

CHECK = "Train Config Compatibility"
COUNTS = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_training_steps",
    "epochs",
    "eval_interval",
    "num_workers",
)


def fields(ask):
    found = ask("train_config")["fields"]
    assert found, "the training config has no fields"
    return found


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_every_default_has_its_declared_type(ask):
    wrong = [
        f"{name}: {f['type']} = {f['default']!r}"
        for name, f in fields(ask).items()
        if mismatch(f["type"], f["default"])
    ]
    assert not wrong, f"fields declare one type and default to another: {named(wrong)}"


def test_some_learning_rate_trains_and_none_is_negative(ask):
    rates = {
        name: f["default"]
        for name, f in fields(ask).items()
        if name == "lr" or name.startswith("lr_") or "learning_rate" in name
    }
    rates = {name: value for name, value in rates.items() if value is not None}
    if not rates:
        pytest.skip("no field is named like a learning rate (lr, lr_*, *learning_rate*)")
    bad = [
        f"{name}={value!r}"
        for name, value in rates.items()
        if not is_number(value) or not math.isfinite(value) or value < 0
    ]
    assert not bad, f"learning rates that are no positive number: {named(bad)}"
    assert any(value > 0 for value in rates.values()), (
        f"every learning rate is 0: {named(list(rates))}; nothing would be trained"
    )


def test_counts_are_whole_numbers_that_count_something(ask):
    values = {
        name: f["default"] for name, f in fields(ask).items() if name in COUNTS and f["default"] is not None
    }
    if not values:
        pytest.skip(f"the training config has none of {', '.join(COUNTS)}")
    least = {name: 0 if name == "num_workers" else 1 for name in values}
    bad = [
        f"{name}={value!r}"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < least[name]
    ]
    assert not bad, f"counts that are not whole and positive: {named(bad)}"
