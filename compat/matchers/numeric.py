"""Measured values: logits, tokens, gradients, loss, cost. Equal means within tolerances.toml.

One cause is told once: when plain fp32 logits differ, so do the padded ones, the gradients and the loss, and
those are listed with it. Each rule of a case fires where that case alone went astray.
"""

from __future__ import annotations

import math
from typing import Any

from compat.matchers.change import ABSENT, Change, Hit, part, same

PLAIN = "fp32"
CASES = {
    "bf16": "NUMERIC.bf16",
    "bf16_longest": "NUMERIC.bf16",
    "left_padded": "NUMERIC.padding",
    "right_padded": "NUMERIC.padding",
    "text_only": "NUMERIC.text_only",
    "two_images": "NUMERIC.images",
    "small_embeddings": "NUMERIC.small_values",
    "train_mode": "NUMERIC.train_mode",
    "longest": "NUMERIC.long_sequences",
    "past_longest": "NUMERIC.long_sequences",
    "packed": "NUMERIC.packing",
    "wide_picture": "NUMERIC.wide_pictures",
    "choice": "NUMERIC.choices",
}


def rule_of(case: str) -> str:
    return CASES.get(case.partition(" ")[0], "NUMERIC.logits")  # "choice pool=pool_max" is a choice


def logits(rule: str):
    def matcher(change: Change) -> Hit | None:
        """Fires at .logits, or at .rms where the two sketches agree and only the size does not."""
        case, _, fact = change.name.rpartition(".")
        if change.pair.redrawn or not change.both or fact not in ("logits", "rms") or rule_of(case) != rule:
            return None
        size = change.pair.case_differs(case)
        if size is None or (fact == "rms" and _sketch_differs(change, case)):
            return None
        return Hit(_size(change.pair.a, case), f"{_size(change.pair.b, case)}, {off_by(size)}", size)

    return matcher


def _sketch_differs(change: Change, case: str) -> bool:
    old, new = (side.get(f"numbers.{case}.logits") for side in (change.pair.a, change.pair.b))
    return not same(old, new)


def _size(facts: dict, case: str) -> str:
    rms = facts.get(f"numbers.{case}.rms")
    return f"RMS {rms:.6g}" if isinstance(rms, int | float) else "logits" if rms is None else f"RMS {rms}"


def off_by(size: float) -> str:
    return "another shape, or NaN" if size == math.inf else f"off by {size:.2g} of its size"


def not_comparable(change: Change) -> Hit | None:
    """Keys differ, so the weights drawn by key name do: nothing can be said of the numbers, and that is said."""
    if not change.pair.redrawn or not change.both or change.name != f"{PLAIN}.logits":
        return None
    return Hit("weights drawn by key name", "other keys, other weights") if _differs(change) else None


def _differs(change: Change) -> bool:
    return change.pair.apart(change.old, change.new, "logits", PLAIN) is not None


def loss(change: Change) -> Hit | None:
    """The loss of logits that agree."""
    if not change.both or not change.name.endswith(".loss"):
        return None
    return measured(change, "loss_bf16" if change.name.startswith("bf16") else "loss")


def bf16(change: Change) -> Hit | None:
    return logits("NUMERIC.bf16")(change) or rounding(change)


def rounding(change: Change) -> Hit | None:
    """How far bf16 logits lie from the same model's in fp32, where it grew; less is nobody's loss."""
    if not change.both or not change.name.endswith(".off_fp32"):
        return None
    size = change.pair.apart(change.old, change.new, "off_fp32")
    if size is None or (isinstance(change.new, float) and change.new < change.old):
        return None
    return Hit(*(f"{value:.3g} of their size off fp32" if isinstance(value, float) else str(value)
                 for value in (change.old, change.new)), size)  # fmt: skip


def loss_precision(change: Change) -> Hit | None:
    return Hit(change.old, change.new) if change.both and change.name.endswith(".loss_dtype") else None


def measured(change: Change, *quantity: str) -> Hit | None:
    size = change.pair.apart(change.old, change.new, *quantity)
    return None if size is None else Hit(change.old, change.new, size)


def numbers_follow(change: Change) -> str | None:
    case, _, fact = change.name.rpartition(".")
    if case.startswith("choice ") and not change.both:
        return ""  # what is chosen by default now, or lies in another field's hands, is told of the field
    if not change.both or fact not in ("logits", "rms", "loss", "off_fp32"):
        return None
    apart = {"loss": loss, "off_fp32": rounding}.get(fact)
    if (apart(change) if apart else change.pair.case_differs(case)) is None:
        return ""
    if change.pair.redrawn:
        return None if not_comparable(change) else "NUMERIC.not_comparable"
    if fact == "loss":
        if change.pair.case_differs(PLAIN) is not None:
            return "NUMERIC.logits"
        if change.pair.case_differs(case) is not None:
            return rule_of(case)
        return "NUMERIC.loss" if case != PLAIN and _plain_loss_differs(change) else None
    if case != PLAIN and change.pair.case_differs(PLAIN) is not None:
        return "NUMERIC.logits"
    if fact == "off_fp32":
        return None if change.pair.case_differs(case) is None else rule_of(case)
    return None if logits(rule_of(case))(change) else rule_of(case)


