"""A script for each NUMERIC finding that shows it without compat: two processes, one checkpoint, one batch.

Unusual: the script takes only what any nanoVLM-style tree has, from_pretrained and the call itself, so that whoever
has to mend a difference can put a breakpoint where it begins.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from compat.findings import Finding
from compat.lock import Asker, Failed
from compat.process import Child
from compat.rules import Comparison

SCRIPT = Path(__file__).with_name("reports") / "templates" / "reproduce.py.txt"


NOT_OF_A_CHECKPOINT = ("NUMERIC.not_comparable", "NUMERIC.fresh_model")


class Cases(Asker):
    """Which question, with which parameters, stands behind each path of a lock's numbers; asks nothing."""

    def __init__(self, model: dict):
        super().__init__(None, {})  # type: ignore[arg-type]  # nobody is asked
        self.model, self.asked, self.last = model, {}, ("", {})

    def ask(self, question: str, **parameters) -> Failed:
        self.last = (question, parameters)
        return Failed({"unsupported": "not asked"})

    def number(self, case: str, answer) -> None:
        self.asked[f"numbers.{case}"] = self.last

    def section(self, prefix: str, question: str, **parameters) -> None:
        self.asked[prefix] = (question, parameters)


def write(found: Comparison, children: list[Child], combo: dict, crossing: Path, folder: Path) -> list[str]:
    """Scripts below ``folder`` for the NUMERIC findings; what was written, or why not, in a line each.

    crossing: where compat.witness left the checkpoints. Raises OSError.
    """
    findings = [finding for finding in found.findings if finding.rule.startswith("NUMERIC.")]
    findings = [finding for finding in findings if finding.rule not in NOT_OF_A_CHECKPOINT]
    sources = (crossing / "a", crossing / "converted" if (crossing / "converted").is_dir() else crossing / "a")
    if not findings:
        return ["no NUMERIC finding to reproduce"]
    if not sources[0].is_dir():
        return ["no script was written: A saved no checkpoint"]
    askers = [Asker(child, combo) for child in children]
    model = askers[0].ask("describe")
    if isinstance(model, Failed):
        return [f"no script was written: {model.fact}"]
    cases = Cases(model)
    cases.numbers()
    folder.mkdir(parents=True, exist_ok=True)
    for side, source in zip("ab", sources, strict=True):
        shutil.copytree(source, folder / f"checkpoint_{side}", dirs_exist_ok=True)
    return [_one(finding, cases.asked, askers, folder) for finding in findings]


def _one(finding: Finding, asked: dict, askers: list[Asker], folder: Path) -> str:
    path = ".".join(finding.path.split(".")[:2])
    question, parameters = asked.get(path, ("", {}))
    if question not in ("lock_numbers", "lock_greedy"):
        return f"{finding.rule} {finding.path}: no script, it is not of one forward pass or one greedy answer"
    name = f"{finding.rule}.{path}".replace("/", "_")
    padding = parameters.get("padding", "left" if question == "lock_greedy" else "none")
    sides = {}
    for side, asker in zip("ab", askers, strict=True):
        packed = asker.ask("pack", rows=parameters["rows"], padding=padding, folder=str(folder / name / side))
        if isinstance(packed, Failed):
            return f"{finding.rule} {finding.path}: no script: {packed.fact}"
        sides[side] = packed | {"python": asker.child.python}
    told = {
        "finding": str(finding),
        "folder": name,
        "sides": sides,
        "change": parameters.get("change"),
        "new_tokens": parameters.get("max_new_tokens"),
        "loss": finding.path.endswith(".loss"),
    }
    text = SCRIPT.read_text(encoding="utf-8")
    script = folder / f"{name}.py"
    script.write_text(text.replace("@@TOLD@@", json.dumps(json.dumps(told)), 1), encoding="utf-8")
    return f"{finding.rule} {finding.path}: python {script}"
