"""Pictures and words before the model sees them: tokens, templates, tiles, labels. Little of it ever raises."""

from __future__ import annotations

from typing import Any

from compat.matchers.change import ABSENT, Change, Hit, changed_parts, differs, part, same

OVERSHOOT = 0.05  # of the range of A's pixels


def _special(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (value, ABSENT)


def special_removed(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.removed else None


def special_added(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.added else None


def special_moved(change: Change) -> Hit | None:
    old, new = _special(change.old), _special(change.new)
    return Hit(old[1], new[1]) if change.both and not same(old[1], new[1]) else None


def special_text(change: Change) -> Hit | None:
    old, new = _special(change.old), _special(change.new)
    return Hit(old[0], new[0]) if change.both and same(old[1], new[1]) else None


def tokens(change: Change) -> Hit | None:
    """Ids of a fixed text; what follows from moved special tokens is said of those."""
    return Hit(change.old, change.new) if change.both else None


def tokens_follow(change: Change) -> str | None:
    before, after = (side.get("tokenizer.special", {}) for side in (change.pair.of_a, change.pair.of_b))
    moves = {_special(before[name])[1]: _special(after[name])[1] for name in before if name in after}
    moved = any(not same(old, new) for old, new in moves.items())
    return "DATA.special_token_moved" if moved and same(_renumbered(change.old, moves), change.new) else None


def _renumbered(value: Any, moves: dict) -> Any:
    if isinstance(value, list):
        return [_renumbered(item, moves) for item in value]
    if isinstance(value, dict):
        return {name: _renumbered(item, moves) for name, item in value.items()}
    return moves.get(value, value)


def tiles(change: Change) -> Hit | None:
    return differs(change, "tiles", "grid")


def tile_size(change: Change) -> Hit | None:
    return differs(change, "tile_size")


def pixel_range(change: Change) -> Hit | None:
    """Another scaling. A filter that overshoots by a little is a change of pixels, not of their range."""
    if not change.both:
        return None
    old, new = ([part(value, end) for end in ("low", "high")] for value in (change.old, change.new))
    if not all(isinstance(end, int | float) for end in (*old, *new)):
        return Hit(old, new) if not same(old, new) else None
    allowed = OVERSHOOT * (old[1] - old[0])
    return Hit(old, new) if any(abs(x - y) > allowed for x, y in zip(old, new, strict=True)) else None


def image_tokens(change: Change) -> Hit | None:
    """The picture's tokens in the prompt, where the tiles do not already explain them."""
    return None if tiles(change) else differs(change, "image_tokens")


def pixels(change: Change) -> Hit | None:
    if not change.both or not change.name.endswith(".pixels"):
        return None
    size = change.pair.apart(change.old, change.new, "pixels")
    return None if size is None else Hit("the same pixels", _off(size), size)


def processor_follows(change: Change) -> str | None:
    picture, is_pixels, _ = change.name.partition(".pixels")
    if not is_pixels:
        if not change.both or any(rule(change) for rule in RULES["processor"].values()):
            return None
        if not changed_parts(change) <= {"low", "high"}:
            return None
        old, new = (side.get(f"{change.path}.pixels", ABSENT) for side in (change.pair.a, change.pair.b))
        return "DATA.pixels" if change.pair.apart(old, new, "pixels") is not None else ""  # by less than anybody sees
    if not change.both:
        return None
    path = f"processor.{picture}"
    a, b = change.pair.a, change.pair.b
    shape = Change(path, "processor", picture, a.get(path, ABSENT), b.get(path, ABSENT), change.pair)
    for rule, matcher in (("DATA.tiles", tiles), ("DATA.tile_size", tile_size), ("DATA.pixel_range", pixel_range)):
        if shape.both and matcher(shape):
            return rule
    return None if pixels(change) else ""


def _off(size: float) -> str:
    return "another shape, or NaN" if size == float("inf") else f"off by {size:.2g} of their size"


def _count(value: Any, name: str) -> Any:
    count = part(value, name)
    return count if isinstance(count, int) else ABSENT


def no_labels(change: Change) -> Hit | None:
    """A row that taught something teaches nothing."""
    old, new = _count(change.old, "supervised"), _count(change.new, "supervised")
    return Hit(old, new) if change.both and old is not ABSENT and old > 0 and new == 0 else None


def labels(change: Change) -> Hit | None:
    return None if no_labels(change) else differs(change, "supervised", "labels_text", "shift")


def features_mismatch(change: Change) -> Hit | None:
    """As many image tokens as features, and now another number."""
    pairs = [(_count(value, "image_tokens"), _count(value, "features")) for value in (change.old, change.new)]
    (a, b), (c, d) = pairs
    if not change.both or ABSENT in (a, b, c, d) or a != b or c == d:
        return None
    return Hit(f"{a} tokens, {b} features", f"{c} tokens, {d} features")


def row_image_tokens(change: Change) -> Hit | None:
    return None if features_mismatch(change) else differs(change, "image_tokens", "features")


def packing(change: Change) -> Hit | None:
    """A pack that was made otherwise, or is one more or less, of rows that are the same."""
    return Hit(change.old, change.new)


def packing_follows(change: Change) -> str | None:
    """Packs of rows that are themselves others are told where the rows are."""
    for name, old, new in change.pair.both("data"):
        row = Change(f"data.{name}", "data", name, old, new, change.pair)
        for rule, matcher in RULES["data"].items():
            if not same(old, new) and matcher(row):
                return rule
    return None


RULES = {
    "packed": {"DATA.packing": packing},
    "tokenizer.special": {
        "DATA.special_token_removed": special_removed,
        "DATA.special_token_added": special_added,
        "DATA.special_token_moved": special_moved,
        "DATA.special_token_text": special_text,
    },
    "tokenizer.text": {"DATA.tokenization": tokens},
    "tokenizer.chat": {"DATA.template": tokens},
    "processor": {
        "DATA.tiles": tiles,
        "DATA.tile_size": tile_size,
        "DATA.pixel_range": pixel_range,
        "DATA.image_string": image_tokens,
        "DATA.pixels": pixels,
    },
    "data": {
        "DATA.no_labels": no_labels,
        "DATA.labels": labels,
        "DATA.features_mismatch": features_mismatch,
        "DATA.image_tokens": row_image_tokens,
    },
}
FOLLOWS = {
    "packed": packing_follows,
    "tokenizer.text": tokens_follow,
    "tokenizer.chat": tokens_follow,
    "processor": processor_follows,
}
