"""The witness: A's checkpoint and config.json, loaded and used in B, before anything is said of keys.

Unusual: where B does not load them, the ways in which its keys may have come from A's are tried, and the one through
which A's checkpoint gives the same logits is the proof. Both targets answer in their own processes; what goes from
one to the other is a folder.
"""

from __future__ import annotations

from pathlib import Path

from compat.combo import Combo
from compat.crossing import LOADS, WORKS, Crossing, failure_text
from compat.lock import Asker, Failed, tidy
from compat.matchers.pair import Pair
from compat.process import Child
from compat.shim import Shim, suspects

HOWS = ("positional", "keywords", "least")
PROCESSOR_FREE = 10  # names shown of a long list


def cross(
    a: Child, b: Child, locks: tuple[dict, dict], combo: Combo, scale: str, folder: Path, promised: bool = False
) -> Crossing:
    """Exchange checkpoints between two targets through ``folder``. Raises CouldNotAsk, LockFailed."""
    mine, theirs = folder / "a", folder / "b"
    asked = combo.as_dict(scale)
    old, new = Asker(a, asked), Asker(b, asked)
    old.model = old.ask("describe")
    if isinstance(old.model, Failed):
        return Crossing({}, {}, notes=[f"no checkpoint of A was loaded: {failure_text(old.model.fact)}"])
    saved = old.ask("save", folder=str(mine))
    if isinstance(saved, Failed):
        return Crossing({}, {}, notes=[f"no checkpoint of A was loaded: {failure_text(saved.fact)}"])
    facts_a: dict = {}
    facts_b: dict = {}
    own = loaded(a, asked, mine)
    if isinstance(own, Failed):  # here and now A cannot read itself: where B cannot either, it is nobody's change
        there = loaded(b, asked, mine)
        facts_b["crossing.checkpoint"] = there.fact if isinstance(there, Failed) else LOADS
        note = f"A does not load its own checkpoint: {failure_text(own.fact)}"
        return Crossing({"crossing.checkpoint": own.fact}, facts_b, notes=[note])
    facts_a["crossing.checkpoint"] = as_text(own)
    there = loaded(b, asked, mine)
    facts_b["crossing.checkpoint"] = as_text(there)
    compared_config(facts_a, facts_b, saved["config"], own, there, new, mine)
    notes: list[str] = []
    shim, source = None, mine if facts_b["crossing.checkpoint"] == LOADS else None
    if source is None:
        shim, source = shimmed(old, new, asked, mine, folder, notes)
    measured = None
    if source is not None:
        measured = under_weights(b, asked, source, old.model, locks[1])
    signatures(old, new, locks[0], facts_a, facts_b)
    back(a, b, new, asked, theirs, facts_a, facts_b)
    return Crossing(facts_a, facts_b, measured, shim, promised, notes)


def loaded(child: Child, asked: dict, folder: Path) -> dict | Failed:
    """What the target says of a model that it loaded from ``folder``."""
    return Asker(child, {**asked, "checkpoint": str(folder)}).ask("arrived", folder=str(folder))


def as_text(answer: dict | Failed) -> str:
    if isinstance(answer, Failed):
        return f"refused: {failure_text(answer.fact)}"
    said = [
        f"{what} {', '.join(answer[name][:PROCESSOR_FREE])}"
        for name, what in (("left", "not from the file:"), ("unread", "not taken from it:"))
        if answer[name]
    ]
    return "; ".join(said) or LOADS


def compared_config(facts_a, facts_b, written, own, there, new: Asker, mine: Path) -> None:
    """What became of each field of A's config.json in A and in B."""
    facts_a["crossing.config"] = "read"
    if isinstance(there, Failed):
        there = new.ask("config_reads", folder=str(mine))
        facts_b["crossing.config"] = f"refused: {failure_text(there.fact)}" if isinstance(there, Failed) else "read"
        if isinstance(there, Failed):
            return
    else:
        facts_b["crossing.config"] = "read"
    for name in written:
        if name in own["config"] and name in there["config"]:
            facts_a[f"crossing.config.{name}"] = own["config"][name]
            facts_b[f"crossing.config.{name}"] = there["config"][name]


