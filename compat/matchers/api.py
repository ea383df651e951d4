"""Configs, flags, calls and what they return: does code and JSON written for A still work with B."""

from __future__ import annotations

from typing import Any

from compat.matchers.change import ABSENT, Change, Hit, changed_parts, differs, part, same, type_names

POSITIONAL = {"positional_or_keyword", "positional_only", "positional"}
VARIADIC = {"var_positional", "var_keyword"}


# -- fields of VLMConfig and TrainConfig -----------------------------------------------------------------------


def field_removed(change: Change) -> Hit | None:
    return Hit(default_of(change.old), change.new) if change.removed else None


def field_added(change: Change) -> Hit | None:
    return Hit(change.old, change.new["default"]) if change.added and _has_default(change.new) else None


def field_required(change: Change) -> Hit | None:
    if _has_default(change.new) or change.removed or (change.both and not _has_default(change.old)):
        return None
    return Hit(default_of(change.old), "no default")


def field_default(change: Change) -> Hit | None:
    if change.both and _has_default(change.old) and _has_default(change.new):
        return differs(change, "default")
    return None


def field_type(change: Change) -> Hit | None:
    hit = differs(change, "type")
    return hit if hit and type_names(hit.old) != type_names(hit.new) else None


def field_follows(change: Change) -> str | None:
    """An annotation spelled differently, or a default given where none was: nobody's call changes."""
    if not change.both or field_type(change) or not changed_parts(change) <= {"type", "default"}:
        return None
    gained = _has_default(change.new) and not _has_default(change.old)
    return "" if gained or not differs(change, "default") else None


def _has_default(value: Any) -> bool:
    return isinstance(value, dict) and "default" in value


def default_of(value: Any) -> Any:
    if value is ABSENT:
        return value
    return value["default"] if _has_default(value) else "no default"


def _effects(change: Change) -> tuple[Any, Any]:
    return change.old, change.new


def field_stopped_acting(change: Change) -> Hit | None:
    acted = change.old == "changes" or _raises(change.old)
    return Hit(*_effects(change)) if acted and change.new == "nothing" else None


def field_acts(change: Change) -> Hit | None:
    return Hit(*_effects(change)) if _effects(change) == ("nothing", "changes") else None


def field_unread(change: Change) -> Hit | None:
    """A field that is new in B and that nothing reads."""
    new_field = f"config.field.{change.name}" not in change.pair.a
    return Hit(*_effects(change)) if change.added and new_field and change.new == "nothing" else None


def value_fails(change: Change) -> Hit | None:
    """A value that no longer works, and is not refused when the config is made either."""
    return Hit(*_effects(change)) if change.both and _raises(change.new) and not _raises(change.old) else None


def _raises(word: Any) -> bool:
    return isinstance(word, str) and word.startswith("raises ")


def value_refused(change: Change) -> Hit | None:
    return Hit(*_effects(change)) if change.new == "refused" and change.old in ("changes", "nothing") else None


def value_accepted(change: Change) -> Hit | None:
    return Hit(*_effects(change)) if change.old == "refused" and change.new in ("changes", "nothing") else None


def effect_follows(change: Change) -> str | None:
    """What could not be tried on one side says nothing; the field's own fact tells that it came or went."""
    if "not tried" in _effects(change) or change.removed:
        return ""
    if _raises(change.old) and change.new != "nothing":
        return ""  # what failed now works, or fails earlier or otherwise
    return "" if change.added and not field_unread(change) else None


