"""Which name on the Hub becomes which parameter here, and the strict loading by such rules.

Unusual: an unmatched key is an answer, so loading stops there: every parameter must come out of the file,
and every entry of the file must be used or be named as none of ours. Tensors are read one at a time, into
parameters that may be on the meta device, so the weights are never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nanovlm.errors import WeightsError


class Stored(Protocol):
    """Tensors by name that are read when asked for."""

    where: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def like(self, name: str) -> Tensor: ...  # on the meta device: shape and dtype, no memory

    def read(self, name: str) -> Tensor: ...


class Join(NamedTuple):
    """How tensors of a file become one of ours, and back."""

    load: Callable[[list[Tensor], Tensor], Tensor]  # (the file's tensors, our present one) -> our new one
    save: Callable[[Tensor, int], Iterable[Tensor]]  # (ours, how many the file has) -> the file's


COPY = Join(lambda parts, ours: parts[0], lambda ours, count: [ours])
# Several matrices on top of each other, as q, k and v in one projection.
CONCAT = Join(lambda parts, ours: torch.cat(parts), lambda ours, count: ours.chunk(count))


def _first_rows(parts: list[Tensor], ours: Tensor) -> Tensor:
    part = parts[0]
    if part.shape[0] >= ours.shape[0]:
        return part
    return torch.cat((part, ours[part.shape[0] :].to(part)))


# A vocabulary that was extended: rows beyond the file's keep the values they were drawn with.
ROWS = Join(_first_rows, lambda ours, count: [ours])


@dataclass(frozen=True)
class Rule:
    """``source`` names in the file become the parameter ``target``; ``*`` stands for a layer's number."""

    source: str | tuple[str, ...]
    target: str
    join: Join = COPY

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass
class LoadReport:
    """What loading did. ``reshaped``: {parameter: (shape in the file, shape here)}."""

    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = "".join(f", {name} {a} -> {b}" for name, (a, b) in self.reshaped.items())
        return f"{len(self.loaded)} tensors loaded, {len(self.ignored)} of the file not ours{changed}"


def own_names(module: nn.Module) -> dict[str, list[str]]:
    """{name to save under: all names of that tensor}; of tied names the first in the alphabet is saved."""
    by_tensor: dict[int, list[str]] = {}
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **_buffers(module)}
    for name in sorted(module.state_dict()):
        by_tensor.setdefault(id(tensors[name]), []).append(name)
    return {names[0]: names for names in by_tensor.values()}


