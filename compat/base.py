"""What a gate compares with: a commit, or locks that were written earlier; and what it judges by, read from there.

Unusual: rules and tolerances are taken from the base only where the judged repository holds the very judge that
runs; waivers and committed locks always. So a change cannot loosen the gate it has to pass.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from compat import lock
from compat.checkout import (
    CheckoutError,
    current_branch,
    default_branch,
    is_shallow,
    merge_base,
    prefix,
    repository,
    resolve_commit,
    top,
)
from compat.findings import Rule
from compat.matchers.pair import TOLERANCES, read_tolerances
from compat.result import INCOMPLETE, USAGE
from compat.rules import TABLE, catalogue, read_rules
from compat.target import Target, TargetError, at_commit
from compat.waivers import FILE

JUDGE = Path(__file__).resolve().parent
LOCKS = ("compat/baselines", "baselines")  # where a repository keeps its locks
DEPTH = "in CI set fetch-depth: 0, elsewhere git fetch --unshallow"
OTHERWISE = "name one with --base REF, or compare with a lock: --base FILE.json"


class NoBase(Exception):
    """There is nothing to compare with; the text says why and what to do. ``exit_code`` is 2 or 3."""

    def __init__(self, message: str, exit_code: int = INCOMPLETE):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Base:
    """about: for people, "the merge-base with main, 1a2b3c4d5e". target: a commit's files, None for locks.

    locks: {combo: lock}. root: the top of the files that rules, waivers and committed locks are read from.
    """

    about: str
    root: Path
    target: Target | None = None
    locks: dict[str, dict] = field(default_factory=dict)


def choose(head: Target, wanted: str | None) -> Base:
    """The base that ``wanted`` names, or the default one. Raises NoBase."""
    if wanted is not None and (Path(wanted).exists() or wanted.endswith(".json")):
        return _locks(head, Path(wanted))
    where = head.source or head.folder
    if repository(where) is None:
        raise NoBase(f"{head.label} is in no git repository, so there is no commit to compare with: {OTHERWISE}", USAGE)
    try:
        if wanted is not None:
            commit, about = resolve_commit(where, wanted), wanted
        else:
            commit, about = _default(head, where)
        target = at_commit(head, commit)
    except (CheckoutError, TargetError) as error:
        raise NoBase(str(error), error.exit_code) from None
    return Base(f"{about}, {commit[:10]}", _above(target.folder, prefix(where)), target)


def root_of(head: Target) -> Path:
    """The top of the repository that ``head`` lies in, in the files that are judged."""
    if head.source:
        return _above(head.folder, prefix(head.source))
    return top(head.folder)


def _above(folder: Path, below: str) -> Path:
    return folder.parents[len(Path(below).parts) - 1] if below else folder


def _default(head: Target, where: Path) -> tuple[str, str]:
    """(commit, what it is)."""
    if head.commit is None:
        raise NoBase(f"{head.label} has no commit yet, so there is nothing to compare with: {OTHERWISE}")
    branch = default_branch(where)
    if branch is None:
        raise NoBase(f"{head.label} has no branch main or master, here or at origin, to compare with: {OTHERWISE}")
    found = merge_base(where, head.commit, branch)
    if found is None:
        why = f", this clone is shallow ({DEPTH})" if is_shallow(where) else ""
        raise NoBase(f"{head.label} and {branch} have no commit in common{why}; {OTHERWISE}")
    if found != head.commit:
        return found, f"the merge-base with {branch}"
    here = current_branch(where) if not head.ref else None
    if head.dirty or (here and here != branch.removeprefix("origin/")):  # only what is not committed lies between
        return head.commit, f"the last commit, which {branch} has too"
    try:
        return resolve_commit(where, f"{head.commit}~1"), f"the commit before, on {branch}"
    except CheckoutError:
        why = f"this clone is shallow ({DEPTH})" if is_shallow(where) else "it is the first one"
        raise NoBase(f"the commit before {head.commit[:10]} is not here, {why}; {OTHERWISE}") from None


def _locks(head: Target, path: Path) -> Base:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise NoBase(f"--base {path}: the folder holds no lock (*.json)", USAGE)
    locks: dict[str, dict] = {}
    for file in files:
        try:
            held = lock.read(file)
        except lock.NotALock as error:
            raise NoBase(f"--base {error}", USAGE) from None
        except OSError as error:
            raise NoBase(f"--base {file} cannot be read: {error.strerror or error}") from None
        if held["combo"] in locks:
            raise NoBase(f"--base {path}: two locks are of combo {held['combo']}", USAGE)
        locks[held["combo"]] = held
    return Base(f"{'the lock' if path.is_file() else 'the locks in'} {path}", root_of(head), locks=locks)


# -- what is judged by ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A policy file that differs between base and head. narrows: it can only make the gate stricter."""

    path: str
    what: str
    narrows: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" + (" (this only narrows what passes)" if self.narrows else "")


