"""Activations that training makes again instead of keeping them.

Unusual: ``elementwise`` keeps every matrix product and attention, and makes again only what is cheap between
them: norms, activation functions, copies of heads, casts of weights. It works on what autograd saves, so modules
are called as ever, hooks and adapters included; only a plain Linear finds its weight cast already. Such a backward
pass cannot itself be differentiated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanovlm.errors import ConfigError

MODES = ("nothing", "elementwise", "blocks")
_active: list[_Recipes] = []  # the block being run, if it keeps recipes


LINEAR: list[type] = [nn.Linear]  # layers whose forward pass is the product, and nothing else


def plain_linear(module: nn.Module) -> bool:
    """Whether a module is such a layer that nobody listens to, replaced the call of, sharded or quantized."""
    if type(module) not in LINEAR or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point()


class Stack(nn.Module):
    """A backbone of blocks, with ``recompute``, one of MODES: what training makes again.

    "blocks" keeps the input of each block alone: a third more time, for a tenth of the memory.
    """

    recompute = "nothing"

    def through(self, block: nn.Module, *inputs: Any) -> Tensor:
        """block(*inputs)."""
        if self.recompute == "nothing" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return block(*inputs)
        with no_kept_casts(inputs[0].device.type):
            if self.recompute == "blocks":
                return checkpoint(block, *inputs, use_reentrant=False)
            with _Recipes() as recipes, torch.autograd.graph.saved_tensors_hooks(recipes.pack, unpack):
                casts = recipes.cast_weights(block)
                return torch.func.functional_call(block, casts, inputs, tie_weights=False) if casts else block(*inputs)


@contextlib.contextmanager
def no_kept_casts(device: str) -> Iterator[None]:
    """Autocast, where it is on, without its copies of all weights, which it keeps until it ends."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False):
        yield


def check_mode(mode: str) -> str:
    """Raise ConfigError for none of MODES."""
    if mode not in MODES:
        raise ConfigError(f"recompute={mode!r}: expected one of {', '.join(MODES)}")
    return mode


def again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), which the backward pass may call again; for what goes into a matrix product.

    Under autocast it is in the products' dtype, as each of them would cast it for itself.
    """
    if not _active:
        return function(*inputs)
    return _active[-1].made(function, inputs)


class _Recipe:
    """How to make a tensor again: function(*inputs), each of them a tensor, a recipe or a plain value."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple, dtype: torch.dtype | None) -> None:
        self.function, self.inputs, self.dtype = function, inputs, dtype
        self.uses, self.kept = 0, None  # how often autograd saved it; what was made, until the last of them

    def make(self) -> Tensor:
        inputs = (x.make() if isinstance(x, _Recipe) else x for x in self.inputs)
        return run(self.function, tuple(inputs), self.dtype)

    def take(self) -> Tensor:
        """Make it for one of several uses."""
        made = self.make() if self.kept is None else self.kept
        self.uses -= 1
        self.kept = made if self.uses > 0 else None
        return made


class _Recipes:
    """The recipes of one block, by the storage of what they made."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Tensor, _Recipe]] = {}  # the tensor is held: its address must stay its own

    def __enter__(self) -> _Recipes:
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.pop()
        self.known.clear()

    def made(self, function: Callable[..., Tensor], inputs: tuple) -> Tensor:
        device = next(x.device.type for x in inputs if isinstance(x, Tensor))
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        out = run(function, inputs, dtype)
        address = out.untyped_storage().data_ptr()
        own = address not in {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
        if own and out.is_contiguous() and not out.storage_offset():
            known = (self.known.get(x.data_ptr()) if isinstance(x, Tensor) else None for x in inputs)
            parts = [x if k is None or k[0] is not x else k[1] for x, k in zip(inputs, known, strict=True)]
            self.known[address] = (out, _Recipe(function, tuple(parts), dtype))
        return out

    def cast_weights(self, block: nn.Module) -> dict[str, Tensor]:
        """The matrices of a block by name, cast as autocast would for each product, and again for the backward pass."""
        found = {}
        for name, module in block.named_modules():
            weight = module.weight if plain_linear(module) else None
            if weight is not None and torch.is_autocast_enabled(weight.device.type):
                found[f"{name}.weight"] = self.made(torch.Tensor.contiguous, (weight,))
        return found

    def pack(self, saved: Tensor) -> Any:
        found = self.known.get(saved.untyped_storage().data_ptr())
        if found is None:
            return saved
        found[1].uses += 1
        return found[1], saved.size(), saved.stride(), saved.storage_offset()


def unpack(saved: Any) -> Tensor:
    """A saved tensor, made again where it was not kept."""
    if isinstance(saved, Tensor):
        return saved
    recipe, size, stride, offset = saved
    with torch.no_grad():
        return recipe.take().as_strided(size, stride, offset)


def run(function: Callable[..., Tensor], inputs: tuple, dtype: torch.dtype | None) -> Tensor:
    """function(*inputs), under autocast to ``dtype`` and in it where one is given."""
    if dtype is None:
        return function(*inputs)
    device = next(x.device.type for x in inputs if isinstance(x, Tensor))
    with torch.autocast(device, dtype, cache_enabled=False):
        return function(*inputs).to(dtype)
