"""Peak memory of training, for each batch size: measured on a CUDA device, predicted for a named one without.

Unusual: a prediction is a rehearsal. Two training steps run on tensors without numbers (trace.py), every allocation
and release goes in order through CUDA's allocator on paper (allocator.py), and the peak of that is the figure;
nothing is fitted to a measurement. Two steps, because the optimizer's state is there from the second on, and the
first one's buffers are then cut up by it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm.config import VLMConfig
from nanovlm.errors import ConfigError
from nanovlm.measure.allocator import Block, CachingAllocator, OutOfMemory
from nanovlm.measure.gpus import Gpu
from nanovlm.measure.trace import Event, Trace, traced

MIB = 1 << 20
ITERATIONS = 2
PARTS = (
    "parameters", "gradients", "optimizer states", "optimizer temporaries", "autocast copies", "activations",
    "backward", "logits and loss", "batch", "cuBLAS workspaces", "allocator rounding",
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}  # of autocast; None is off
THREADS = {"forward": 1, "backward": 2}  # that have multiplied matrices; backward runs in one of its own
LOSS_OPERATORS = ("log_softmax", "nll_loss", "logsumexp", "cross_entropy")

Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]  # input_ids, images, targets, attention_mask
Forward = Callable[..., tuple[Tensor | None, Tensor]]  # (input_ids, images, attention_mask, targets) -> logits, loss


class FusedAdamW(torch.optim.AdamW):
    """What ``AdamW(fused=True)`` allocates, where its kernel cannot run: two states a parameter, and a step count."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p] = {
                        "step": torch.zeros(1, device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }


def make_optimizer(name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """One of OPTIMIZERS; those without "fused" work on all tensors at once, torch's default on CUDA."""
    meta = any(p.device.type == "meta" for p in parameters)
    if name == "adamw-fused":
        return FusedAdamW(parameters) if meta else torch.optim.AdamW(parameters, fused=True)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    if name not in kinds:
        raise ConfigError(f"no optimizer {name!r}; there are: {', '.join(OPTIMIZERS)}")
    return kinds[name](parameters, lr=1e-5, foreach=True)


OPTIMIZERS = ("adamw", "adamw-fused", "adam", "sgd")


@dataclass(frozen=True)
class Training:
    """How a batch is trained: autocast's dtype ("bf16", "fp16", "fp32" for none), optimizer, and what forward is.

    forward: (model, input_ids, images, attention_mask, targets) -> (logits or None, loss); logits that it returns
    stay until the next step's, as in upstream's loop.
    """

    dtype: str = "bf16"
    optimizer: str = "adamw"
    forward: Callable[..., tuple[Tensor | None, Tensor]] = field(
        default=lambda model, *batch: model(*batch, want_logits=False)
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"no optimizer {self.optimizer!r}; there are: {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True)
class Prediction:
    """Bytes of one batch size. ``parts`` add up to ``peak``; ``peak`` is what was allocated when memory ran out."""

    batch_size: int
    loaded: int
    peak: int
    reserved: int
    fits: bool
    parts: dict[str, int]
    operators: dict[str, int]  # what the activations at the peak come from


# -- what is trained on ---------------------------------------------------------------------------------------


def make_batch(cfg: VLMConfig, rows: int, seq_len: int) -> Batch:
    """Rows of one square picture (a tile) and text, ``seq_len`` positions altogether, every one of the text labelled.

    Images are on meta. Raises ConfigError.
    """
    side, images = cfg.vit_img_size, cfg.image_tokens(cfg.vit_img_size, cfg.vit_img_size)
    if seq_len <= images:
        raise ConfigError(f"seq_len={seq_len} has no room for text: the picture alone is {images} tokens")
    if seq_len > cfg.lm_max_position_embeddings:
        raise ConfigError(f"seq_len={seq_len} is beyond lm_max_position_embeddings={cfg.lm_max_position_embeddings}")
    text = torch.zeros(rows, seq_len - images, dtype=torch.long)
    slots = torch.full((rows, images), cfg.image_token_id) if cfg.image_token_id is not None else text[:, :0]
    input_ids = torch.cat((slots, text), dim=1)
    targets = torch.cat((torch.full_like(slots, -100), text), dim=1)
    return input_ids, torch.empty(rows, 3, side, side, device="meta"), targets, None


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Batch],
    training: Training,
    autocast: Callable[[], Any],
) -> Iterator[str]:
    """Train ITERATIONS steps; between their phases, yields what was done: "batch", "forward", "backward", "step"."""
    logits = loss = None
    for _ in range(ITERATIONS):
        input_ids, images, targets, attention_mask = batches()
        yield "batch"
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            logits, loss = training.forward(model, input_ids, images, attention_mask, targets)
        yield "forward"
        loss.backward()
        yield "backward"
        optimizer.step()
        yield "step"
    del logits, loss


