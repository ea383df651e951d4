"""What a forward pass and a training step cost. Cheaper is additive; FLOPs and parameters are exact."""

from __future__ import annotations

from compat.matchers.change import Change, Hit


def _numbers(change: Change) -> bool:
    return all(isinstance(value, int | float) for value in (change.old, change.new))


def _rise(change: Change) -> float:
    return change.new - change.old if _numbers(change) else 0.0


def _hit(change: Change) -> Hit:
    share = f" ({_rise(change) / change.old:+.1%})" if change.old else ""
    return Hit(change.old, f"{change.new}{share}")


def parameters(change: Change) -> Hit | None:
    return _hit(change) if change.name == "parameters" and _rise(change) > 0 else None


def fewer_parameters(change: Change) -> Hit | None:
    return _hit(change) if change.name == "parameters" and _rise(change) < 0 else None


def flops(change: Change) -> Hit | None:
    """Of all operators together: work that moved from one kind to another is the same work."""
    return _hit(change) if _is_total(change) and _rise(change) > 0 else None


def fewer_flops(change: Change) -> Hit | None:
    return _hit(change) if _is_total(change) and _rise(change) < 0 else None


def _is_total(change: Change) -> bool:
    return change.name.rpartition(".")[2] == "total"


def flops_follow(change: Change) -> str | None:
    total = f"cost.flops.{change.name.rpartition('.')[0]}.total".replace("..", ".")
    held = total in change.pair.a and total in change.pair.b
    return "" if held and not _is_total(change) else None


def peak(change: Change) -> Hit | None:
    return _hit(change) if _rise(change) > _allowed(change) else None


def lower_peak(change: Change) -> Hit | None:
    return _hit(change) if -_rise(change) > _allowed(change) else None


def _allowed(change: Change) -> float:
    table = change.pair.tolerance("peak")
    return max(table["relative"] * change.old, table["floor"]) if _numbers(change) else 0.0


def peak_follows(change: Change) -> str | None:
    return "" if _numbers(change) and not peak(change) and not lower_peak(change) else None


def cost_follows(change: Change) -> str | None:
    """How many operators run is information: fusing them or writing them out changes nobody's result."""
    return "" if change.name == "operators" else None


RULES = {
    "cost": {"COST.parameters": parameters, "COST.fewer_parameters": fewer_parameters},
    "cost.flops": {"COST.flops": flops, "COST.fewer_flops": fewer_flops},
    "cost.peak": {"COST.peak": peak, "COST.lower_peak": lower_peak},
}
FOLLOWS = {"cost": cost_follows, "cost.flops": flops_follow, "cost.peak": peak_follows}
