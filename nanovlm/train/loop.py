"""The training loop: windows of micro-batches, one optimizer step each, and what happens between them.

Unusual: every label weighs the same, in whichever micro-batch or process it stands. Losses are summed, not
averaged, over a window; the gradient is divided once by the number of labels in it, together with the clipping.
So a window equals one large batch, and no batch has to be looked at ahead of its turn.

A window whose loss or gradient is not finite changes nothing but the count of such windows. Ctrl-C and SIGTERM
end the run after the window at hand, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanovlm.config import TrainConfig
from nanovlm.errors import CheckpointError, NonFiniteLoss
from nanovlm.train import checkpoints
from nanovlm.train.batches import blank, count_labels, flat, on_device, shorten
from nanovlm.train.curve import write_curve
from nanovlm.train.distributed import Step, World, exchanging, replicate, shard
from nanovlm.train.flops import Flops, peak_flops
from nanovlm.train.metrics import Bar, Metrics, read
from nanovlm.train.optimizer import freeze, make_optimizer, set_learning_rates, train_mode
from nanovlm.vlm import VisionLanguageModel

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What trainer.json holds: where a run stands."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0  # steps that were not finite
    skipped_in_a_row: int = 0
    best_loss: float | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended. ``signal``: the number of the signal that ended it early, or None."""

    run: Path
    counts: Counts
    val_loss: float | None
    signal: int | None


def train(
    model: VisionLanguageModel,
    cfg: TrainConfig,
    world: World,
    run: Path,
    loaders: tuple[Any, Any],
    *,
    resume: Path | None = None,
    benchmark: Callable[[VisionLanguageModel], Mapping[str, float]] | None = None,
) -> Result:
    """Train ``model``, in place, up to ``cfg.max_training_steps``; checkpoints and metrics go to ``run``.

    loaders: (train, validation) as ``nanovlm.data.build_loaders`` returns them. resume: the checkpoint to go on
    from, whose weights the model has. benchmark: called with the model every ``eval_interval`` steps.
    Raises NoLabels, NonFiniteLoss, CheckpointError.
    """
    trainer = Trainer(model, cfg, world, run, loaders, benchmark)
    if resume is not None:
        trainer.go_on(resume)
    return trainer.run_all()


