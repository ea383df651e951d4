"""Weights: does what A saved load into B, strictly, and mean the same there."""

from __future__ import annotations

from compat.matchers.change import Change, Hit, differs, part, same


def unsaved(change: Change) -> bool:
    """A buffer that no side writes into a state dict: nobody's file knows of it."""
    sides = [value for value in (change.old, change.new) if isinstance(value, dict)]
    return bool(sides) and all(part(value, "persistent") is False for value in sides)


def key_removed(change: Change) -> Hit | None:
    if change.removed and change.name not in change.pair.renamed:
        return Hit(shape_of(change.old), change.new)
    return None


def key_renamed(change: Change) -> Hit | None:
    new = change.pair.renamed.get(change.name)
    return Hit(change.name, new) if change.removed and new else None


def key_required(change: Change) -> Hit | None:
    if not change.added or change.name in change.pair.renamed.values() or change.pair.loads_by_tie(change.new):
        return None
    return Hit(change.old, shape_of(change.new))


def tied_key_added(change: Change) -> Hit | None:
    if change.added and change.name not in change.pair.renamed.values() and change.pair.loads_by_tie(change.new):
        return Hit(change.old, f"tied to {change.new['tied_to']}")
    return None


def key_reshaped(change: Change) -> Hit | None:
    return differs(change, "shape")


def dtype(change: Change) -> Hit | None:
    return differs(change, "dtype")


def persistence(change: Change) -> Hit | None:
    return differs(change, "persistent")


def trainable(change: Change) -> Hit | None:
    return differs(change, "trainable")


def _tie(change: Change) -> tuple[Hit | None, bool, bool]:
    hit = differs(change, "tied_to")
    old, new = (hit.old, hit.new) if hit else (None, None)
    return hit, isinstance(old, str), isinstance(new, str)


def tie_broken(change: Change) -> Hit | None:
    hit, before, after = _tie(change)
    return hit if before and not after else None


def tie_made(change: Change) -> Hit | None:
    hit, before, after = _tie(change)
    return hit if after and not before else None


def tie_moved(change: Change) -> Hit | None:
    hit, before, after = _tie(change)
    return hit if before and after else None


def saved_key_removed(change: Change) -> Hit | None:
    return Hit(shape_of(change.old), change.new) if change.removed else None


def saved_key_added(change: Change) -> Hit | None:
    return Hit(change.old, shape_of(change.new)) if change.added else None


def saved_tensor(change: Change) -> Hit | None:
    return differs(change, "shape", "dtype")


def saved_alias(change: Change) -> Hit | None:
    return Hit(change.old, change.new)


def _missing(value) -> set[str]:
    listed = part(value, "missing")
    return {str(item) for item in listed} if isinstance(listed, list) else set()


def _loaded(value) -> int | None:
    """How many were loaded, whichever way the lock says it."""
    loaded = part(value, "loaded")
    if isinstance(loaded, list | dict):
        return len(loaded)
    return int(loaded) if isinstance(loaded, int) else None


def _fewer(old, new) -> bool:
    before, after = _loaded(old), _loaded(new)
    return before is not None and after is not None and after < before


def backbone_missing(change: Change) -> Hit | None:
    if not change.both or not (_missing(change.new) - _missing(change.old) or _fewer(change.old, change.new)):
        return None
    return Hit(change.old, change.new)


def backbone_found(change: Change) -> Hit | None:
    if not change.both or _missing(change.new) - _missing(change.old):
        return None
    found = _missing(change.old) - _missing(change.new) or _fewer(change.new, change.old)
    return Hit(change.old, change.new) if found else None


def backbone_weights(change: Change) -> Hit | None:
    """Of a key that is filled from a file on one side at least."""
    if not change.both:
        return Hit("no file's" if change.added else "a file's", "no file's" if change.removed else "a file's")
    size = change.pair.apart(change.old, change.new, "activation")
    return None if size is None else Hit("the file's numbers", f"off by {size:.2g} of their size", size)


def backbone_weights_follow(change: Change) -> str | None:
    if change.name in change.pair.causes:
        return change.pair.causes[change.name]
    return "" if backbone_weights(change) is None else None


def shape_of(value) -> str:
    """[32, 64] float32, as a finding shows a tensor."""
    shape, kind = part(value, "shape"), part(value, "dtype")
    return f"{list(shape)} {kind}" if isinstance(shape, list) else str(value)


def state_follows(change: Change) -> str | None:
    if unsaved(change):
        return ""
    if change.added and change.name in change.pair.renamed.values():
        return "LOAD.key_renamed"
    return None


def saved_follows(change: Change) -> str | None:
    """A file holds what the model holds: what happened to the model's key is not said again of the file."""
    partners = [value for value in (change.old, change.new) if isinstance(value, str)]
    return next((change.pair.causes[key] for key in (change.name, *partners) if key in change.pair.causes), None)


def backbones_follow(change: Change) -> str | None:
    """The same tensors under other names, or in another order, were loaded."""
    quiet = change.both and _missing(change.old) == _missing(change.new)
    return "" if quiet and same(_loaded(change.old), _loaded(change.new)) else None


RULES = {
    "state": {
        "LOAD.key_removed": key_removed,
        "LOAD.key_renamed": key_renamed,
        "LOAD.key_required": key_required,
        "LOAD.tied_key_added": tied_key_added,
        "LOAD.key_reshaped": key_reshaped,
        "LOAD.dtype": dtype,
        "LOAD.persistence": persistence,
        "LOAD.tie_broken": tie_broken,
        "LOAD.tie_made": tie_made,
        "LOAD.tie_moved": tie_moved,
        "TRAIN.trainable": trainable,
    },
    "saved": {
        "LOAD.saved_key_removed": saved_key_removed,
        "LOAD.saved_key_added": saved_key_added,
        "LOAD.saved_tensor": saved_tensor,
    },
    "saved_alias": {"LOAD.saved_alias": saved_alias},
    "backbones": {"LOAD.backbone_missing": backbone_missing, "LOAD.backbone_found": backbone_found},
    "backbone_weights": {"LOAD.backbone_weights": backbone_weights},
    "backbone_weights_resized": {"LOAD.backbone_weights": backbone_weights},
}
FOLLOWS = {
    "state": state_follows,
    "saved": saved_follows,
    "saved_alias": saved_follows,
    "backbones": backbones_follow,
    "backbone_weights": backbone_weights_follow,
    "backbone_weights_resized": backbone_weights_follow,
}
