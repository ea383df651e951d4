"""Resolutions times poolings of one model: what each setting scores, what it costs, and which lie on the front.

Unusual: every setting starts from the same checkpoint, and may be trained for a few steps at its own size: without
that a model that never saw so few tokens is blamed for what a minute would mend. A setting that the grid of patches
does not allow is told, not left out. Settings that are done are not done again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovlm import checkpoint
from nanovlm.config import TrainConfig
from nanovlm.errors import ConfigError
from nanovlm.evaluate.asking import batch_of
from nanovlm.evaluate.questions import Question, questions
from nanovlm.evaluate.run import Settings, evaluate
from nanovlm.slimming import slim
from nanovlm.vlm import VisionLanguageModel

TIMED = 5  # questions, one at a time, of which the median is told
NEW_TOKENS = 3  # of a timed answer, as the document times it


@dataclass(frozen=True)
class Setting:
    """One cell of the grid: arguments of ``slim``."""

    resolution: int
    pool: str
    pool_factor: int | None = None
    keep_ratio: float | None = None
    pool_at: str | None = None

    @property
    def name(self) -> str:
        """Such as ``res96-pool_avg2``; a folder's name."""
        how = self.pool + (f"{self.keep_ratio:g}" if self.pool == "drop_norm" and self.keep_ratio else "")
        how += str(self.pool_factor) if self.pool_factor else ""
        return f"res{self.resolution}-{how}" + (f"-{self.pool_at}" if self.pool_at else "")


@dataclass(frozen=True)
class Row:
    """What a setting came to; ``problem`` says why it cannot be, and then there are no numbers."""

    name: str
    resolution: int
    pool: str
    image_tokens: int = 0
    accuracy: float = 0.0
    tflops: float = 0.0
    vision_tflops: float = 0.0
    latency_s: float = 0.0
    seconds: float = 0.0
    problem: str = ""


def settings(
    resolutions: Sequence[int],
    pools: Sequence[str],
    pool_factor: int | None = None,
    keep_ratio: float | None = None,
    pool_at: str | None = None,
) -> list[Setting]:
    """Every resolution with every pooling; each is given the options that it reads."""
    found = []
    for resolution in resolutions:
        for pool in pools:
            options: dict[str, Any] = {} if pool == "none" else {"pool_at": pool_at}
            if pool == "drop_norm":
                options["keep_ratio"] = keep_ratio
            elif pool != "none":
                options["pool_factor"] = pool_factor
            found.append(Setting(resolution, pool, **options))
    return found