def judge_inside(root: Path) -> Path | None:
    """Where the judge that runs lies in the repository below ``root``; None where it lies elsewhere."""
    try:
        return JUDGE.relative_to(root.resolve())
    except ValueError:
        return None


def policy_changes(base: Path, head: Path) -> list[Change]:
    """What decides over pass or fail, and differs between the two roots."""
    inside = judge_inside(head)
    names = {Path(FILE)}
    for root in (base, head):
        names |= {path.relative_to(root) for folder in LOCKS for path in (root / folder).glob("*.json")}
        if inside:
            names |= {inside / TABLE.name, inside / TOLERANCES.name}
            names |= {path.relative_to(root) for path in (root / inside / "matchers").rglob("*.py")}
    return list(_changed(sorted(names), base, head))


def _changed(names: list[Path], base: Path, head: Path) -> Iterator[Change]:
    for name in names:
        old, new = _bytes(base / name), _bytes(head / name)
        if old == new:
            continue
        what = "added" if old is None else "removed" if new is None else "changed"
        if name.name == FILE:
            yield _waiver_change(old or b"", new or b"")
        elif name.name == TABLE.name and old and new:
            yield Change(str(name), "; ".join(_rule_changes(base / name, head / name)) or what)
        else:
            yield Change(str(name), what)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _waiver_change(old: bytes, new: bytes) -> Change:
    try:
        before, after = (tomllib.loads(text.decode()).get("waiver", []) for text in (old, new))
        gone = sum(entry not in after for entry in before)
        fresh = sum(entry not in before for entry in after)
    except (ValueError, AttributeError, TypeError):
        return Change(FILE, "changed")
    if not gone and not fresh:
        return Change(FILE, "no entry changed", narrows=True)
    return Change(FILE, f"{fresh} new or changed, {gone} gone", narrows=not fresh)


def _rule_changes(base: Path, head: Path) -> Iterator[str]:
    try:
        old, new = read_rules(base), read_rules(head)
    except ValueError as error:
        yield f"changed, and one of the two cannot be read: {error}"
        return
    yield from (f"{id} is gone" for id in old if id not in new)
    yield from (f"{id} is new" for id in new if id not in old)
    for id in old:
        if id in new and old[id] != new[id]:
            severities = old[id].severity, new[id].severity
            yield f"{id} is " + ("described anew" if severities[0] == severities[1] else " -> ".join(severities))


def rules_of(root: Path, inside: Path | None) -> dict[str, Rule]:
    """The rules of the judge at ``inside`` below ``root``, with ours for those it does not know; ours without one."""
    if inside is None:
        return catalogue()
    try:
        return catalogue() | read_rules(root / inside / TABLE.name)
    except (OSError, ValueError):  # of before there was a judge, or one written for another: the change is listed
        return catalogue()


def tolerances_of(root: Path, inside: Path | None) -> dict:
    """As rules_of, of tolerances.toml."""
    ours = read_tolerances(TOLERANCES)
    if inside is None:
        return ours
    try:
        return _over(ours, read_tolerances(root / inside / TOLERANCES.name))
    except (OSError, ValueError):
        return ours


def _over(under: dict, upper: dict) -> dict:
    both = {name: _over(under[name], upper[name]) for name in under if isinstance(upper.get(name), dict)}
    return under | upper | {name: table for name, table in both.items() if isinstance(under[name], dict)}