# -- prediction -----------------------------------------------------------------------------------------------


@dataclass
class Rehearsal:
    """The allocations of loading a model and of ITERATIONS steps; ``kinds`` says what some of them are."""

    events: list[Event]
    kinds: dict[int, str]
    loaded: int  # number of the event before which the model is loaded and nothing has run


def rehearse(model: nn.Module, batch: Batch, training: Training, gpu: Gpu) -> Rehearsal:
    """Trace the training of ``model``, on meta, with ``batch``."""
    trace = Trace({"addmm": gpu.bias_workspace})
    for tensor in (*model.parameters(), *model.buffers()):
        trace.add(tensor, kind="parameters")
    loaded = len(trace.events)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = None

    def fresh() -> Batch:
        copies = tuple(None if t is None else torch.empty_like(t).copy_(t) for t in batch)
        for tensor in copies:
            if tensor is not None:
                trace.add(tensor, kind="batch")
        return copies

    model.train()
    with traced(trace, DTYPES[training.dtype]) as casts:

        @contextlib.contextmanager
        def autocast() -> Iterator[None]:
            trace.phase, casts.copies = "forward", {}
            yield
            casts.copies = None  # the recomputation of a block casts anew

        optimizer = make_optimizer(training.optimizer, [p for p in parameters if p.requires_grad])
        for done in steps(model, optimizer, fresh, training, autocast):
            if done == "forward":
                trace.phase = "backward"
            elif done == "backward":
                trace.mark((p.grad for p in parameters), "gradients")
                trace.phase = "step"
            elif done == "step":
                trace.mark(_states(optimizer), "optimizer states")
    events = list(trace.events)  # as they are now: the trace goes on to hear what ends, the model last of all
    for parameter in parameters:
        parameter.grad = None
    return Rehearsal(events, trace.kinds, loaded)


def _states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def replay(rehearsal: Rehearsal, batch_size: int, gpu: Gpu, capacity: int | None = None) -> Prediction:
    """Lead a rehearsal's allocations through the allocator of ``gpu``, with ``capacity`` bytes if they are given."""
    allocator = CachingAllocator(gpu.usable if capacity is None else capacity)
    live: dict[int, Block | None] = {}
    workspaces = loaded = peak = peak_at = 0
    fits, number = True, 0
    try:
        for number, event in enumerate(rehearsal.events):
            if number == rehearsal.loaded:
                loaded = allocator.allocated
            if workspaces < THREADS.get(event.phase, 0):  # a thread's first product makes one, and keeps it
                allocator.allocate(gpu.workspace)
                workspaces += 1
            if event.size is None:
                allocator.free(live.pop(event.key))
            else:
                live[event.key] = allocator.allocate(event.size)
            if allocator.allocated > peak:
                peak, peak_at = allocator.allocated, number + 1
    except OutOfMemory:
        fits, peak, peak_at = False, allocator.peak, number
    parts, operators = _parts(rehearsal, peak_at)
    parts["cuBLAS workspaces"] = workspaces * gpu.workspace
    parts["allocator rounding"] = peak - sum(parts.values())
    return Prediction(batch_size, loaded, peak, allocator.peak_reserved, fits, parts, operators)


