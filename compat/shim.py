"""What to do with an old checkpoint's tensors so that a model with other keys takes them: guesses, by shape alone.

Unusual: nothing here is a proof. `suspects` lists the ways in which keys may have been renamed, transposed, fused or
split, likeliest first; compat.witness loads the checkpoint through each and keeps the one whose logits are the same.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from compat.matchers.pair import alike
from compat.ranges import group, numbers_of

MOST = 48  # ways to try; each costs a forward pass
COPIED, TRANSPOSED, FUSED, SPLIT = "rename", "transposition", "fusion", "split"


@dataclass(frozen=True)
class Move:
    """``sources`` of the file, stacked, become ``targets`` of the model, cut; each matrix transposed before if so."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transposed: bool = False

    @property
    def kind(self) -> str:
        if len(self.sources) > 1:
            return FUSED
        return SPLIT if len(self.targets) > 1 else TRANSPOSED if self.transposed else COPIED


@dataclass(frozen=True)
class Shim:
    """moves: for the names that change. dropped: names of the file that the model has no use for."""

    moves: tuple[Move, ...]
    dropped: tuple[str, ...] = ()

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in (COPIED, TRANSPOSED, FUSED, SPLIT) if any(move.kind == kind for move in self.moves)]

    def as_json(self) -> dict:
        names = ("sources", "targets", "transposed")
        moves = [{name: getattr(move, name) for name in names} for move in self.moves]
        return {"moves": moves, "dropped": list(self.dropped)}

    def key_mapping(self) -> dict[str, str]:
        """{pattern: replacement} for re.sub over a file's names, a line for each rename; layers as one."""
        found: dict[str, str] = {}
        for move in self.moves:
            if move.kind == COPIED:
                old, new = (move.sources[0].split("."), move.targets[0].split("."))
                pattern = [re.escape(part) for part in old]
                if numbers_of(move.sources[0]) == numbers_of(move.targets[0]):
                    number = itertools.count(1)
                    pattern = [r"(\d+)" if part.isdigit() else part for part in pattern]
                    new = [f"\\{next(number)}" if part.isdigit() else part for part in new]
                found.setdefault("^" + r"\.".join(pattern) + "$", ".".join(new))
        return found

    def told(self) -> list[str]:
        """The shim as lines to paste: key_mapping, and what a mapping of names cannot say."""
        lines = []
        if mapping := self.key_mapping():
            lines.append("key_mapping = {")
            lines += [f'    r"{old}": r"{new}",' for old, new in mapping.items()] + ["}"]
        alike_moves: dict[str, list[Move]] = {}
        for move in self.moves:
            if move.kind != COPIED:
                alike_moves.setdefault(re.sub(r"\d+", "#", repr(move)), []).append(move)
        for moves in alike_moves.values():
            t = ".t()" if moves[0].transposed else ""
            sources = [", ".join(group(names)) + t for names in zip(*(move.sources for move in moves), strict=True)]
            targets = [", ".join(group(names)) for names in zip(*(move.targets for move in moves), strict=True)]
            made = f"cat([{', '.join(sources)}])" if len(sources) > 1 else sources[0]
            lines.append(f"{', '.join(targets)} = {'rows of ' if len(targets) > 1 else ''}{made}")
        lines += [f"{name} is left out" for name in group(self.dropped)]
        return lines


@dataclass
class Sides:
    """What does not fit as it is: lost, names of the file; wanted, names of the model; each with its shape."""

    lost: dict[str, tuple[int, ...]]
    wanted: dict[str, tuple[int, ...]]
    moves: list[Move] = field(default_factory=list)

    def take(self, move: Move) -> None:
        self.moves.append(move)
        for name in move.sources:
            self.lost.pop(name, None)
        for name in move.targets:
            self.wanted.pop(name, None)


def suspects(stored: dict[str, tuple[int, ...]], state: dict[str, dict]) -> list[Shim]:
    """Ways to fill a model, likeliest first. stored: {name: shape} of the file. state: the model's facts by key.

    Empty where the names do not explain each other: a new tensor that the file has nothing for.
    """
    # a tensor of several names is in the file under one of them, whichever the target chose to keep
    first_name = {name: fact["tied_to"] or name for name, fact in state.items()}
    in_file = {first_name[name] for name in stored if name in first_name}
    shapes = {name: tuple(fact["shape"]) for name, fact in state.items() if fact["persistent"]}
    lost = {name: shape for name, shape in stored.items() if shapes.get(name) != shape}
    wanted = {
        name: shape for name, shape in shapes.items()
        if stored.get(name) != shape and not (name not in stored and first_name[name] in in_file)
    }  # fmt: skip
    sides = Sides(dict(lost), dict(wanted))
    for way in (_transposed, _fused, _split):
        for move in list(way(sides)):
            if set(move.sources) <= set(sides.lost) and set(move.targets) <= set(sides.wanted):
                sides.take(move)
    renames = _renames(sides)
    for move in renames:
        sides.take(move)
    buffers = {name for name, fact in state.items() if fact["trainable"] is None}
    if any(name not in buffers for name in sides.wanted):
        return []
    dropped = tuple(sides.lost)
    first = Shim(tuple(sides.moves), dropped)
    found = [first] if first.moves or dropped else []
    for place in (_place, _module, lambda name: ""):
        square = _square_too(first, stored, state, place)
        if square:
            found.append(square)
    for moves in _orders(first.moves, stored):
        found.append(Shim(moves, dropped))
        if len(found) >= MOST:
            break
    return list(dict.fromkeys(found))