def shimmed(old: Asker, new: Asker, asked: dict, mine: Path, folder: Path, notes: list[str]):
    """(what was tried, the folder converted through it) or (None, None) where nothing suggests itself."""
    into = Asker(new.child, {**asked, "config_from": str(mine)})
    state = into.ask("state_dict")
    if isinstance(state, Failed):
        notes.append(f"no shim was tried: B builds no model from A's config.json: {failure_text(state.fact)}")
        return None, None
    ways = suspects(shapes_of(mine), state["keys"])
    if not ways:
        return None, None
    rows = [old.row()]
    before = old.ask("lock_numbers", rows=rows)
    answers = into.ask("try_shims", folder=str(mine), shims=[way.as_json() for way in ways], rows=rows)
    if isinstance(before, Failed) or isinstance(answers, Failed):
        failed = before if isinstance(before, Failed) else answers
        notes.append(f"no shim was tried: {failure_text(failed.fact)}")
        return None, None
    way, off = best_way(ways, answers["answers"], before["facts"])
    shim = {"kinds": way.kinds, "told": way.told(), "verified": off is None, "off_by": off, **way.as_json()}
    if off is not None:
        return shim, None
    converted = folder / "converted"
    made = into.ask("convert", folder=str(mine), shim=way.as_json(), to=str(converted))
    if isinstance(made, Failed):
        notes.append(f"the converted checkpoint could not be saved: {failure_text(made.fact)}")
        return shim, None
    return shim, converted


def best_way(ways: list[Shim], answers: list[dict], before: dict) -> tuple[Shim, str | None]:
    """The first way whose logits are A's, and None; else the first that loads, and how far off it is."""
    closest: tuple[Shim, str] | None = None
    for way, answer in zip(ways, answers, strict=True):
        if "error" in answer:
            closest = closest or (way, answer["error"])
            continue
        facts = [{f"numbers.fp32.{name}": side[name] for name in ("logits", "rms")} for side in (before, answer)]
        size = Pair(*facts).case_differs("fp32")
        if size is None:
            return way, None
        if closest is None:
            closest = way, f"off by {size:.2g} of their size"
    return closest  # type: ignore[return-value]  # there is a way, so one was kept


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the safetensors files of a folder, read from their headers."""
    import json
    import struct

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        header.pop("__metadata__", None)
        found.update({name: tuple(entry["shape"]) for name, entry in header.items()})
    return found


def under_weights(b: Child, asked: dict, source: Path, model: dict, lock: dict) -> dict:
    """The lock's measured facts of B, asked of a model that was loaded from ``source``; rows as A would have them."""
    asker = Asker(b, {**asked, "checkpoint": str(source)})
    asker.model = model
    asker.numbers()
    asker.training()
    facts = tidy(asker.facts, str(b.target.folder))
    return {path: value for path, value in facts.items() if path.partition(".")[0] != "cost"}


def signatures(old: Asker, new: Asker, lock: dict, facts_a: dict, facts_b: dict) -> None:
    """Call forward and generate of both as A's signature allows."""
    rows = [old.row(10), old.row(10, seed=1, images=(1,))]
    for method in ("forward", "generate"):
        started = f"signature.{method}."
        said = {path[len(started) :]: fact for path, fact in lock["facts"].items() if path.startswith(started)}
        places = {name: fact["position"] for name, fact in said.items()}
        order = sorted(said, key=lambda name, places=places: (places[name] is None, places[name] or 0, name))
        arguments = [[name, said[name]] for name in order]
        for how in HOWS if arguments else ():
            told = {"rows": rows, "method": method, "arguments": arguments, "how": how}
            answers = [asker.ask("old_call", image_form=old.model["image_form"], **told) for asker in (old, new)]
            if isinstance(answers[0], Failed):  # A's own signature promises more than A holds
                continue
            path = f"crossing.call.{method}.{how}"
            facts_a[path] = WORKS
            failed = isinstance(answers[1], Failed)
            facts_b[path] = failure_text(answers[1].fact) if failed else WORKS


def back(a: Child, b: Child, new: Asker, asked: dict, folder: Path, facts_a: dict, facts_b: dict) -> None:
    """B's checkpoint in A: reported, and a promise only where somebody made it."""
    saved = new.ask("save", folder=str(folder))
    if isinstance(saved, Failed):
        return
    own, there = loaded(b, asked, folder), loaded(a, asked, folder)
    if isinstance(own, Failed):
        return
    facts_a["crossing.back.checkpoint"] = as_text(own)
    facts_b["crossing.back.checkpoint"] = as_text(there)
    if not isinstance(there, Failed):
        for name in saved["config"]:
            if name in own["config"] and name in there["config"]:
                facts_a[f"crossing.back.config.{name}"] = own["config"][name]
                facts_b[f"crossing.back.config.{name}"] = there["config"][name]
