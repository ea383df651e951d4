"""Runs made by hand: what the report is shown without any target being asked."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from compat.result import FAILED, PASSED, SKIPPED, Result, Run

CHECKS = (
    "Config Compatibility", "Forward Signature", "Forward Pass Training", "Generate Method", "Backward Pass",
    "Save Load Methods", "Tokenizer Compatibility", "Train Config Compatibility", "State Dict Keys", "Edge Cases",
    "Data Pipeline", "Backbone Loading", "VRAM",
)  # fmt: skip
COMBOS = (
    "siglip-smollm2", "siglip2-smollm2", "dinov2-smollm2", "dinov3-smollm2", "siglip2-gemma3", "dinov3-gemma3",
    "granite-docling",
)  # fmt: skip
BEGAN = datetime(2026, 9, 1, 8, 0, tzinfo=UTC)
HOSTILE = (
    "```\n---\n### Integration Test Run - 1999-01-01 00:00:00\n<script>document.title='pwned'</script>"
    "<img src=x onerror=\"document.title='pwned'\"> | \x1b[31mred\x1b[0m \u202eesrever\u2066 <!-- /compat:issues --> "
    "</pre></details></script><!-- compat:issues --> {{ 7 * 7 }} ' \" & \x00 \ud800"
)


def made(
    number: int = 0,
    combos: tuple[str, ...] = ("siglip2-smollm2",),
    failed: dict[str, str] | None = None,
    skipped: dict[str, str] | None = None,
    checks: tuple[str, ...] = CHECKS,
    target: str = ".",
    **more,
) -> Run:
    """A run `number` hours after the first, with the same checks under every combo."""
    moment = BEGAN + timedelta(hours=number)
    run = Run(
        f"{moment:%Y%m%dT%H%M%SZ}-{number:06x}",
        moment.isoformat(timespec="seconds"),
        {"label": target, "commit": f"{number:040x}", "dirty": False},
        "tiny",
        list(combos),
    )
    run.environment = {
        "python": "3.11.9", "torch": "2.13.0+cpu", "transformers": "5.23.0", "device": "cpu", "gpu": None,
    }  # fmt: skip
    for combo in combos:
        for check in checks:
            status, message = PASSED, ""
            if check in (failed or {}):
                status, message = FAILED, (failed or {})[check]
            elif check in (skipped or {}):
                status, message = SKIPPED, (skipped or {})[check]
            run.results.append(Result(check, "it holds", status, message, elapsed_s=0.5, combo=combo))
        run.cost[combo] = cost(number)
    run.elapsed_s = 7.0 + number % 5 / 10
    for name, value in more.items():
        setattr(run, name, value)
    return run


def cost(number: int) -> dict:
    later = number > 20  # something was added
    return {
        "parameters": 182_304 + 4_096 * later,
        "flops_forward": 7_004_672 + 131_072 * later,
        "flops_backward": 12_993_280 + 262_144 * later,
        "peak_forward_bytes": 815_264 + 20_000 * later,
        "peak_train_bytes": 3_115_552 + 80_000 * later,
        "tokens_per_s": 540.0 + 37 * (number * 7 % 5) - 12 * (number % 3),
    }


def finding(rule: str = "LOAD.key_renamed", verdict: str = "breaking", **more) -> dict:
    return {
        "combo": "siglip2-smollm2",
        "rule": rule,
        "tier": rule.partition(".")[0],
        "path": "state.decoder.blocks.{0..29}.attn.q_proj.weight",
        "old": "q_proj.weight",
        "new": "query.weight",
        "verdict": verdict,
        "why": "Older checkpoints do not load strictly.",
        "fix": "Keep the name, or map the old key to the new one on load.",
        "waived": "",
    } | more


def some_weeks() -> list[Run]:
    """What the picture in the README shows: a project that has been watched for a while."""
    runs = []
    for number in range(48):
        combo = COMBOS[number % 7]
        failed = {}
        if combo == "dinov3-gemma3" and number > 40:
            failed = {
                "Generate Method": "cached generation differs from argmax of the full forward at token 5: 311 != 87"
            }
        if combo == "siglip-smollm2" and 12 < number < 30:
            failed = {"Save Load Methods": "2 keys missing in model.safetensors: MP.proj.weight, MP.proj.bias"}
        skipped = (
            {"Data Pipeline": "the target has no VQADataset and VQACollator"} if combo == "granite-docling" else {}
        )
        runs.append(made(number * 11, (combo,), failed, skipped, cost={combo: cost(number)}))
    last = runs[-1]
    last.findings = [
        finding(combo=last.combos[0]),
        finding("COST.flops", "behaviour", combo=last.combos[0], path="cost.flops.forward.total", old="7004672",
                new="7135744", why="Every forward pass takes longer.", fix="Is the extra layer meant?"),
        finding("NUMERIC.logits", "behaviour", combo=last.combos[0], path="numbers.fp32.logits", old="rms 1.01",
                new="rms 1.02", waived="pooling is meant (Ada, until 2027-01-31)"),
    ]  # fmt: skip
    last.output = "loading backbone ...\nUserWarning: torch_dtype is deprecated! Use dtype instead!\n"
    return runs
