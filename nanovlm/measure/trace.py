"""Every allocation of a training step, in order, without doing the step's arithmetic.

Unusual: floats live on torch's meta device, which has shapes and no numbers; whole numbers (ids, masks, labels)
are real and small, because what a step allocates depends on them. A tensor is an allocation from when an
operator makes its storage until the storage is let go of, which autograd and Python do here as on a GPU. Autocast
is done by hand: torch's own knows real devices alone. What a kernel takes inside and gives back is not seen,
but for SCRATCH.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nanovlm.measure.kernels import fused

aten = torch.ops.aten
# The cast lists of CUDA autocast, by the names that Python calls. Source: ATen/autocast_mode.h; a test reads it.
LOWER = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "addmm", "addmv",
    "addr", "matmul", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm", "scaled_dot_product_attention",
}  # fmt: skip
FLOAT32 = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "softplus", "layer_norm", "rms_norm", "group_norm", "cosine_similarity", "nll_loss", "kl_div",
    "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "binary_cross_entropy_with_logits", "dist", "logsumexp",
}  # fmt: skip
FLOAT32_RESULT = {"prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum"}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@dataclass(frozen=True)
class Event:
    """An allocation of ``size`` bytes, or with None its end; ``phase`` and ``operator`` that made it."""

    key: int
    size: int | None
    phase: str = ""
    operator: str = ""


class Trace(TorchDispatchMode):
    """``events``; ``phase`` is written into those that follow. ``scratch``: {operator: bytes taken while it runs}."""

    def __init__(self, scratch: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.phase = ""
        self.kinds: dict[int, str] = {}  # key -> what it turned out to be: a gradient, a state, a cast copy
        self.scratch = dict(scratch or {})
        self._keys: dict[int, int] = {}
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not unless something compiles: torch's wrapper would import the compiler for nothing."""
        return "torch._dynamo" in sys.modules

    def add(self, tensor: Tensor, operator: str = "", kind: str = "") -> None:
        """Count a tensor's storage as allocated from now until it goes."""
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place not in self._keys:
            key = self._keys[place] = self._count
            self._count += 1
            self.events.append(Event(key, storage.nbytes(), self.phase, operator))
            weakref.finalize(storage, self._drop, place, key).atexit = False
        if kind:
            self.kinds[self._keys[place]] = kind

    def mark(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Say what the storages of ``tensors`` are."""
        for tensor in tensors:
            key = None if tensor is None else self._keys.get(tensor.untyped_storage()._cdata)
            if key is not None:
                self.kinds[key] = kind

    def _drop(self, place: int, key: int) -> None:
        self._keys.pop(place, None)
        self.events.append(Event(key, None))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._overloadpacket.__name__
        if name in self.scratch:
            key, self._count = self._count, self._count + 1
            self.events += [Event(key, self.scratch[name], self.phase, name), Event(key, None)]
        out = _run(func, args, kwargs)
        for tensor in _tensors(out):
            if tensor.device.type == "meta" or tensor.dim():  # a number on the CPU stays there
                self.add(tensor, name)
        return out


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), whole numbers on the CPU and floats on meta wherever they meet."""
    if func is aten._local_scalar_dense.default and args[0].device.type == "meta" and args[0].dtype == torch.bool:
        return True  # a model asks whether its numbers are fine; there are none, so they are
    given = list(_tensors((args, tuple(kwargs.values()))))
    kinds = {tensor.device.type for tensor in given}
    if len(kinds) == 2:
        if func._overloadpacket in _INDEXED:  # a mask over places: how many it picks is known on the CPU alone
            args = (args[0], _places(args[1]), *args[2:])
        args, kwargs = tree_map(_on_meta, (args, kwargs))
    elif kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        whole = not given[0].is_floating_point() if given else not func(*args, **kwargs).is_floating_point()
        if whole and (not given or kinds == {"cpu"}):
            kwargs["device"] = torch.device("cpu")
    return func(*args, **kwargs) if kinds != {"meta"} else _remembered(func, args, kwargs)


def _remembered(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs) on meta tensors, worked out once for each shape: layers repeat, and torch is slow at it."""
    schema = func._schema
    if schema.is_mutable or any(result.alias_info for result in schema.returns):
        return func(*args, **kwargs)
    signature = (func, _signature(args), _signature(tuple(kwargs.items())))
    known = _results.get(signature)
    if known is not None:
        one, results = known
        made = [None if r is None else torch.empty_strided(*r[:2], dtype=r[2], device="meta") for r in results]
        return made[0] if one else tuple(made)
    out = func(*args, **kwargs)
    results = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else [0]
    inside = {tensor.untyped_storage()._cdata for tensor in _tensors((args, tuple(kwargs.values())))}
    if all(r is None or isinstance(r, Tensor) and r.untyped_storage()._cdata not in inside for r in results):
        shapes = [None if r is None else (tuple(r.shape), r.stride(), r.dtype) for r in results]
        if all(r is None or r.is_meta and r.untyped_storage().nbytes() == r.numel() * r.itemsize for r in results):
            _results[signature] = (isinstance(out, Tensor), shapes)
    return out


_results: dict[Any, tuple[bool, list]] = {}  # of operators that make new tensors: (one tensor, its shape and kind)


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return type(value), value


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool
        found += index.nonzero().unbind(1) if masks else [index]
    return found


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Autocast(TorchFunctionMode):
    """CUDA's kernels, and its autocast to ``dtype`` (None for none), over meta tensors."""

    def __init__(self, dtype: torch.dtype | None, trace: Trace) -> None:
        super().__init__()
        self.dtype, self.trace = dtype, trace
        self.copies: dict[int, Tensor] | None = {}  # of parameters, by id; None outside the forward pass

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "").strip("_")
        if func is Tensor.backward:
            # torch leaves this mode for the call, but what the backward pass makes again needs it
            run, ones = torch.autograd.Variable._execution_engine.run_backward, torch.ones_like(args[0])
            with self:
                return run((args[0],), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        if self.dtype is not None:
            if name in LOWER:
                args, kwargs = tree_map(self._lower, (args, kwargs))
            elif name in FLOAT32 or name == "rpow":
                args, kwargs = tree_map(self._float32, (args, kwargs))
            elif name in FLOAT32_RESULT and self._is_lower(args[0]) and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
            elif name == "cross_entropy" and self._is_lower(args[0]) and not kwargs.get("label_smoothing"):
                return self._cross_entropy(*args, **kwargs)
        return fused(func, args, kwargs)

    def _is_lower(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == self.dtype

    def _float32(self, value: Any) -> Any:
        return value.float() if self._is_lower(value) else value

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (self.dtype, torch.float64):
            return value
        if self.copies is None or not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(self.dtype)
        if id(value) not in self.copies:
            copy = self.copies[id(value)] = value.to(self.dtype)
            self.trace.mark([copy], "autocast copies")
        return self.copies[id(value)]

    @contextlib.contextmanager
    def no_copies(self) -> Iterator[None]:
        """Each cast of a parameter lives as long as it is used."""
        copies, self.copies = self.copies, None
        try:
            yield
        finally:
            self.copies = copies

    def _cross_entropy(
        self, logits: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None,
        ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """As torch composes it: log_softmax in the logits' own dtype, which it names, then nll_loss in float32."""
        logs = torch.log_softmax(logits, 1, dtype=logits.dtype)
        return torch._C._nn.nll_loss(logs.float(), target, weight, _REDUCTIONS[reduction], ignore_index)


@contextlib.contextmanager
def traced(trace: Trace, dtype: torch.dtype | None) -> Iterator[Autocast]:
    """Run what stands inside on meta tensors as a CUDA device would, under autocast to ``dtype`` if one is given."""
    is_enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype

    def enabled(device: str = "cuda") -> bool:
        return dtype is not None if device == "meta" else is_enabled(device)

    def kind(device: str = "cuda") -> torch.dtype:
        return dtype if device == "meta" and dtype is not None else dtype_of(device)

    def autocast(device_type: str, *options: Any, cache_enabled: bool | None = None, **more: Any) -> Any:
        if device_type != "meta":
            return of_torch(device_type, *options, cache_enabled=cache_enabled, **more)
        # a model on meta may do without copies; the dtype is the rehearsal's
        return casts.no_copies() if cache_enabled is False else contextlib.nullcontext()

    casts, of_torch = Autocast(dtype, trace), torch.autocast
    # what a model asks about autocast, or sets, itself
    asked = mock.patch.multiple(torch, is_autocast_enabled=enabled, get_autocast_dtype=kind, autocast=autocast)
    with casts, trace, asked:
        yield casts
