"""An evaluation: every question of the tasks asked, scored, and written down as it goes.

Unusual: each answer is a line in a file beside the results before the next batch begins; the same command goes on
behind the last line that is whole. A file of another model or another setting is refused, not mixed in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nanovlm import checkpoint
from nanovlm.errors import BadRow, ConfigError, DataError
from nanovlm.evaluate.asking import batch_of, log_likelihoods, say
from nanovlm.evaluate.questions import TASKS, Question, questions
from nanovlm.evaluate.scoring import letter_of, vqa_accuracy
from nanovlm.measure import flops
from nanovlm.vlm import VisionLanguageModel

MODES = ("mcq", "oa", "both")
ANSWER_TOKENS = 16  # of an open answer; the VQA rule compares a few words
LETTER_TOKENS = 8  # "The answer is B"


@dataclass(frozen=True)
class Settings:
    """What is asked, and how. data: {task: folder or repository in place of its own}."""

    tasks: tuple[str, ...]
    split: str | None = None
    max_samples: int | None = None
    mode: str = "both"
    batch_size: int = 8
    letters: bool = True
    max_new_tokens: int = ANSWER_TOKENS
    data: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(f"no tasks; there are: {', '.join(TASKS)}")
        for name, counted in Counter(self.tasks).items():
            if name not in TASKS:
                raise ConfigError(f"no task {name!r}; there are: {', '.join(TASKS)}; others are lmms-eval's")
            if counted > 1:
                raise ConfigError(f"task {name!r} is named {counted} times")
        strange = sorted(set(self.data or {}) - set(self.tasks))
        if strange:
            raise ConfigError(f"data names task {strange[0]!r}, asked are: {', '.join(self.tasks)}")
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r}: expected {', '.join(MODES)}")
        for name in ("batch_size", "max_new_tokens", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")
        closed = [name for name in self.tasks if not TASKS[name].open_answers]
        if self.mode == "oa" and closed:
            raise ConfigError(f"mode='oa': {closed[0]} has no open answers, it is multiple choice; use mode='mcq'")


def evaluate(
    model: VisionLanguageModel,
    settings: Settings,
    *,
    name: str = "",
    journal: Path | None = None,
    shown: bool = False,
) -> dict[str, Any]:
    """Ask everything; results with the fields of nanoVLM-Lite's JSON, and the same for each task under ``tasks``.

    journal: where answers are written as they come, and taken from where they are already.
    Raises DataError where not one question could be asked, ConfigError for a journal of another evaluation.
    """
    training = model.training
    model.eval()
    records: list[dict[str, Any]] = []
    head = {"model": name, "config": model.cfg.to_json_dict(), "weights": weights_id(model), **asdict(settings)}
    for free in ("batch_size", "max_samples"):  # changes the speed, and how many are asked
        head.pop(free)
    try:
        with _Journal(journal, head) as lines:
            bar = _Bar(settings, shown)
            try:
                for task in settings.tasks:
                    asked = questions(task, settings.split, settings.max_samples, (settings.data or {}).get(task))
                    for batch in _batches(asked, settings.batch_size, bar.say):
                        fresh = [each for each in batch if (task, each.id) not in lines.known]
                        new = _ask(model, fresh, settings) if fresh else []
                        lines.write(new)
                        found = {record["id"]: record for record in new}
                        records += [found.get(each.id) or lines.known[task, each.id] for each in batch]
                        bar.step(task, len(batch), records)
            finally:
                bar.close()
    finally:
        model.train(training)
    if not records:
        raise DataError(f"{', '.join(settings.tasks)}: not one question could be asked")
    return summary(model, settings, records, name)


def weights_id(model: VisionLanguageModel) -> str:
    """A short name of a model's weights: sums of all parameters, which training changes, and loading does not."""
    digest = hashlib.blake2b(digest_size=8)
    for key, tensor in model.state_dict().items():
        values = tensor if type(tensor) in (Tensor, nn.Parameter) else tensor.dequantize()  # int8 and scales
        values = values.double()
        digest.update(f"{key} {float(values.sum()):.6e} {float(values.square().sum()):.6e}\n".encode())
    return digest.hexdigest()


# -- one batch ------------------------------------------------------------------------------------------------


