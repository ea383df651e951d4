"""What came of loading A's checkpoint in B, as facts beside the two locks', and what it settles among the findings.

Unusual: a suspicion is not told where the proof says otherwise. Keys may differ and old checkpoints load all the same;
a signature may differ and old calls work all the same; a default may differ and old checkpoints bring their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from compat.findings import Found
from compat.matchers.change import Hit
from compat.matchers.pair import Pair

LOADS = "loads strictly, every tensor used"
WORKS = "works"
# asked once more of B under A's weights
MEASURED = ("numbers", "greedy", "sampling", "dropout", "gradient", "loss_curve", "activation")
KEYS = ("LOAD.key_renamed", "LOAD.key_removed", "LOAD.key_required", "LOAD.key_reshaped", "LOAD.persistence")
CALLS = (
    "API.argument_removed", "API.argument_renamed", "API.argument_required", "API.argument_inserted",
    "API.argument_moved", "API.argument_kind", "API.argument_default",
)  # fmt: skip
DEFAULTS = ("API.config_default", "API.derived_value", "API.config_field_added", "LOAD.config_field_removed")


@dataclass(frozen=True)
class Crossing:
    """a, b: facts by path of A's files in A and in B. measured: of B under A's weights, None where they do not load.

    shim: {"kinds", "told", "verified", "off_by", "moves", "dropped"} of what was tried where B does not load A's file.
    promised: whether B's files loading in A is promised.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    measured: dict[str, Any] | None = None
    shim: dict | None = None
    promised: bool = False
    notes: list[str] = field(default_factory=list)

    def sides(self, a: dict, b: dict) -> tuple[dict, dict]:
        """The facts of both locks with the crossing's."""
        if self.measured is not None:
            kept = {path: value for path, value in b.items() if path.partition(".")[0] not in MEASURED}
            # what a crossing was not asked, the lock says
            rest = {path: value for path, value in b.items() if path not in kept and not self._asked(path)}
            b = kept | rest | self.measured
        return a | self.a, b | self.b

    def _asked(self, path: str) -> bool:
        section = path.partition(".")[0]
        return any(other.partition(".")[0] == section for other in self.measured or ())

    @property
    def loads(self) -> bool:
        return self.b.get("crossing.checkpoint") == LOADS

    def settle(self, found: Found, own: Pair) -> None:
        """Take back what loading and calling disproved, and tell what only they showed. own: the two locks alone."""
        if self.loads:
            move(found, KEYS, "LOAD.keys_read")
        elif self.shim:
            self._prove(found)
        for method in ("forward", "generate"):
            self._settle_calls(found, method)
        if self.measured is not None and not own.redrawn and not any(rule in found.hits for rule in DEFAULTS):
            self._fresh(found, own)

    def _prove(self, found: Found) -> None:
        """Put the proof beside the findings, and the names that it proved into them."""
        first = next((rule for rule in KEYS if rule in found.hits), None)
        if first:
            found.proofs[first] = proof_of(self.shim)
        renamed = found.hits.get("LOAD.key_renamed", {})
        for step in self.shim["moves"] if self.shim["verified"] else ():
            path = "state." + step["sources"][0]
            if path in renamed and len(step["sources"]) == len(step["targets"]) == 1:
                renamed[path] = renamed[path]._replace(new=step["targets"][0])

    def _settle_calls(self, found: Found, method: str) -> None:
        calls = [path for path in self.a if path.startswith(f"crossing.call.{method}.")]
        failing = [path for path in calls if self.a[path] == WORKS and self.b.get(path) != WORKS]
        started = f"signature.{method}."
        static = [rule for rule in CALLS if any(path.startswith(started) for path in found.hits.get(rule, ()))]
        if calls and not failing and all(self.a[path] == WORKS for path in calls):
            move(found, [rule for rule in static if rule != "API.argument_default"], "API.old_calls_work", started)
        elif failing and static:
            hits = found.hits.get("API.old_call_fails", {})
            for path in failing:
                hits.pop(path, None)
            if not hits:
                found.hits.pop("API.old_call_fails", None)
            found.proofs.setdefault(static[0], f"called as A allows: {self.b[failing[0]]}")

    def _fresh(self, found: Found, own: Pair) -> None:
        """Numbers of a model made by B itself, where those under A's checkpoint are the same."""
        if any(rule.startswith("NUMERIC.") for rule in found.hits):
            return
        cases = {path.split(".")[1] for path in own.a if path.startswith("numbers.") and path.endswith(".logits")}
        for case in sorted(cases):
            size = own.case_differs(case)
            if size is not None:
                text = f"off by {size:.2g} of its size" if size != float("inf") else "another shape, or NaN"
                found.add("NUMERIC.fresh_model", f"numbers.{case}.logits", Hit("the same numbers", text, size))


def move(found: Found, rules, to: str, started: str = "") -> None:
    """Tell the hits of some rules, at paths that begin so, as another rule's; with them what follows."""
    for rule in rules:
        hits = found.hits.get(rule, {})
        taken = {path: hit for path, hit in hits.items() if path.startswith(started)}
        for path, hit in taken.items():
            found.add(to, path, hit)
            del hits[path]
        if taken and not hits:
            del found.hits[rule]
            found.following.setdefault(to, []).extend(found.following.pop(rule, []))


def proof_of(shim: dict) -> str:
    what = ", ".join(shim["kinds"]) or "left-out tensors"
    if shim["verified"]:
        return "\n".join([f"{what}, shim verified: A's checkpoint gives the same logits through it", *shim["told"]])
    return f"looked like a {what}, numbers differ ({shim['off_by']}): not the same weights under other names"


def failure_text(error: dict) -> str:
    """ "TypeError: ..." of a fact that stands for a failure, on one line."""
    if "unsupported" in error:
        return str(error["unsupported"])
    return re.sub(r"\s+", " ", f"{error.get('error')}: {error.get('message', '')}")[:300]
