"""A gate's answer made by hand, as ``compat gate --json`` writes it, for the outputs that other programs read."""

from __future__ import annotations

from compat.base import Change
from compat.findings import Finding
from compat.gate import Gate, Judged
from compat.result import plain

RENAMED = Finding("LOAD.key_renamed", "breaking", "checkpoint", "state.blocks.0.q_proj.weight", "q_proj.weight",
                  "query.weight")  # fmt: skip
DEARER = Finding("COST.flops", "behaviour", "model", "cost.flops.forward.total", "7004672", "7135744")
FAILING = Finding("SUITE.save_load", "breaking", "model", "every key comes back", "passes", "fails",
                  where="KeyError: 'MP.proj.weight' (models/vision_language_model.py:2)")  # fmt: skip


def gate(**more) -> dict:
    """One of everything: a change of policy, a bad waiver, new findings, a waived one, something not asked."""
    found = Gate("../fork", "the merge-base with main, 1a2b3c4d5e", ["siglip2-smollm2"], "tiny")
    combos = list(found.combos)
    found.policy = [Change("compat/rules.toml", "LOAD.key_renamed is breaking -> additive")]
    found.new = [Judged(RENAMED, "00000000000000aa", combos), Judged(FAILING, "00000000000000bb", combos)]
    found.waived = [Judged(DEARER, "00000000000000cc", combos, "pooling is meant (ada, until 2027-01-31)")]
    found.problems = ["waivers.toml: entry 1 (LOAD.dtype) has expired on 2026-01-01"]
    found.not_run = ["Data Pipeline: every row is supervised: the target has no VQADataset"]
    found.verdicts = {"checkpoint": "breaking", "model": "behaviour"}
    for name, value in more.items():
        setattr(found, name, value)
    return plain(found.as_json())