def _transposed(sides: Sides) -> Iterator[Move]:
    """A matrix whose shape is the other way round, under the same name or a like one."""
    for old, shape in list(sides.lost.items()):
        turned = shape[::-1]
        if len(shape) != 2:
            continue
        if sides.wanted.get(old) == turned:
            yield Move((old,), (old,), True)
            continue
        near = [
            new for new, other in sides.wanted.items()
            if other == turned and turned != shape and numbers_of(new) == numbers_of(old) and alike(old, new)
        ]  # fmt: skip
        straight = [new for new, other in sides.wanted.items() if other == shape and alike(old, new)]
        if near and not straight:
            yield Move((old,), (max(near, key=lambda new: alike(old, new)),), True)


def _fused(sides: Sides) -> Iterator[Move]:
    """Two to four tensors of one place whose rows together are those of a new one."""
    for new, shape in list(sides.wanted.items()):
        parts = _together(new, shape, sides.lost)
        if parts:
            yield Move(parts, (new,))


def _split(sides: Sides) -> Iterator[Move]:
    for old, shape in list(sides.lost.items()):
        parts = _together(old, shape, sides.wanted)
        if parts:
            yield Move((old,), parts)


def _together(whole: str, shape: tuple[int, ...], others: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The names among ``others`` beside ``whole`` whose rows add up to its, in their order; () when none do."""
    head, _, kind = whole.rpartition(".")
    around = head.rpartition(".")[0]
    near = [
        name for name, other in others.items()
        if name != whole and name.startswith(around + ".") and name.rpartition(".")[2] == kind
        and numbers_of(name) == numbers_of(whole) and other[1:] == shape[1:] and other[0] < shape[0]
    ]  # fmt: skip
    for count in (3, 2, 4):
        for chosen in itertools.combinations(near, count):
            if sum(others[name][0] for name in chosen) == shape[0]:
                return tuple(sorted(chosen, key=_usual))
    return ()


def _usual(name: str) -> tuple[int, str]:
    """Sort key: q, k, v; gate, up; else by name."""
    last = name.split(".")[-2] if "." in name else name
    order = next((place for place, word in enumerate(("q", "k", "v", "gate", "up")) if last.startswith(word)), 9)
    return order, name


def _renames(sides: Sides) -> list[Move]:
    found, free = [], dict(sides.wanted)
    for old, shape in sides.lost.items():
        fitting = [new for new, other in free.items() if other == shape and numbers_of(new) == numbers_of(old)]
        order = list(free)
        best = max(fitting, key=lambda new: (alike(old, new), -order.index(new)), default="")
        if best:
            found.append(Move((old,), (best,)))
            del free[best]
    return found


def _square_too(shim: Shim, stored: dict, state: dict, place: Callable[[str], str]) -> Shim | None:
    """With the square matrices in the places of transposed ones transposed too: their shape cannot tell."""
    turned = {place(move.targets[0]) for move in shim.moves if move.transposed}
    if not turned:
        return None
    moves = []
    for move in shim.moves:
        shape = stored[move.sources[0]]
        square = move.kind == COPIED and len(shape) == 2 and shape[0] == shape[1]
        moves.append(Move(move.sources, move.targets, True) if square and place(move.targets[0]) in turned else move)
    spoken = {name for move in shim.moves for name in move.targets}
    for name, shape in stored.items():
        if name not in spoken and name in state and len(shape) == 2 and shape[0] == shape[1] and place(name) in turned:
            moves.append(Move((name,), (name,), True))
    return Shim(tuple(moves), shim.dropped)


def _place(name: str) -> str:
    """The module around a parameter's module, layer numbers left out: what was rewritten together."""
    return re.sub(r"\d+", "#", name.rpartition(".")[0].rpartition(".")[0])


def _module(name: str) -> str:
    """ "self_attn" of every tower's: what one class was rewritten."""
    return _place(name).rpartition(".")[2]


def _orders(moves: tuple[Move, ...], stored: dict) -> Iterator[tuple[Move, ...]]:
    """The same moves with parts in another order, and with names of one shape and place exchanged; layers alike."""
    kinds: dict[str, list[Move]] = {}
    for move in moves:
        kinds.setdefault(re.sub(r"\d+", "#", " ".join((*move.sources, ">", *move.targets))), []).append(move)
    several = {kind: moved for kind, moved in kinds.items() if moved[0].kind in (FUSED, SPLIT)}
    sizes = {kind: max(len(moved[0].sources), len(moved[0].targets)) for kind, moved in several.items()}
    for order in sorted({size for size in sizes.values()}):
        for places in list(itertools.permutations(range(order)))[1:]:
            several_of = {move for move in moves if max(len(move.sources), len(move.targets)) == order}
            yield tuple(_reordered(move, places) if move in several_of else move for move in moves)
    copies: dict[tuple, list[str]] = {}
    for kind, moved in kinds.items():
        if moved[0].kind == COPIED:
            layers = tuple(numbers_of(move.sources[0]) for move in moved)
            copies.setdefault((stored[moved[0].sources[0]], layers), []).append(kind)
    for alike_kinds in copies.values():
        for places in list(itertools.permutations(range(len(alike_kinds))))[1 : 24 if len(alike_kinds) < 5 else 1]:
            exchanged = {
                move: Move(move.sources, kinds[alike_kinds[place]][number].targets)
                for kind, place in zip(alike_kinds, places, strict=True)
                for number, move in enumerate(kinds[kind])
            }
            yield tuple(exchanged.get(move, move) for move in moves)


def _reordered(move: Move, places: tuple[int, ...]) -> Move:
    if move.kind == FUSED:
        return Move(tuple(move.sources[place] for place in places), move.targets, move.transposed)
    return Move(move.sources, tuple(move.targets[place] for place in places), move.transposed)
