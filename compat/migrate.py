"""A checkpoint of an old version under a new one's keys: converted, saved by the new one, read again, compared.

Unusual: the folder appears whole or not at all, after the new version itself has loaded it and, where the old version
is there to ask, after both have given the same logits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from compat.combo import Combo
from compat.crossing import LOADS, failure_text
from compat.lock import Asker, Failed
from compat.matchers.pair import Pair
from compat.process import Child
from compat.shim import Shim, suspects
from compat.witness import as_text, best_way, loaded, shapes_of

PROOF = "migration.json"
SCHEMA = 1


class NotMigrated(Exception):
    """Why there is no converted checkpoint, in one sentence."""


def migrate(source: Path, old: Child | None, new: Child, combo: Combo, folder: Path) -> list[str]:
    """Write ``folder`` and return what to say of it. Raises NotMigrated, CouldNotAsk, LockFailed, OSError."""
    asked = combo.as_dict("full")
    if as_text(loaded(new, asked, source)) == LOADS:
        return [f"{source.name} loads in {new.target.label} as it is; nothing was written"]
    into = Asker(new, {**asked, "config_from": str(source)})
    into.model = answered(into, "describe", "the target builds no model from this config.json")
    ways = suspects(shapes_of(source), answered(into, "state_dict", "the target's keys cannot be read")["keys"])
    if not ways:
        raise NotMigrated("its tensors do not explain the target's: a new one has nothing to come from")
    before = None
    if old:
        speaking = Asker(old, {**asked, "checkpoint": str(source)})
        speaking.model = into.model
        before = answered(speaking, "lock_numbers", f"{old.target.label} does not load it", rows=[into.row()])["facts"]
    way = chosen(into, ways, source, before)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.resolve().parent) as near:
        made = Path(near) / "made"
        answered(into, "convert", "the target did not save it", folder=str(source), shim=way.as_json(), to=str(made))
        again = as_text(loaded(new, asked, made))
        if again != LOADS:
            raise NotMigrated(f"the target does not load what it saved: {again}")
        after = None
        if before:
            reading = Asker(new, {**asked, "checkpoint": str(made)})
            after = answered(reading, "lock_numbers", "the converted model gives no logits", rows=[into.row()])["facts"]
            if (size := apart(before, after)) is not None:
                raise NotMigrated(f"the converted checkpoint gives other logits, off by {size:.2g} of their size")
        proof = proof_of(source, made, way, new, old, before, after)
        (made / PROOF).write_text(json.dumps(proof, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()  # empty: asked for by name
        shutil.move(made, folder)
    how = "same logits as before" if before else "every tensor used; --from OLD would compare logits"
    return [f"{folder}: {', '.join(way.kinds) or 'left-out tensors'}, loads strictly, {how} ({PROOF})", *way.told()]


def answered(asker: Asker, question: str, otherwise: str, **parameters) -> dict:
    answer = asker.ask(question, **parameters)
    if isinstance(answer, Failed):
        raise NotMigrated(f"{otherwise}: {failure_text(answer.fact)}")
    return answer


def chosen(into: Asker, ways: list[Shim], source: Path, before: dict | None) -> Shim:
    """The way that the logits prove; without them the only one that loads."""
    rows = [into.row()]
    told = {"folder": str(source), "shims": [way.as_json() for way in ways], "rows": rows}
    answers = answered(into, "try_shims", "no way could be tried", **told)["answers"]
    if before:
        way, off = best_way(ways, answers, before)
        if off is not None:
            raise NotMigrated(f"no way gives the logits of the old version; the likeliest: {off}")
        return way
    fitting = [way for way, answer in zip(ways, answers, strict=True) if "error" not in answer]
    if not fitting:
        raise NotMigrated(f"no way loads strictly; the likeliest: {answers[0]['error']}")
    if len(fitting) > 1:
        raise NotMigrated(f"{len(fitting)} ways fit by shape, and only logits tell them apart: give --from OLD")
    return fitting[0]


def apart(before: dict, after: dict) -> float | None:
    facts = [{f"numbers.fp32.{name}": side[name] for name in ("logits", "rms")} for side in (before, after)]
    return Pair(*facts).case_differs("fp32")


def proof_of(source: Path, made: Path, way: Shim, new: Child, old: Child | None, before, after) -> dict:
    """What migration.json says."""
    return {
        "schema": SCHEMA,
        "source": hashes(source),
        "made": hashes(made),
        "from": old.target.label if old else None,
        "to": new.target.label,
        "commit": new.target.commit,
        "loads": LOADS,
        "shim": way.as_json(),
        "key_mapping": way.key_mapping(),
        "logits": {"before": before, "after": after} if before else None,
        "environment": {name: (new.hello or {}).get(name) for name in ("python", "torch", "transformers", "device")},
    }


def hashes(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a checkpoint's files."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