def _plain_loss_differs(change: Change) -> bool:
    old, new = (side.get(f"numbers.{PLAIN}.loss") for side in (change.pair.a, change.pair.b))
    return old is not None and new is not None and change.pair.apart(old, new, "loss") is not None


# -- greedy tokens ---------------------------------------------------------------------------------------------


def _decided(value: Any, row: int) -> set[int]:
    decided = part(value, "decided")
    if isinstance(decided, list) and row < len(decided) and isinstance(decided[row], list):
        return set(decided[row])
    return set(decided) if isinstance(decided, list) else set()


def greedy(change: Change) -> Hit | None:
    """The first differing token of a row, where A's margin was beyond doubt; all that follows it hangs on it."""
    if not change.both or change.pair.redrawn or change.name.endswith((".margin", ".steps")):
        return None
    ids = [part(value, "ids") for value in (change.old, change.new)]
    if not all(isinstance(value, list) for value in ids):
        return None
    rows = [value if value and isinstance(value[0], list) else [value] for value in ids]
    if len(rows[0]) != len(rows[1]):
        return Hit(f"{len(rows[0])} rows", f"{len(rows[1])} rows")
    for number, (old, new) in enumerate(zip(*rows, strict=True)):
        place = next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), min(len(old), len(new)))
        if place in _decided(change.old, number) or (len(old) != len(new) and place == min(len(old), len(new))):
            where = f"row {number}, token {place}"
            return Hit(f"{where}: {_token(old, place)}", f"{where}: {_token(new, place)}")
    return None


def _token(row: list, place: int) -> str:
    return str(row[place]) if place < len(row) else "ended"


def decoding(change: Change) -> Hit | None:
    """The logits of each step, where the tokens agree."""
    if not change.both or not change.name.endswith(".steps"):
        return None
    size = change.pair.apart(change.old, change.new, "logits", "fp32")
    return None if size is None else Hit("the same logits", off_by(size), size)


def decoding_follows(change: Change) -> str | None:
    if not change.both or decoding(change) is None:
        return ""
    if change.pair.redrawn:
        return "NUMERIC.not_comparable"
    if change.pair.case_differs(PLAIN) is not None:
        return "NUMERIC.logits"
    path = change.path.removesuffix(".steps")
    old, new = change.pair.a.get(path, ABSENT), change.pair.b.get(path, ABSENT)
    tokens = Change(path, "greedy", change.name.removesuffix(".steps"), old, new, change.pair)
    return "NUMERIC.greedy" if not same(old, new) and greedy(tokens) else None


def greedy_follows(change: Change) -> str | None:
    if change.name.endswith(".steps"):
        return decoding_follows(change)
    if change.name.endswith(".margin"):
        return ""  # kept to judge by eye how decided a token was
    if not change.both:
        return None
    if change.pair.redrawn:
        return "NUMERIC.not_comparable"
    return None if greedy(change) or not _has_ids(change) else ""


def _has_ids(change: Change) -> bool:
    return all(isinstance(part(value, "ids"), list) for value in (change.old, change.new))


def sampling(change: Change) -> Hit | None:
    """Of what a token is drawn: the probabilities, how many there are, and which id the second likeliest is."""
    if not change.both or None in (change.old, change.new):
        return None
    if not change.name.endswith(".probabilities"):
        return Hit(change.old, change.new)
    return measured(change, "probabilities")


def sampling_follows(change: Change) -> str | None:
    if not change.both or sampling(change) is None:
        return "" if change.both else None
    if change.pair.redrawn:
        return "NUMERIC.not_comparable"
    return "NUMERIC.logits" if change.pair.case_differs(PLAIN) is not None else None


# -- training --------------------------------------------------------------------------------------------------


def _none(change: Change, value: Any) -> bool:
    """No gradient at all, or so little of it that fp32 cannot tell it from none."""
    if value is None:
        return True
    floor = change.pair.tolerance("gradient")["floor"] * change.pair.global_norm
    return isinstance(value, int | float) and value <= floor


def gradient_lost(change: Change) -> Hit | None:
    if not _comparable(change) or _none(change, change.old):
        return None
    gone = change.removed or _none(change, change.new)
    return Hit(change.old, change.new if change.removed else "no gradient", math.inf) if gone else None


def gradient_found(change: Change) -> Hit | None:
    if not _comparable(change) or _none(change, change.new) or change.removed:
        return None
    gained = change.added or _none(change, change.old)
    return Hit("no gradient", change.new, math.inf) if gained else None


def gradient(change: Change) -> Hit | None:
    if not change.both or not _comparable(change) or _none(change, change.old) or _none(change, change.new):
        return None
    size = change.pair.apart(change.old, change.new, "gradient")
    return None if size is None else Hit(change.old, change.new, size)


def _comparable(change: Change) -> bool:
    return not change.pair.redrawn and change.name not in change.pair.causes


