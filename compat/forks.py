"""Many versions of one tree, each locked in a copy of a process that has imported everything but the tree.

Unusual: what such a lock asks, and who answers, is what `compat lock` asks and who answers there; only the
seconds that torch takes to be imported are spent once. Needs a system that can fork.
"""

from __future__ import annotations

import compileall
import contextlib
import dataclasses
import os
import py_compile
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compat import lock
from compat.child.discover import SKIPPED
from compat.combo import Combo
from compat.process import Child, CouldNotAsk
from compat.rules import Comparison, compare
from compat.target import Target

MAX_FILE_BYTES = 4 << 20  # larger ones are weights or data


class Forks(Child):
    """A Child whose process is a copy of one that has imported what the target imports from elsewhere."""

    def __init__(self, target: Target, preload: Iterable[str] = (), **options):
        super().__init__(target, **options)
        self.preload, self._forked = list(preload), False

    @property
    def _ready(self) -> bool:
        return self._process is not None and self._forked

    def _launch(self) -> None:
        if self._process is None:
            super()._launch()
            known = {"modules": self.preload, "folder": str(self.target.folder)}
            self._exchange("preload", {"combo": None, "parameters": known})
        self._exchange("fork", {"combo": None, "parameters": {}})
        self._forked = True

    def _stop(self) -> None:
        self._forked = False
        super()._stop()

    def loaded(self) -> dict[str, list[str]]:
        """{"mine": files of the target that were imported, "others": names of all other modules}."""
        return self.ask("loaded")

    @contextlib.contextmanager
    def of(self, target: Target, limit_s: float) -> Iterator[Forks]:
        """Questions inside the block are asked of ``target``; all of them together may take ``limit_s``."""
        self.target, self.starts, self._deadline = target, 0, None
        self.run_timeout_s = self.timeout_s = limit_s
        try:
            yield self
        finally:
            if self._ready and not self._disturbed():
                self._send("join")
            elif self._process is not None:
                self._stop()
            self._forked = False

    def lock(self, target: Target, combo: Combo, limit_s: float) -> dict:
        """The tiny lock of ``target``. Raises CouldNotAsk, LockFailed; the latter, too, when time is up."""
        with self.of(target, limit_s):
            return lock.make(self, combo)


class NotJudged(Exception):
    """A version of which no lock could be made; ``late``: because time was up."""

    def __init__(self, message: str, late: bool):
        super().__init__(message)
        self.late = late


class Bench:
    """Compares changed copies of a target with the unchanged one, several at a time.

    only: as for Copy. Not more workers than processors: a lock is all arithmetic.
    """

    def __init__(
        self, target: Target, only: Iterable[str] = (), workers: int | None = None, limit_s: float = 600.0, **options
    ):
        self.options, self.limit_s = options, limit_s
        self.copy = Copy(target, only)  # never changed
        self.folder, self.only = self.copy.target.folder, only
        self.pool = ThreadPoolExecutor(workers or processors())
        self.mine, self.guard = threading.local(), threading.Lock()
        self.guards: dict[str, threading.Lock] = {}
        self.opened: list[Forks | Copy] = [self.copy]
        self.bases: dict[str, tuple[dict, list[str], float]] = {}
        self.preload: list[str] = []  # known from the first lock on

    def base(self, combo: Combo) -> tuple[dict, list[str], float]:
        """(lock, files of the target that were imported, seconds) of the unchanged code. Raises as Forks.lock."""
        with self.guard:
            mine = self.guards.setdefault(combo.name, threading.Lock())
            if not self.preload:
                with contextlib.closing(Forks(self.copy.target, **self.options)) as first:
                    self.preload = self._base(first, combo)["others"]
        with mine:
            if combo.name not in self.bases:
                self._base(self._own()[0], combo)
            return self.bases[combo.name]

    def _base(self, forks: Forks, combo: Combo) -> dict[str, list[str]]:
        with forks.of(self.copy.target, self.limit_s):
            began = time.monotonic()
            made, loaded = lock.make(forks, combo), forks.loaded()
        self.bases[combo.name] = made, loaded["mine"], time.monotonic() - began
        return loaded

    def _own(self) -> tuple[Forks, Copy]:
        """The calling thread's process, and its copy, whose files it may change."""
        if not hasattr(self.mine, "pair"):
            copy = Copy(self.copy.target, self.only)
            self.mine.pair = Forks(copy.target, self.preload, **self.options), copy
            with self.guard:
                self.opened += self.mine.pair
        return self.mine.pair

    def files(self, combo: Combo) -> list[str]:
        """The target's files that a lock of this combo uses; none where the target has no such combo."""
        made, mine, _ = self.base(combo)
        return mine if any(path.startswith("state.") for path in made["facts"]) else []

    def took_s(self, combo: Combo) -> float:
        return self.base(combo)[2]

    def compared(self, files: Mapping[str, str], combo: Combo, limit_s: float) -> Comparison:
        """What the change of some files' text changes. Called by threads of the pool. Raises NotJudged."""
        made, _, _ = self.base(combo)
        forks, copy = self._own()
        began = time.monotonic()
        try:
            with copy.changed(files) as target:
                return compare(made, forks.lock(target, combo, limit_s))
        except (CouldNotAsk, lock.LockFailed) as error:
            raise NotJudged(str(error), time.monotonic() - began >= limit_s) from None

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        for each in self.opened:
            each.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Copy:
    """A private copy of a target's code, whose files can be changed for a while.

    only: names in the target's folder that are copied, all when none is given.
    """

    def __init__(self, target: Target, only: Iterable[str] = ()):
        self._folder = tempfile.TemporaryDirectory(prefix="compat-tree-")
        folder, only = Path(self._folder.name).resolve() / "tree", set(only)

        def left_out(at: str, names: list[str]) -> set[str]:
            elsewhere = set(names) - only if only and Path(at) == target.folder else set()
            return elsewhere | _not_code(at, names)

        shutil.copytree(target.folder, folder, ignore=left_out, symlinks=True)
        # by content: a file that changes for a while is compiled anew, the others are not, whatever the clock says
        compileall.compile_dir(folder, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        file = target.file and folder / Path(target.file).relative_to(target.folder)
        self.target = dataclasses.replace(target, folder=folder, file=file)

    @contextlib.contextmanager
    def changed(self, files: Mapping[str, str]) -> Iterator[Target]:
        """The target with other text in some files, by their path below its folder."""
        before = {name: self._read(name) for name in files}
        try:
            for name, text in files.items():
                path = self.target.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            yield self.target
        finally:
            for name, held in before.items():
                if held is None:
                    (self.target.folder / name).unlink()
                else:
                    (self.target.folder / name).write_bytes(held)

    def _read(self, name: str) -> bytes | None:
        path = self.target.folder / name
        return path.read_bytes() if path.exists() else None

    def close(self) -> None:
        self._folder.cleanup()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _not_code(folder: str, names: list[str]) -> set[str]:
    """What a copy leaves out: hidden and vendored folders, environments, tests, weights."""
    left = set()
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            if name in SKIPPED or name.startswith(".") or os.path.exists(os.path.join(path, "pyvenv.cfg")):
                left.add(name)
        elif not os.path.isfile(path) or os.path.getsize(path) > MAX_FILE_BYTES:
            left.add(name)
    return left
