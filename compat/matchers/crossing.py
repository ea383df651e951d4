"""A's checkpoint and config.json in B, B's in A, and calls as A's signature allows: what compat.witness saw."""

from __future__ import annotations

from compat.matchers.change import Change, Hit

FILES = ("checkpoint", "config")


def checkpoint_refused(change: Change) -> Hit | None:
    return _whole(change, "checkpoint", "refused: ")


def checkpoint_partial(change: Change) -> Hit | None:
    hit = _whole(change, "checkpoint", "")
    return None if checkpoint_refused(change) else hit


def config_refused(change: Change) -> Hit | None:
    return _whole(change, "config", "refused: ")


def config_value(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.both and change.name.startswith("config.") else None


def back_refused(change: Change) -> Hit | None:
    return None if change.pair.promised else _back(change)


def promise_broken(change: Change) -> Hit | None:
    return _back(change) if change.pair.promised else None


def old_call_fails(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.both and change.name.startswith("call.") else None


def _whole(change: Change, name: str, starts: str) -> Hit | None:
    if not change.both or change.name != name or not str(change.new).startswith(starts):
        return None
    return Hit(change.old, str(change.new).removeprefix(starts))


def _back(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.both and change.name.startswith("back.") else None


def follows(change: Change) -> str | None:
    """A refusal that the keys or the config explain is not told again."""
    if not change.both:
        return ""
    refused = change.name == "checkpoint" and str(change.new).startswith("refused: ")
    config = str(change.pair.b.get("crossing.config", ""))
    if config.startswith("refused: ") and (refused or change.name == "config"):
        cause = _config_cause(change, config)
        return cause if change.name == "config" else cause or "LOAD.config_refused"
    if change.name == "checkpoint":
        causes = list(change.pair.causes.values())
        return next((rule for rule in causes if rule in BREAKING), None)
    return None


def _config_cause(change: Change, refusal: str) -> str | None:
    """The removed field that the refusal names."""
    gone = change.pair.of_a.get("config.field", {}).keys() - change.pair.of_b.get("config.field", {}).keys()
    return "LOAD.config_field_removed" if any(name in refusal for name in gone) else None


BREAKING = ("LOAD.key_removed", "LOAD.key_renamed", "LOAD.key_required", "LOAD.key_reshaped", "LOAD.persistence")
RULES = {
    "crossing": {
        "LOAD.checkpoint_refused": checkpoint_refused,
        "LOAD.checkpoint_partial": checkpoint_partial,
        "LOAD.config_refused": config_refused,
        "LOAD.config_value": config_value,
        "LOAD.back_refused": back_refused,
        "LOAD.promise_broken": promise_broken,
        "API.old_call_fails": old_call_fails,
    },
}
FOLLOWS = {"crossing": follows}