def load(
    module: nn.Module,
    stored: Stored,
    rules: Iterable[Rule] | None = None,
    *,
    prefixes: Iterable[str] = ("",),
    ignored: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """Fill ``module`` from ``stored``; without rules, names are the same on both sides.

    prefixes: what may stand before every source name; the first that fits is taken.
    ignored: patterns of names in the file that are none of ours.
    dtype: of the parameters; None keeps the module's. Buffers keep their own.
    Raises WeightsError naming missing, unexpected or ill-shaped tensors before the first one is filled; only a
    tensor that cannot be read from its file then stops half-way.
    """
    names = own_names(module)
    plan = _plan(names, stored, rules, tuple(prefixes))
    buffers = _buffers(module)
    report = LoadReport()
    problems = []
    for name, aliases in names.items():
        if not any(alias in plan for alias in aliases):
            if name.rpartition(".")[2] in _computed(module, name):
                report.computed.append(name)
            else:
                problems.append(f"missing: {' or '.join(aliases)}")
    used = {source for rule, sources in plan.values() for source in sources}
    report.ignored = [n for n in stored.shapes if n not in used and any(fnmatchcase(n, p) for p in ignored)]
    problems += [f"unexpected: {n}" for n in stored.shapes if n not in used and n not in set(report.ignored)]
    current = module.state_dict()
    for target, (rule, sources) in plan.items():
        problem = _misfit(rule, [stored.like(source) for source in sources], current[target])
        if problem:
            problems.append(f"{target}: {problem}")
    if problems:
        raise WeightsError(_explain(stored.where, problems, names, current))

    def made(alias: str) -> Tensor:
        rule, sources = plan[alias]
        ours = current[alias]
        value = rule.join.load([stored.read(source) for source in sources], ours)
        return value.to(ours.dtype if dtype is None or alias in buffers else dtype)

    filling = {name: [alias for alias in aliases if alias in plan] for name, aliases in names.items()}
    for found in filling.values():
        for alias in found[1:]:
            if not torch.equal(made(alias), made(found[0])):
                raise WeightsError(
                    f"{stored.where}: {found[0]} and {alias} differ, but lm_tie_weights=True makes them one; "
                    "was it saved with lm_tie_weights=False?"
                )
    for name, found in filling.items():
        if not found:
            continue
        _put(module, names[name], made(found[0]))
        report.loaded += found
        for alias in found:
            (rule, sources), shape = plan[alias], tuple(current[alias].shape)
            if stored.shapes[sources[0]] != shape and rule.join is not CONCAT:
                report.reshaped[alias] = (stored.shapes[sources[0]], shape)
    for name in report.computed:
        _put(module, names[name], _computed(module, name)[name.rpartition(".")[2]])
    return report


def to_hub(module: nn.Module, rules: Iterable[Rule], prefix: str = "") -> dict[str, Tensor]:
    """The module's tensors under the Hub's names; tied ones once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    state = module.state_dict(keep_vars=True)
    for rule in rules:
        for target, sources in _expanded(rule, state):
            tensor = state[target]
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            parts = rule.join.save(tensor.detach(), len(sources))
            found.update(
                {prefix + name: part.contiguous() for name, part in zip(sources, parts, strict=True)}
            )
    return found


def _plan(
    names: Mapping[str, list[str]], stored: Stored, rules: Iterable[Rule] | None, prefixes: tuple[str, ...]
) -> dict[str, tuple[Rule, tuple[str, ...]]]:
    """{parameter: (rule, names in the file)} of what the file has."""
    targets = [name for aliases in names.values() for name in aliases]
    if rules is None:
        return {name: (Rule(name, name), (name,)) for name in targets if name in stored.shapes}
    pairs = [(rule, target, sources) for rule in rules for target, sources in _expanded(rule, targets)]

    def fitting(prefix: str) -> int:
        return sum(all(prefix + name in stored.shapes for name in sources) for _, _, sources in pairs)

    prefix = max(prefixes, key=fitting)
    plan = {}
    for rule, target, sources in pairs:
        full = tuple(prefix + name for name in sources)
        if all(name in stored.shapes for name in full):
            plan[target] = (rule, full)
    return plan


def _misfit(rule: Rule, parts: list[Tensor], ours: Tensor) -> str:
    """Why a file's tensors do not become ``ours``, or nothing. parts: on the meta device."""
    shapes = " + ".join(str(tuple(part.shape)) for part in parts)
    try:
        # not on meta: joining there imports torch's compiler, two seconds of a start
        shape: tuple[int, ...] | None = rule.join.load([_weightless(part) for part in parts], _weightless(ours)).shape
    except WeightsError as error:
        return str(error)
    except RuntimeError:  # torch's: shapes that cannot be joined, whatever they are to become
        shape = None
    if shape != ours.shape:
        return f"{shapes} in the file, {tuple(ours.shape)} here"
    strange = [part.dtype for part in parts if part.is_floating_point() != ours.is_floating_point()]
    return f"{strange[0]} in the file, {ours.dtype} here" if strange else ""


def _weightless(tensor: Tensor) -> Tensor:
    """Zeros of a tensor's shape and dtype that take one element's memory."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _expanded(rule: Rule, targets: Iterable[str]) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(target, sources) of a rule for every layer there is."""
    head, star, tail = rule.target.partition("*")
    for name in targets:
        if not star and name == rule.target:
            yield name, rule.sources
        elif star and name.startswith(head) and name.endswith(tail):
            number = name[len(head) : len(name) - len(tail)]
            if number.isdigit():
                yield name, tuple(source.replace("*", number) for source in rule.sources)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))


def _computed(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Values a module can compute for its own buffers, where a file has none."""
    owner: Any = module.get_submodule(name.rpartition(".")[0])
    return owner.computed_buffers() if hasattr(owner, "computed_buffers") else {}


@torch.no_grad()
def _put(module: nn.Module, names: list[str], value: Tensor) -> None:
    """Make ``value`` the tensor of all ``names``: in place where there is memory of its type, else anew."""
    owner = module.get_submodule(names[0].rpartition(".")[0])
    old = getattr(owner, names[0].rpartition(".")[2])
    if old.device.type != "meta" and old.dtype == value.dtype:
        old.copy_(value)
        return
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for name in names:
        setattr(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)


def _explain(
    where: str, problems: list[str], names: Mapping[str, list[str]], current: Mapping[str, Tensor]
) -> str:
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    hint = "Was it saved by a model of another config? Compare the config.json beside it."
    if any(p == "missing: decoder.token_embedding.weight" for p in problems):
        hint = "The file keeps tied weights once: set lm_tie_weights=True."
    return f"{where} does not fit the model: {shown}. {hint}"