class Trainer:
    """One process's share of a run."""

    def __init__(
        self,
        model: VisionLanguageModel,
        cfg: TrainConfig,
        world: World,
        run: Path,
        loaders: tuple[Any, Any],
        benchmark: Callable[[VisionLanguageModel], Mapping[str, float]] | None = None,
    ) -> None:
        self.cfg, self.world, self.run, self.benchmark = cfg, world, run, benchmark
        self.train_loader, self.val_loader = loaders
        self.model = model.to(world.device)
        self.counts = Counts()
        self.saved_at, self.reading = -1, False
        self.validated_at: tuple[int, float | None] | None = None
        freeze(model, cfg)
        self.flops, self.peak = Flops(model), peak_flops(world.device)
        model.recompute_activations(cfg.activation_checkpointing)
        if cfg.shard:
            shard(model)
        if cfg.compile:
            compile_parts(model)
        self.step = Step(model, autocast_dtype(cfg, world.device), everywhere=world.size > 1)
        self.wrapped = replicate(self.step) if world.size > 1 and not cfg.shard else self.step
        self.optimizer = make_optimizer(model, cfg)
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def go_on(self, folder: Path) -> None:
        """Take optimizer, counts, place in the data and random numbers of a checkpoint."""
        state = checkpoints.load_trainer(folder, self.world)
        self.counts = Counts(**{name: state[name] for name in asdict(self.counts)})
        checkpoints.load_optimizer(folder, self.model, self.optimizer, self.cfg.shard)
        self.train_loader.load_state_dict(checkpoints.load_place(folder, self.world))
        self.saved_at = self.counts.step

    def run_all(self) -> Result:
        """Every step that is left, the last validation, the last checkpoint and the curve."""
        cfg, counts = self.cfg, self.counts
        metrics = None
        if self.world.first:
            metrics = Metrics(self.run, cfg, counts.step, self.model.cfg.to_json_dict())
        bar = Bar(cfg, counts.step, self.world.first)
        write: Callable[[Mapping[str, Any]], None] = metrics.write if metrics else lambda record: None
        began, tokens_before = time.perf_counter(), counts.tokens
        stopped = None
        train_mode(self.model, cfg)
        try:
            with deferred_signals(bar.say) as received:
                while counts.step < cfg.max_training_steps and not stopped:
                    record = self.one_step(received)
                    stopped = record.pop("signal")
                    write(record)
                    bar.step(record)
                    self.between_steps(write, bar.say, stopped is not None)
                if not stopped:
                    self.finish(write, bar.say)
                elif self.saved_at != counts.step:
                    self.save(must=True)
                    bar.say(f"saved {self.run}; --resume --run_name {self.run.name} goes on from there")
        finally:
            bar.close()
            if metrics:
                metrics.close()
                _draw(self.run)
        seconds = time.perf_counter() - began
        if self.world.first and seconds:
            log.info("%.0f tokens a second over the run", (counts.tokens - tokens_before) / seconds)
        return Result(self.run, counts, self.validated_at[1] if self.validated_at else None, stopped)

    # -- one optimizer step ---------------------------------------------------------------------------------

    def one_step(self, received: list[int]) -> dict[str, Any]:
        """Accumulate a window and apply it; what is to be told of it. ``signal``: of the one to stop for."""
        cfg, counts, began = self.cfg, self.counts, time.perf_counter()
        rates = set_learning_rates(self.optimizer, counts.step, cfg)
        losses, ids = [], []
        waited = labels = tokens = flops = 0.0
        for micro in range(cfg.gradient_accumulation_steps):
            asked = time.perf_counter()
            batch = self.next_batch()
            waited += time.perf_counter() - asked
            n_labels = count_labels(batch)
            lengths = (batch["attention_mask"] > 0).sum(1).tolist()
            labels, tokens = labels + n_labels, tokens + sum(lengths)
            flops += self.flops.of(batch, lengths, n_labels) if self.peak else 0.0
            last = micro == cfg.gradient_accumulation_steps - 1
            with exchanging(self.wrapped, self.model, last):
                loss = self.wrapped(on_device(batch, self.world.device, n_labels))
                loss.backward()
            losses.append(loss.detach())
            ids.append(batch["ids"])
        sums = torch.stack(losses).tolist()
        signal_number = received[0] if received else 0
        total, labels, tokens, flops, stop = self.world.sums(sum(sums), labels, tokens, flops, signal_number)
        norm = self.apply(labels, math.isfinite(total))
        if norm is None or not math.isfinite(norm):
            at_fault = [row for value, row in zip(sums, ids, strict=True) if not math.isfinite(value)]
            self.not_finite(ids if math.isfinite(total) else at_fault)
        else:
            counts.skipped_in_a_row = 0
        self.optimizer.zero_grad(set_to_none=True)
        counts.step += 1
        counts.tokens += int(tokens)
        seconds = time.perf_counter() - began
        mfu = flops / seconds / self.peak / self.world.size if self.peak else None
        return {
            "step": counts.step, "loss": total / labels, "grad_norm": math.nan if norm is None else norm,
            **{f"lr_{part}": rate for part, rate in rates.items()},
            "tokens": counts.tokens, "labels": int(labels), "skipped": counts.skipped, "seconds": seconds,
            "tokens_per_s": tokens / seconds, "data_wait": waited / seconds, "mfu": mfu,
            "signal": int(stop) or None,
        }  # fmt: skip

    def next_batch(self) -> dict[str, Any]:
        """The next one of the loader, whose workers' start draws a number that a resumed run must not miss."""
        if self.reading:
            return next(self.train_loader)
        self.reading = True
        with torch.random.fork_rng(devices=()):
            return next(self.train_loader)

    def apply(self, labels: float, finite: bool) -> float | None:
        """Divide the gradients by the window's labels, clip, and step; their norm before clipping.

        Nothing is applied where loss or norm is not finite.
        """
        if not finite:
            return None
        gradients = [p.grad for p in self.trained if p.grad is not None]
        # DDP and FSDP average over the processes, whose labels are all in ``labels``
        scale = self.world.size / labels
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total) * scale
        if not math.isfinite(norm):
            return norm
        torch._foreach_mul_(gradients, scale * min(1.0, self.cfg.max_grad_norm / (norm + 1e-6)))
        self.optimizer.step()
        return norm

    def not_finite(self, ids: list[Any]) -> None:
        """Count a window that was not applied. Raises NonFiniteLoss when there were too many in a row."""
        counts, most = self.counts, self.cfg.max_nonfinite_steps
        counts.skipped += 1
        counts.skipped_in_a_row += 1
        names = [name for process in self.world.gather(flat(ids)) for name in process]
        log.warning("step %d is not finite and was not applied; samples: %s", counts.step + 1, shorten(names))
        if counts.skipped_in_a_row >= most:
            raise NonFiniteLoss(
                f"{most} steps in a row made NaN or infinity, the last at step {counts.step + 1} with the samples "
                f"{shorten(names)}. Look at these, lower the learning rates, or raise --max_nonfinite_steps"
            )

    # -- between steps --------------------------------------------------------------------------------------

    def between_steps(self, write: Callable[[Mapping[str, Any]], None], say: Callable[[str], None], last: bool) -> None:
        """Validate, benchmark, keep the best, save, and report on the data, each at its interval."""
        cfg, step = self.cfg, self.counts.step
        if last or step == cfg.max_training_steps:
            return
        evaluates = cfg.eval_in_epochs and step % cfg.eval_interval == 0
        if evaluates or (cfg.eval_in_epochs and step % cfg.validation_steps == 0):
            self.validate(write, say)
        if evaluates:
            self.evaluate(write)
        if step % cfg.save_checkpoint_steps == 0 and self.saved_at != step:
            self.save()
        if step % cfg.stats_log_interval == 0:
            write({"step": step, **{f"data/{name}": value for name, value in _numbers(self.train_loader.stats)}})

    def finish(self, write: Callable[[Mapping[str, Any]], None], say: Callable[[str], None]) -> None:
        """What stands at the end of a whole run."""
        if self.saved_at == self.counts.step:
            return
        self.validate(write, say)
        self.evaluate(write, last=True)

    def validate(self, write: Callable[[Mapping[str, Any]], None], say: Callable[[str], None]) -> None:
        """Measure the validation loss."""
        loss = validation_loss(self.step, self.val_loader, self.world, self.cfg.validation_batches)
        self.validated_at = (self.counts.step, loss)
        if loss is not None:
            write({"step": self.counts.step, "val_loss": loss})
            say(f"step {self.counts.step}: validation loss {loss:.4f}")

    def evaluate(self, write: Callable[[Mapping[str, Any]], None], last: bool = False) -> None:
        """Benchmark, and keep the checkpoint if its validation loss is the best so far."""
        if self.benchmark is not None:
            self.model.eval()
            with torch.compiler.set_stance("force_eager"):  # generation has a new shape at every token
                write({"step": self.counts.step, **self.benchmark(self.model)})
            train_mode(self.model, self.cfg)
        loss = self.validated_at[1] if self.validated_at else None
        is_best = loss is not None and (self.counts.best_loss is None or loss < self.counts.best_loss)
        if is_best:
            self.counts.best_loss = loss
        if is_best or last:
            self.save(is_best=is_best, must=last)

    def save(self, is_best: bool = False, must: bool = False) -> None:
        """Write a checkpoint; where that fails, training goes on unless it ``must``."""
        state, data_state = asdict(self.counts), self.train_loader.state_dict()
        try:
            checkpoints.save(
                self.run, state, self.model, self.optimizer, self.cfg, self.world, data_state, is_best=is_best
            )
        except CheckpointError as error:
            if must:
                raise
            log.error("%s. Training goes on", error)
        else:
            self.saved_at = self.counts.step