def gradient_follows(change: Change) -> str | None:
    if change.name in change.pair.causes:
        return change.pair.causes[change.name]
    if not same(*(part(side.get(f"state.{change.name}"), "trainable") for side in (change.pair.a, change.pair.b))):
        return "TRAIN.trainable"
    if not change.both and (_regrouped(change) or _none(change, change.old if change.removed else change.new)):
        return ""
    if change.both and _none(change, change.old) and _none(change, change.new):
        return ""
    if change.pair.redrawn:
        return "NUMERIC.not_comparable"
    if gradient_lost(change) or gradient_found(change):
        return None
    if gradient(change) is None:
        return ""
    return _of_the_numbers(change)


def _regrouped(change: Change) -> bool:
    """Parameters held under other names than the state dict's (a fused one that reads the old keys)."""
    sides = (change.pair.of_a, change.pair.of_b)
    return any(set(side.get("gradient", {})) - set(side.get("state", side.get("gradient", {}))) for side in sides)


def _of_the_numbers(change: Change) -> str | None:
    if change.pair.case_differs(PLAIN) is not None:
        return "NUMERIC.logits"
    return "NUMERIC.loss" if _plain_loss_differs(change) else None


def dropout(change: Change) -> Hit | None:
    """A module that both sides have: its logits in evaluation, or how far training's lie apart."""
    _, _, place = change.name.partition(".")
    if place == "eval":
        return measured(change, "logits", "fp32") if change.both else None
    if change.both:
        return measured(change, "spread")
    there = change.pair.of_b if change.removed else change.pair.of_a
    module = place.removeprefix("train.")
    known = {name.partition(".")[2] for name in there.get("activation", {})}
    return Hit(change.old, change.new) if module in known else None


def dropout_follows(change: Change) -> str | None:
    if dropout(change) is None:
        return ""
    if change.pair.redrawn:
        return "NUMERIC.not_comparable"
    return "NUMERIC.logits" if change.name.endswith(".eval") and change.pair.case_differs(PLAIN) is not None else None


def loss_curve(change: Change) -> Hit | None:
    return measured(change, "loss_curve") if change.both else None


def curve_follows(change: Change) -> str | None:
    if not change.both or loss_curve(change) is None:
        return "" if change.both else None
    if change.pair.redrawn:
        return "NUMERIC.not_comparable"
    if found := _of_the_numbers(change):
        return found
    for name, old, new in change.pair.both("gradient"):
        if not same(old, new):
            other = Change(f"gradient.{name}", "gradient", name, old, new, change.pair)
            for rule in ("TRAIN.gradient_lost", "TRAIN.gradient_found", "TRAIN.gradient"):
                if RULES["gradient"][rule](other):
                    return rule
    return None


def init(change: Change) -> Hit | None:
    """Fresh weights are a sample: mean and deviation may lie a few standard errors apart."""
    if not change.both or change.name in change.pair.causes:
        return None
    (mean, std), (new_mean, new_std) = change.old, change.new
    ends = (mean, std, new_mean, new_std)
    if not all(isinstance(end, int | float) for end in ends):
        return Hit(change.old, change.new)
    shape = part(change.pair.of_a.get("state", {}).get(change.name), "shape")
    count = math.prod(shape) if isinstance(shape, list) else 1
    allowed = change.pair.tolerance("init")
    error = allowed["sigmas"] * math.hypot(std, new_std) / math.sqrt(max(count, 1))  # of the difference of means
    constant = (std <= allowed["floor"]) != (new_std <= allowed["floor"])
    means = abs(mean - new_mean) > error + allowed["floor"]
    apart = constant or means or abs(std - new_std) > error / math.sqrt(2) + allowed["floor"]
    before, after = f"mean {mean:.3g}, std {std:.3g}", f"mean {new_mean:.3g}, std {new_std:.3g}"
    return Hit(before, after) if apart else None


def init_follows(change: Change) -> str | None:
    if change.name in change.pair.causes:
        return change.pair.causes[change.name]
    return "" if (change.both and not init(change)) or not change.both else None


def silent(change: Change) -> str:
    """Activations only name where a difference begins."""
    return ""


LOGITS = {"NUMERIC.logits": logits("NUMERIC.logits"), **{rule: logits(rule) for rule in CASES.values()}}
RULES = {
    "numbers": {
        **LOGITS,
        "NUMERIC.bf16": bf16,
        "NUMERIC.not_comparable": not_comparable,
        "NUMERIC.loss": loss,
        "NUMERIC.loss_precision": loss_precision,
    },
    "greedy": {"NUMERIC.greedy": greedy, "NUMERIC.decoding": decoding},
    "sampling": {"NUMERIC.sampling": sampling},
    "dropout": {"TRAIN.dropout": dropout},
    "gradient": {
        "TRAIN.gradient_lost": gradient_lost,
        "TRAIN.gradient_found": gradient_found,
        "TRAIN.gradient": gradient,
    },
    "loss_curve": {"TRAIN.loss_curve": loss_curve},
    "init": {"TRAIN.init": init},
}
FOLLOWS = {
    "numbers": numbers_follow,
    "greedy": greedy_follows,
    "sampling": sampling_follows,
    "dropout": dropout_follows,
    "gradient": gradient_follows,
    "loss_curve": curve_follows,
    "init": init_follows,
    "activation": silent,
}