def run_grid(
    load: Callable[[], VisionLanguageModel],
    cells: Sequence[Setting],
    asked: Settings,
    output: Path,
    *,
    finetune: TrainConfig | None = None,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """A row for each cell; grid.json in ``output`` holds them as they come, and a second call goes on behind them.

    load: the model anew. finetune: how each setting is trained first; None trains none. Raises ConfigError where not
    one cell is possible, or grid.json is of another grid.
    """
    trained = finetune and finetune.to_json_dict()
    head = json.loads(json.dumps({"asked": dataclasses.asdict(asked), "finetune": trained}))
    output.mkdir(parents=True, exist_ok=True)
    path = output / "grid.json"
    done = _done(path, head)
    base = load().cfg
    rows: list[Row] = []
    for cell in cells:
        began = time.perf_counter()
        row = done.get(cell.name)
        if row is None:
            try:
                base.slimmed(**dataclasses.asdict(cell))
            except ConfigError as error:
                row = Row(cell.name, cell.resolution, cell.pool, problem=str(error))
            else:
                row = _measured(cell, load(), asked, output, finetune)
                row = dataclasses.replace(row, seconds=time.perf_counter() - began)
        rows.append(row)
        kept = [*rows, *(other for name, other in done.items() if name not in {r.name for r in rows})]
        checkpoint.write_text(path, json.dumps({**head, "rows": [dataclasses.asdict(r) for r in kept]}, indent=2))
        tell(row)
    if all(row.problem for row in rows):
        raise ConfigError(f"not one of {len(rows)} settings is possible; the first: {rows[0].problem}")
    return rows


def _done(path: Path, head: Mapping[str, Any]) -> dict[str, Row]:
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["name"]: Row(**row) for row in stored["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no grid's: {error}; name another --output") from None
    for name, value in head.items():
        if stored.get(name) != value:
            raise ConfigError(
                f"{path} is of another grid: {name}={stored.get(name)!r} there, {value!r} here; name another "
                "--output, or delete the file"
            )
    return rows


def _measured(
    cell: Setting, model: VisionLanguageModel, asked: Settings, output: Path, finetune: TrainConfig | None
) -> Row:
    device = model.MP.proj.weight.device
    model = slim(model, **dataclasses.asdict(cell))
    if finetune is not None:
        run = output / "runs" / cell.name
        shutil.rmtree(run, ignore_errors=True)  # of a grid that was stopped in the middle of this setting
        tune(model, dataclasses.replace(finetune, run_name=cell.name), run)
    results = evaluate(model.to(device), asked, name=cell.name)
    return Row(
        cell.name, cell.resolution, cell.pool, model.cfg.mp_image_token_length, accuracy_of(results),
        results["total_tflops"], results["vit_manual_tflops"], latency(model, asked),
    )  # fmt: skip


def accuracy_of(results: Mapping[str, Any]) -> float:
    """The share that a grid compares: of choices by likelihood; of open answers where no choices were asked."""
    return results["mcq_accuracy"] if "mcq_accuracy" in results else results["oa_accuracy"]


def tune(model: VisionLanguageModel, cfg: TrainConfig, run: Path) -> None:
    """Train a model in place; its last checkpoint and its curve stay in ``run``."""
    from nanovlm.data import build_loaders
    from nanovlm.images import get_image_processor
    from nanovlm.train import train
    from nanovlm.train.distributed import World

    torch.manual_seed(cfg.seed)
    world = World(model.MP.proj.weight.device)
    loaders = build_loaders(cfg, model.cfg, model.tokenizer, get_image_processor(model.cfg))
    try:
        train(model, cfg, world, run, loaders)
    finally:
        loaders[0].close()
    model.eval()


def latency(model: VisionLanguageModel, asked: Settings) -> float:
    """Median seconds from a picture and its question to three tokens, one question at a time."""
    model.eval()
    task = asked.tasks[0]
    found = questions(task, asked.split, TIMED, (asked.data or {}).get(task))
    times = []
    for number, each in enumerate(question for question in found if isinstance(question, Question)):
        for warm in (True, False) if not number else (False,):
            began = time.perf_counter()
            batch = batch_of(model, [each.text], [[each.picture]])
            model.generate(batch.input_ids, batch.images, batch.mask, NEW_TOKENS, greedy=True, eos_token_id=())
            if not warm:
                times.append(time.perf_counter() - began)
    return statistics.median(times)


def front(rows: Iterable[Row]) -> list[Row]:
    """The settings that no other beats: each costs less, or scores more, than every other one. Cheapest first."""
    found: list[Row] = []
    for row in sorted((row for row in rows if not row.problem), key=lambda row: (row.tflops, -row.accuracy)):
        if not found or row.accuracy > found[-1].accuracy:
            found.append(row)
    return found


def cheapest(rows: Iterable[Row], floor: float) -> Row | None:
    """The cheapest setting that scores at least ``floor``; None where none does."""
    return next((row for row in front(rows) if row.accuracy >= floor), None)


def table(rows: Sequence[Row], chosen: Row | None) -> str:
    """A line a setting; ``*`` is on the front, ``>`` is chosen."""
    best = {row.name for row in front(rows)}
    lines = [f"  {'setting':<26}{'tokens':>7}{'accuracy':>10}{'GFLOPs':>12}{'vision':>12}{'ms':>9}"]
    for row in rows:
        if row.problem:
            lines.append(f"  {row.name:<26}{'impossible: ' + row.problem}")
            continue
        mark = ">" if chosen is not None and row.name == chosen.name else "*" if row.name in best else " "
        lines.append(
            f"{mark} {row.name:<26}{row.image_tokens:>7}{100 * row.accuracy:>9.1f}%{1e3 * row.tflops:>12.6g}"
            f"{1e3 * row.vision_tflops:>12.6g}{1e3 * row.latency_s:>9.1f}"
        )
    return "\n".join(lines)