def validation_loss(step: Step, loader: Any, world: World, most: int) -> float | None:
    """Mean loss a label over at most ``most`` batches of each process; None where there is none."""
    model, was_training = step.model, [module for module in step.modules() if module.training]
    model.eval()
    batches: Iterator[dict[str, Any]] = itertools.islice(iter(loader), most)
    total, labels = 0.0, 0.0
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        while True:
            batch = next(batches, None)
            if not world.sums(batch is not None)[0]:
                break
            n_labels = count_labels(batch) if batch else 0
            # a process without a batch still takes part in the exchanges
            loss = step(on_device(batch or blank(), world.device, n_labels))
            total, labels = total + float(loss), labels + n_labels
    for module in was_training:
        module.training = True
    total, labels = world.sums(total, labels)
    return total / labels if labels else None


def autocast_dtype(cfg: TrainConfig, device: torch.device) -> torch.dtype | None:
    """bfloat16 where the GPU has it, or where it is asked for; None computes in the weights' own type."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if cfg.autocast == "bfloat16" or (cfg.autocast == "auto" and has_it) else None


def compile_parts(model: VisionLanguageModel, backend: str = "inductor") -> None:
    """Compile decoder and encoder: once for packed rows, all of one length; once more where lengths differ.

    What every batch has another number of, image tokens and labelled positions, is chosen outside of them.
    """
    model.decoder.compile(backend=backend)
    model.vision_encoder.compile(backend=backend)


@contextlib.contextmanager
def deferred_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Within the block, the first SIGINT or SIGTERM is only noted in the list; a second acts at once."""
    received: list[int] = []
    before: dict[int, Any] = {}
    process = os.getpid()

    def note(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a forked worker of the loader, which is told by its parent when to end
            return
        received.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)
        say("stopping after this step, with a checkpoint; once more stops at once")

    for each in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # signals reach the main thread only
            before[each] = signal.signal(each, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _draw(run: Path) -> None:
    try:
        write_curve(run, read(run))
    except OSError as error:
        log.warning("%s: no loss curve was drawn: %s", run, error)


def _numbers(stats: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in stats.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float):
            yield name, value
