"""What a run keeps beside its checks, for the log and the reports: cost, special tokens, fields that decide loading.

Unusual: nothing here judges. A figure is asked for only where the check next to it passed, so that a target which
hangs or dies in that place is not asked the same again; what is not measured says why.
"""

from __future__ import annotations

from compat.process import ChildFailed, CouldNotAsk, NotSupported, TargetRaised, WorkerError
from compat.result import PASSED, SKIPPED, Check
from compat.suites.probes import Probes

NEW_TOKENS = 16
LENGTH = 16  # text tokens of the row that is counted and timed; the one the VRAM check asks about too
AFTER = {  # figure -> the check that has to have passed
    "memory": "VRAM",
    "flops": "VRAM",
    "speed": "Generate Method",
    "special_tokens": "Tokenizer Compatibility",
    "loading_fields": "State Dict Keys",
}


def measure(ask, described: dict, checks: list[Check]) -> tuple[dict, dict]:
    """(cost, facts) of one combo; facts["not_measured"] is {figure: why}."""
    cost: dict[str, float] = {"parameters": described["parameters"]}
    facts: dict[str, dict] = {}
    missing = {}
    status = {check.title: check.status for check in checks}
    for figure, check in AFTER.items():
        if status.get(check) != PASSED:
            missing[figure] = f"the check {check} {SAID.get(status.get(check), 'did not pass')}"
            continue
        try:
            told = FIGURES[figure](ask, Probes(described))
        except (TargetRaised, ChildFailed, NotSupported, CouldNotAsk, WorkerError) as error:
            missing[figure] = str(error).partition("\n")[0]
            continue
        if figure in ("special_tokens", "loading_fields"):
            facts[figure] = told
        else:
            cost |= told
    return cost, facts | ({"not_measured": missing} if missing else {})


SAID = {None: "was not asked", SKIPPED: "was skipped"}


def memory(ask, probes: Probes) -> dict:
    peaks = {step: ask("memory", rows=[row(probes)], step=step)["peak_bytes"] for step in ("forward", "train")}
    return {f"peak_{step}_bytes": size for step, size in peaks.items()}


def flops(ask, probes: Probes) -> dict:
    facts = ask("lock_flops", rows=[row(probes)])["facts"]
    return {f"flops_{way}": facts[f"flops.{way}.total"] for way in ("forward", "backward")}


def speed(ask, probes: Probes) -> dict:
    told = ask("speed", rows=[probes.row(LENGTH)], new_tokens=NEW_TOKENS)
    return {"tokens_per_s": round(told["tokens_per_s"], 1)}


def special_tokens(ask, probes: Probes) -> dict:
    return ask("lock_special")["facts"]


def loading_fields(ask, probes: Probes) -> dict:
    return ask("loading_fields")["fields"]


def row(probes: Probes) -> dict:
    return probes.row(LENGTH, seed=0, images=(0,), labels="all")


FIGURES = {function.__name__: function for function in (memory, flops, speed, special_tokens, loading_fields)}