def _batches(asked: Iterable[Question | BadRow], size: int, tell: Callable[[str], None]) -> Iterator[list[Question]]:
    """Questions by ``size``; a row that cannot be used is told of and left out."""

    def usable() -> Iterator[Question]:
        for each in asked:
            if isinstance(each, BadRow):
                tell(f"skipped: {each}")
            else:
                yield each

    return (list(batch) for batch in _by(usable(), size))


def _by(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _ask(model: VisionLanguageModel, batch: Sequence[Question], settings: Settings) -> list[dict[str, Any]]:
    """A record of each question: what was said, what it is worth, and what it cost."""
    records: list[dict[str, Any]] = [{"task": each.task, "id": each.id} for each in batch]
    pictures = [[each.picture] for each in batch]
    ready = batch_of(model, [each.text for each in batch], pictures)
    for row, record in enumerate(records):
        record["pictures"] = [list(size) for size in ready.sizes(row)]
        front = 0 if model.cfg.image_token_id is not None else sum(model.cfg.image_tokens(*s) for s in ready.sizes(row))
        record["positions"] = int(ready.mask[row].sum()) + front
    if settings.mode != "oa":
        began = time.perf_counter()
        scores = log_likelihoods(model, ready, [each.said for each in batch])
        seconds = (time.perf_counter() - began) / len(batch)
        for each, record, found in zip(batch, records, scores, strict=True):
            best = max(range(len(found)), key=lambda number: found[number][0])
            record["mcq"] = {"chosen": best, "correct": best == each.right, "seconds": seconds}
        if settings.letters:
            began = time.perf_counter()
            said = say(model, batch_of(model, [each.lettered for each in batch], pictures), LETTER_TOKENS)
            seconds = (time.perf_counter() - began) / len(batch)
            for each, record, text in zip(batch, records, said, strict=True):
                chosen = letter_of(text, each.options or each.said)
                record["letter"] = {"said": text, "chosen": chosen, "correct": chosen == each.right, "seconds": seconds}
    if settings.mode != "mcq" and any(each.answers for each in batch):
        began = time.perf_counter()
        said = say(model, ready, settings.max_new_tokens)
        seconds = (time.perf_counter() - began) / len(batch)
        for each, record, text in zip(batch, records, said, strict=True):
            if each.answers:
                record["oa"] = {"said": text, "accuracy": vqa_accuracy(text, each.answers), "seconds": seconds}
    return records


# -- results --------------------------------------------------------------------------------------------------


def summary(
    model: VisionLanguageModel, settings: Settings, records: Sequence[Mapping[str, Any]], name: str
) -> dict[str, Any]:
    """What the results file holds."""
    cfg = model.cfg
    return {
        "model": name, "split": settings.split or {task: TASKS[task].split for task in settings.tasks},
        "mode": settings.mode, "max_samples": settings.max_samples, "resolution": cfg.vit_img_size,
        "max_img_size": cfg.max_img_size, "image_tokens_per_tile": cfg.mp_image_token_length,
        "pooling_config": pooling_config(cfg), **_scores(records), **_costs(model, records),
        "tasks": {task: _scores([r for r in records if r["task"] == task]) for task in settings.tasks},
    }  # fmt: skip


def pooling_config(cfg: Any) -> dict[str, Any]:
    """How image tokens are pooled, under the document's names."""
    found: dict[str, Any] = {"pool_method": cfg.pool}
    if cfg.pool != "none":
        found |= {"keep_ratio": cfg.keep_ratio} if cfg.pool == "drop_norm" else {"pool_factor": cfg.pool_factor}
        found["pool_at"] = cfg.pool_at
    return found


def _scores(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"samples": len(records)}
    for field, key in (("mcq", "mcq"), ("mcq_letter", "letter")):
        asked = [record[key] for record in records if key in record]
        if asked:
            right = sum(each["correct"] for each in asked)
            found |= {
                f"{field}_accuracy": right / len(asked), f"{field}_correct": right, f"{field}_total": len(asked),
                f"{field}_avg_latency": sum(each["seconds"] for each in asked) / len(asked),
            }  # fmt: skip
    asked = [record["oa"] for record in records if "oa" in record]
    if asked:
        worth = sum(each["accuracy"] for each in asked)
        found |= {
            "oa_accuracy": worth / len(asked), "oa_correct": worth, "oa_total": len(asked),
            "oa_avg_latency": sum(each["seconds"] for each in asked) / len(asked),
        }  # fmt: skip
    return found


def _costs(model: VisionLanguageModel, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean TFLOPs of a question and one token of its answer, by hand; of the vision part as counted, too.

    The document's two ways differ from ours: see ``measure.flops.published``.
    """
    shapes = Counter((tuple(map(tuple, r["pictures"])), r["positions"]) for r in records)
    parts: Counter[str] = Counter()
    for (pictures, positions), count in shapes.items():
        for row in flops.analytic(model.cfg, flops.Prompt(pictures, positions, 1)):
            parts["vit" if row.part == "vision" else row.part] += count * row.flops
    meta, counted = flops.meta_model(model.cfg), 0
    for pictures, count in Counter(tuple(map(tuple, r["pictures"])) for r in records).items():
        counted += count * sum(flops.counted(meta, flops.Prompt(pictures, 1, 1))["vision"].values())
    scale = len(records) * 1e12
    return {
        "vit_manual_tflops": parts["vit"] / scale, "vit_counter_tflops": counted / scale,
        "projector_tflops": parts["projector"] / scale, "prefill_tflops": (parts["prefill"] + parts["head"]) / scale,
        "total_tflops": sum(parts.values()) / scale,
    }  # fmt: skip


# -- what is kept while it runs -------------------------------------------------------------------------------


class _Journal:
    """One JSON object a line: first what is evaluated, then the records. ``known``: {(task, id): record}."""

    def __init__(self, path: Path | None, head: Mapping[str, Any]) -> None:
        self.path = path
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        self.head = json.loads(json.dumps(head))

    def __enter__(self) -> _Journal:
        self.file = None
        if self.path is None:
            return self
        whole = self._read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "r+b" if whole else "wb")
        self.file.truncate(whole)  # a line that was cut off is asked again
        self.file.seek(whole)
        if not whole:
            self._put([self.head])
        return self

    def __exit__(self, *error: Any) -> None:
        if self.file:
            self.file.close()

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self.file:
            self._put(records)

    def _put(self, lines: Sequence[Mapping[str, Any]]) -> None:
        assert self.file is not None
        self.file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def _read(self) -> int:
        """Bytes of whole lines; what they say is known then."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path else []
        except FileNotFoundError:
            return 0
        whole, head = 0, None
        for line in lines:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict):
                break
            if head is None:
                head = value
                self._compare(head)
            else:
                self.known[value["task"], value["id"]] = value
            whole += len(line)
        return whole

    def _compare(self, head: Mapping[str, Any]) -> None:
        for name in sorted({*head, *self.head}):
            there, here = head.get(name), self.head.get(name)
            if there != here:
                if isinstance(there, dict) and isinstance(here, dict):
                    field = next(key for key in sorted({*there, *here}) if there.get(key) != here.get(key))
                    name, there, here = f"{name}.{field}", there.get(field), here.get(field)
                raise ConfigError(
                    f"{self.path} holds answers of another evaluation: {name}={there!r} there, {here!r} here; name "
                    f"another --output, or delete the file"
                )


class _Bar:
    """How far it is, on stderr: a bar on a terminal, elsewhere a line at the end of each task."""

    def __init__(self, settings: Settings, shown: bool) -> None:
        self.shown, self.total = shown, settings.max_samples
        self.counts: Counter[str] = Counter()
        self.text, self.progress = "", None
        if shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
                       TextColumn("{task.fields[text]}"), TimeRemainingColumn())  # fmt: skip
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.ids = {task: self.progress.add_task(task, total=self.total, text="") for task in settings.tasks}
            self.progress.start()

    def step(self, task: str, count: int, records: Sequence[Mapping[str, Any]]) -> None:
        """``count`` more questions of a task were answered."""
        self.counts[task] += count
        found = _scores([record for record in records if record["task"] == task])
        scores = {name: found[name] for name in ("mcq_accuracy", "mcq_letter_accuracy", "oa_accuracy") if name in found}
        text = " ".join(f"{name} {value:.3f}" for name, value in scores.items())
        if self.progress is not None:
            self.progress.update(self.ids[task], advance=count, text=text)
        elif self.shown and (self.counts[task] == self.total or self.counts[task] % 100 < count):
            of = f"/{self.total}" if self.total else ""
            print(f"{task}: {self.counts[task]}{of} {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.progress is not None:
            self.progress.console.print(text, highlight=False, markup=False)
        else:
            print(f"nanovlm: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """The results as JSON, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(output, json.dumps(results, indent=2) + "\n")
