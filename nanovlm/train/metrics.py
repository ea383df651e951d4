"""What a run tells while it goes: a line of JSON a step, a progress bar, and Weights & Biases if asked.

Unusual: metrics.jsonl is the record; the bar, wandb and the curve are views of it. A run that goes on from a
checkpoint first drops the lines after it, so that a step stands there once. NaN is written as null.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nanovlm import checkpoint
from nanovlm.config import TrainConfig
from nanovlm.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)
FILE = "metrics.jsonl"


def read(run: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line cut off by the end of the process is left out."""
    path = run / FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            log.warning("%s: left out a line that is no JSON", path)
    return records


class Metrics:
    """Writes the records of one run; ``after`` is the step it goes on from."""

    def __init__(self, run: Path, cfg: TrainConfig, after: int, model_fields: Mapping[str, Any]) -> None:
        self.path = run / FILE
        try:
            run.mkdir(parents=True, exist_ok=True)
            kept = [json.dumps(record) for record in read(run) if record["step"] <= after]
            checkpoint.write_text(self.path, "".join(f"{line}\n" for line in kept))
            self.file: TextIO | None = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            why = f"{self.path} cannot be written: {error.strerror}"
            raise CheckpointError(f"{why}; name another --output_dir") from None
        self.wandb = _start_wandb(run, cfg, model_fields) if cfg.log_wandb else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record; it has a ``step``. A full disk is told once and ends the file, not the run."""
        finite = {name: _or_none(value) for name, value in record.items()}
        if self.file is not None:
            try:
                self.file.write(json.dumps(finite) + "\n")
                self.file.flush()
            except OSError as error:
                log.warning("%s: no more metrics are written: %s", self.path, error)
                self.file = None
        if self.wandb is not None:
            self.wandb.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def close(self) -> None:
        """Finish the file and wandb's run."""
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(run: Path, cfg: TrainConfig, model_fields: Mapping[str, Any]) -> Any:
    """A wandb run that a resumed training goes on with; its mode is wandb's own, such as WANDB_MODE=offline."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("--log_wandb needs wandb: pip install 'nanovlm[train]', or leave the option out") from None
    return wandb.init(
        project="nanovlm",
        entity=cfg.wandb_entity,
        name=run.name,
        id=run.name,
        resume="allow",
        dir=str(run),
        config={**model_fields, **cfg.to_json_dict()},
    )


class Bar:
    """Loss, tokens a second, MFU, share of time spent waiting for data, and time to go.

    A bar on a terminal; elsewhere a line every ``console_log_interval`` steps.
    """

    def __init__(self, cfg: TrainConfig, step: int, shown: bool) -> None:
        self.cfg, self.shown, self.progress = cfg, shown, None
        self.start, self.began = step, time.perf_counter()
        if shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.fields[text]}")
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), text, "ETA", TimeRemainingColumn())
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.task = self.progress.add_task("", total=cfg.max_training_steps, completed=step, text="")
            self.progress.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show the record of a training step."""
        if not self.shown:
            return
        step = record["step"]
        if self.progress is not None:
            self.progress.update(self.task, completed=step, text=describe(record))
        elif step % self.cfg.console_log_interval == 0 or step in (self.start + 1, self.cfg.max_training_steps):
            each = (time.perf_counter() - self.began) / (step - self.start)
            left = (self.cfg.max_training_steps - step) * each
            self.say(f"step {step}/{self.cfg.max_training_steps} {describe(record)} ETA {clock(left)}")

    def say(self, text: str) -> None:
        """A line above the bar, on stderr."""
        if self.progress is not None:
            self.progress.console.print(text, highlight=False, markup=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.progress is not None:
            self.progress.stop()


def describe(record: Mapping[str, Any]) -> str:
    """The numbers of a step that a reader wants."""
    loss = "nan" if not math.isfinite(record["loss"]) else f"{record['loss']:.4f}"
    parts = [f"loss {loss}", f"{record['tokens_per_s']:,.0f} tok/s"]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts.append(f"data wait {record['data_wait']:.0%}")
    if record["skipped"]:
        parts.append(f"{record['skipped']} skipped")
    return " ".join(parts)


def clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