def derived_removed(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.removed else None


def derived_value(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.both else None


def derived_changed(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if not change.added else None


def derived_follows(change: Change) -> str | None:
    return "" if change.added else None


def rate_follows(change: Change) -> str | None:
    """A parameter that came, went or goes by another name has another rate because of that."""
    return change.pair.causes.get(change.name) or ("" if change.added else None)


# -- flags of scripts ------------------------------------------------------------------------------------------


def _script(change: Change) -> str:
    return change.name.rpartition(".")[0]


def _scripts(facts: dict) -> set[str]:
    return {name.rpartition(".")[0] for name in facts.get("script", {})}


def script_removed(change: Change) -> Hit | None:
    gone = change.removed and _script(change) not in _scripts(change.pair.of_b)
    return Hit("a script", change.new, path=f"script.{_script(change)}") if gone else None


def flag_removed(change: Change) -> Hit | None:
    return Hit("a flag", change.new) if change.removed and not script_removed(change) else None


def flag_added(change: Change) -> Hit | None:
    return Hit(change.old, default_of(change.new)) if change.added else None


def flag_default(change: Change) -> Hit | None:
    return differs(change, "default")


def flag_type(change: Change) -> Hit | None:
    return differs(change, "type", "action")


# -- signatures and returns ------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    return str(part(value, "kind")).lower().replace(" ", "_").replace("-", "_")


def _positional(arguments: dict) -> list[str]:
    """Names of the arguments that may be given by position, in order."""
    taken = [name for name, value in arguments.items() if _kind(value) in POSITIONAL]
    return sorted(taken, key=lambda name: arguments[name]["position"])


def _call(change: Change) -> tuple[str, dict, dict]:
    """(argument, the method's arguments in A, in B)."""
    method, _, argument = change.name.rpartition(".")
    a, b = change.pair.calls
    return argument, a.get(method, {}), b.get(method, {})


def _other_name(argument: str, mine: dict, theirs: dict) -> str:
    """The name that stands in the place of `argument` on the other side, which does not know `argument`."""
    value = mine[argument]
    for name, other in theirs.items():
        if name in mine or not same(part(other, "position"), part(value, "position")):
            continue
        if _kind(other) == _kind(value) and same(default_of(other), default_of(value)):
            return name
    return ""


def method_removed(change: Change) -> Hit | None:
    gone = change.removed and not _call(change)[2]
    return Hit("a call", change.new, path=change.path.rpartition(".")[0]) if gone else None


def method_added(change: Change) -> Hit | None:
    came = change.added and not _call(change)[1]
    return Hit(change.old, "a call", path=change.path.rpartition(".")[0]) if came else None


def argument_renamed(change: Change) -> Hit | None:
    argument, a, b = _call(change)
    if not change.removed or _kind(change.old) in VARIADIC:
        return None
    new = _other_name(argument, a, b)
    return Hit(argument, new) if new else None


def argument_removed(change: Change) -> Hit | None:
    argument, a, b = _call(change)
    gone = change.removed and b and not _other_name(argument, a, b)
    return Hit(_shown(change.old), change.new) if gone else None


def argument_required(change: Change) -> Hit | None:
    argument, a, _ = _call(change)
    if _has_default(change.new) or change.removed or _kind(change.new) in VARIADIC or not a:
        return None
    return None if change.both and not _has_default(change.old) else Hit(_shown(change.old), _shown(change.new))


def _inserted(change: Change) -> str:
    """The first argument that callers of A give by position and that now comes later because of this one."""
    argument, a, b = _call(change)
    before, after = _positional(a), _positional(b)
    if argument in before or argument not in after:
        return ""
    return next((name for name in after[after.index(argument) + 1 :] if name in before), "")


def argument_inserted(change: Change) -> Hit | None:
    moved = _inserted(change)
    if change.removed or not moved or not _has_default(change.new):
        return None
    return Hit(_shown(change.old), f"before {moved}")


def argument_moved(change: Change) -> Hit | None:
    """The order among the arguments that both sides take by position is another."""
    argument, a, b = _call(change)
    orders = [[name for name in _positional(side) if name in a and name in b] for side in (a, b)]
    common = [[name for name in order if name in orders[1 - place]] for place, order in enumerate(orders)]
    if not change.both or argument not in common[0]:
        return None
    places = [order.index(argument) for order in common]
    return Hit(f"place {places[0]}", f"place {places[1]}") if places[0] != places[1] else None


def argument_added(change: Change) -> Hit | None:
    argument, a, _ = _call(change)
    harmless = change.added and a and (_has_default(change.new) or _kind(change.new) in VARIADIC)
    return Hit(change.old, _shown(change.new)) if harmless and not _inserted(change) else None


def _kinds(change: Change) -> tuple[set[str], set[str]]:
    """The ways, by position and by name, in which A and B take the argument."""
    ways = []
    for value in (change.old, change.new):
        kind = _kind(value)
        by_name = kind in ("positional_or_keyword", "keyword_only")
        ways.append({*(["position"] if kind in POSITIONAL else []), *(["name"] if by_name else [])})
    return ways[0], ways[1]


def argument_kind(change: Change) -> Hit | None:
    before, after = _kinds(change)
    return differs(change, "kind") if change.both and before - after else None


def argument_default(change: Change) -> Hit | None:
    if change.both and _has_default(change.old) and _has_default(change.new):
        return differs(change, "default")
    return None


def config_follows(change: Change) -> str | None:
    """A config is built by keyword, or from JSON: its arguments are its fields, and their order is nobody's."""
    field = f"config.field.{change.name.partition('.')[2]}"
    old, new = change.pair.a.get(field, ABSENT), change.pair.b.get(field, ABSENT)
    if old is ABSENT and new is ABSENT:
        return None
    if new is ABSENT:
        return "LOAD.config_field_removed"
    if old is ABSENT:
        return "API.config_field_added" if _has_default(new) else "LOAD.config_field_required"
    return "API.config_default" if not same(default_of(old), default_of(new)) else ""


def call_follows(change: Change) -> str | None:
    """Places that moved because of another argument, names of *args, calls made more tolerant."""
    if change.name.startswith("config.") and config_follows(change) is not None:
        return config_follows(change)
    argument, a, b = _call(change)
    if not change.both:
        if _kind(change.new if change.added else change.old) in VARIADIC and a and b:
            kinds = [{_kind(value) for value in side.values()} & VARIADIC for side in (a, b)]
            return "" if kinds[0] == kinds[1] else None
        return "API.argument_renamed" if change.added and a and _other_name(argument, b, a) else None
    told = any(rule(change) for rule in CALLS.values())
    return None if told or not changed_parts(change) <= {"position", "kind", "default"} else ""


def _shown(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = _kind(value).replace("_", " ").replace("positional or keyword", "")
    default = f"= {value['default']!r}" if "default" in value else "" if kind.startswith("var") else "no default"
    return f"{default}, {kind}".strip(", ")


def returns_removed(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.removed else None


def _items(value: Any) -> list | None:
    items = part(value, "items")
    return items if isinstance(items, list) else None


def returns_arity(change: Change) -> Hit | None:
    old, new = _items(change.old), _items(change.new)
    return Hit(len(old), len(new)) if old is not None and new is not None and len(old) != len(new) else None


def returns_type(change: Change) -> Hit | None:
    return None if returns_arity(change) else differs(change, "type")


def returns_shape(change: Change) -> Hit | None:
    return None if returns_arity(change) or returns_type(change) else differs(change, "items", "shape", "dtype")


def returns_follow(change: Change) -> str | None:
    a, b = change.pair.calls
    if change.added:
        return ""
    method = change.name.removesuffix("_with_targets")
    gone = change.removed and method in a and method not in b
    return "API.method_removed" if gone else None


def refusal(change: Change) -> Hit | None:
    """Of the facts of both sides: the type that is raised, or "accepted"."""
    return Hit(change.old, change.new) if change.both else None


CALLS = {
    "API.method_removed": method_removed,
    "API.method_added": method_added,
    "API.argument_removed": argument_removed,
    "API.argument_renamed": argument_renamed,
    "API.argument_required": argument_required,
    "API.argument_inserted": argument_inserted,
    "API.argument_moved": argument_moved,
    "API.argument_added": argument_added,
    "API.argument_kind": argument_kind,
    "API.argument_default": argument_default,
}
RULES = {
    "config.field": {
        "LOAD.config_field_removed": field_removed,
        "LOAD.config_field_required": field_required,
        "API.config_field_added": field_added,
        "API.config_default": field_default,
        "API.config_type": field_type,
    },
    "config.effect": {
        "API.field_stopped_acting": field_stopped_acting,
        "API.field_acts": field_acts,
        "API.field_unread": field_unread,
        "API.value_fails": value_fails,
        "LOAD.value_refused": value_refused,
        "LOAD.value_accepted": value_accepted,
    },
    "config.derived": {"API.derived_removed": derived_removed, "API.derived_value": derived_value},
    "train_config.field": {
        "TRAIN.field_removed": field_removed,
        "TRAIN.field_required": field_required,
        "TRAIN.field_added": field_added,
        "TRAIN.default": field_default,
        "TRAIN.field_type": field_type,
    },
    "train_config.derived": {"TRAIN.derived": derived_changed},
    "train_config.schedule": {"TRAIN.derived": derived_changed},
    "train_config.rate": {"TRAIN.derived": derived_changed},
    "script": {
        "API.script_removed": script_removed,
        "API.flag_removed": flag_removed,
        "API.flag_added": flag_added,
        "API.flag_default": flag_default,
        "API.flag_type": flag_type,
    },
    "signature": CALLS,
    "refusals": {"API.refusal": refusal},
    "returns": {
        "API.returns_removed": returns_removed,
        "API.returns_arity": returns_arity,
        "API.returns_type": returns_type,
        "API.returns_shape": returns_shape,
    },
}
FOLLOWS = {
    "config.field": field_follows,
    "train_config.field": field_follows,
    "config.effect": effect_follows,
    "config.derived": derived_follows,
    "train_config.derived": derived_follows,
    "train_config.schedule": derived_follows,
    "train_config.rate": rate_follows,
    "signature": call_follows,
    "returns": returns_follow,
}