def _parts(rehearsal: Rehearsal, end: int) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes of each of PARTS, bytes of the activations by operator) that are live before event ``end``."""
    live: dict[int, Event] = {}
    for event in rehearsal.events[:end]:
        if event.size is None:
            del live[event.key]
        else:
            live[event.key] = event
    parts, operators = dict.fromkeys(PARTS, 0), Counter()
    for event in live.values():
        part = rehearsal.kinds.get(event.key) or _part(event)
        parts[part] += event.size
        if part == "activations":
            operators[event.operator] += event.size
    return parts, dict(operators.most_common())


def _part(event: Event) -> str:
    if event.phase == "step":
        return "optimizer temporaries"
    if any(name in event.operator for name in LOSS_OPERATORS):
        return "logits and loss"
    return "backward" if event.phase == "backward" else "activations"


def line(first: Rehearsal, second: Rehearsal, rows: tuple[int, int], wanted: int) -> Rehearsal | None:
    """The rehearsal of ``wanted`` rows, from those of two other counts; None where their steps differ.

    Every size is a line in the batch size as long as the same operators run in the same order.
    """
    if len(first.events) != len(second.events):
        return None
    events, (low, high) = [], rows
    for a, b in zip(first.events, second.events, strict=True):
        if (a.key, a.phase, a.operator, a.size is None) != (b.key, b.phase, b.operator, b.size is None):
            return None
        size = None
        if a.size is not None:
            size, rest = divmod(a.size * (high - low) + (b.size - a.size) * (wanted - low), high - low)
            if rest:
                return None
        events.append(Event(a.key, size, a.phase, a.operator))
    return Rehearsal(events, first.kinds, first.loaded)


class Predictor:
    """Predictions for one model, which is on the meta device, on one GPU; ``batch(rows)`` makes a batch of it.

    From the third batch size on, rehearsals of two others give the rest, where their steps are the same.
    """

    def __init__(self, model: nn.Module, batch: Callable[[int], Batch], training: Training, gpu: Gpu) -> None:
        self.model, self.batch, self.training, self.gpu = model, batch, training, gpu
        self.rehearsals: dict[int, Rehearsal] = {}

    def rehearsal(self, rows: int) -> Rehearsal:
        """The allocations with ``rows`` rows, by the shorter way where there is one."""
        known = sorted(n for n in self.rehearsals if n > 1)  # one row has views where several have copies
        if rows > 1 and rows not in self.rehearsals and len(known) > 1:
            found = line(*(self.rehearsals[n] for n in known[:2]), (known[0], known[1]), rows)
            if found is not None:
                return found
        if rows not in self.rehearsals:
            self.rehearsals[rows] = rehearse(self.model, self.batch(rows), self.training, self.gpu)
        return self.rehearsals[rows]

    def predict(self, rows: int, capacity: int | None = None) -> Prediction:
        """Peak of ``rows`` rows; ``capacity``: bytes of memory to have instead of the GPU's."""
        return replay(self.rehearsal(rows), rows, self.gpu, capacity)

    def largest(self, capacity: int) -> int:
        """The largest batch size that fits ``capacity`` bytes, by bisection; 0 if not one row does."""
        low, high = 0, 1
        while self.predict(high, capacity).fits:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.predict(middle, capacity).fits else (low, middle)
        return low


# -- measurement ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Bytes that torch.cuda reported of one batch size; ``peak`` is what was allocated when memory ran out."""

    batch_size: int
    loaded: int
    peak: int
    reserved: int
    fits: bool


def measure(model: nn.Module, batch: Batch, training: Training, device: torch.device) -> Measurement:
    """Train ``model``, which is on ``device`` (a CUDA one), for real; running out of memory is an answer."""
    loaded = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    dtype = DTYPES[training.dtype]

    def fresh() -> Batch:
        ids, images, targets, mask = batch
        pixels = torch.rand(images.shape, device=device)
        return ids.to(device), pixels, targets.to(device), None if mask is None else mask.to(device)

    def autocast() -> Any:
        return torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None)

    model.train()
    fits = True
    try:
        optimizer = make_optimizer(training.optimizer, [p for p in model.parameters() if p.requires_grad])
        for _ in steps(model, optimizer, fresh, training, autocast):
            pass
    except torch.OutOfMemoryError:
        fits = False
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.empty_cache()
    return Measurement(len(batch[0]), loaded, peak, reserved, fits)
