"""`compat run --watch`: after a change, ask again only the checks that the changed file can affect.

Unusual: what a check depends on is not guessed from names. Each time a check is over, the target's process is asked
which of the target's files it has loaded; a file that was not loaded by then had no part in the check's answers.
Whatever that does not settle reruns everything: a Python file that is new or gone, a model that discovery would now
find elsewhere, any file that is not Python. Files outside the target are not watched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compat.cache import ASIDE
from compat.child.discover import discover
from compat.process import Child, ChildFailed, CouldNotAsk, NotSupported, TargetRaised, WorkerError
from compat.result import Result

POLL_S = 0.5
SETTLED_S = 0.3  # an editor writes a file in several steps, a checkout writes many files
# What documents a model and is not read by it.
DOCUMENTS = {".md", ".rst", ".ipynb", ".png", ".jpg", ".svg", ".gif", ".pdf", ".pyc", ".swp", ".log"}


class Observed(Child):
    """A Child that says which files of the target it has loaded."""

    files: frozenset[str] = frozenset()

    def look(self) -> frozenset[str]:
        """Files loaded so far, from the target's folder, those of a process that has died since among them."""
        if self._ready and not self._disturbed():
            try:
                answer = self._exchange("loaded", {"combo": None, "parameters": {}})
                self.files |= {str(name) for name in answer["mine"]}
            except (ChildFailed, TargetRaised, CouldNotAsk, NotSupported, WorkerError, KeyError, TypeError):
                pass  # the next question starts another process, whose files count as well
        return self.files

    def close(self) -> None:
        self.look()
        super().close()


@dataclass
class Loaded:
    """A watcher between: passes everything on, and notes what was loaded when each check ended.

    by_check: {check: files}. A check that was never asked to its end has no entry.
    """

    watcher: Any  # the terminal's
    by_check: dict[str, frozenset[str]] = field(default_factory=dict)
    child: Observed | None = None
    check: str = ""

    def note(self) -> None:
        if self.child and self.check:
            before = self.by_check.get(self.check, frozenset())
            self.by_check[self.check] = before | self.child.look()

    def start(self, total: int) -> None:
        self.watcher.start(total)

    def asking(self, check: str, test: str) -> None:
        if check != self.check:
            self.note()
            self.check = check
        self.watcher.asking(check, test)

    def started(self, hello: dict, elapsed_s: float) -> None:
        self.watcher.started(hello, elapsed_s)

    def answered(self, result: Result) -> None:
        self.watcher.answered(result)

    def stop(self) -> None:
        self.watcher.stop()


Snapshot = dict[str, tuple[int, int, int]]


def snapshot(folder: Path) -> Snapshot:
    """{path from folder: (time, size, inode)} of every file that a model could read."""
    found = {}
    for here, folders, files in os.walk(folder):
        folders[:] = [
            name for name in folders if name not in ASIDE and not os.path.exists(os.path.join(here, name, "pyvenv.cfg"))
        ]
        for name in files:
            path = os.path.join(here, name)
            if name in ASIDE or os.path.splitext(name)[1] in DOCUMENTS or name.endswith("~"):
                continue
            try:
                status = os.stat(path)
            except OSError:  # gone between the two calls, or a link to nowhere
                continue
            found[os.path.relpath(path, folder)] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return found


def changed(before: Snapshot, after: Snapshot) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@dataclass(frozen=True)
class Affected:
    """Titles of the checks to ask again, and why, for people."""

    checks: tuple[str, ...]
    why: str


def affected(
    names: Iterable[str],
    before: Snapshot,
    after: Snapshot,
    loaded: dict[str, frozenset[str]],
    checks: Iterable[str],
    moved: bool = False,
) -> Affected:
    """Which of ``checks`` the changed files can affect.

    loaded: what each check had loaded when it ended; a check that is not in it is always affected.
    moved: discovery finds other classes and functions, or finds them elsewhere, than before.
    """
    names, checks = list(names), tuple(checks)
    if moved:
        return Affected(checks, "what discovery finds in the folder has changed")
    for name in names:
        if not name.endswith(".py"):
            return Affected(checks, f"{name} is not Python: what reads it is not known")
        if name not in before or name not in after:
            return Affected(checks, f"{name} is {'new' if name in after else 'gone'}")
    some = set(names)
    hit = tuple(check for check in checks if check not in loaded or loaded[check] & some)
    if not hit:
        return Affected((), f"no check has loaded {', '.join(names[:3])}{' ...' * (len(names) > 3)}")
    return Affected(hit, f"{', '.join(names[:3])}{' ...' * (len(names) > 3)}")


def wait(folder: Path, before: Snapshot, sleep: Callable[[float], None] = time.sleep) -> Snapshot:
    """The files as they are once something changed and nothing has for SETTLED_S."""
    after = snapshot(folder)
    while not changed(before, after):
        sleep(POLL_S)
        after = snapshot(folder)
    while True:
        sleep(SETTLED_S)
        later = snapshot(folder)
        if not changed(after, later):
            return after
        after = later


def watch(
    folder: Path,
    checks: Iterable[str],
    ask: Callable[[tuple[str, ...]], tuple[dict[str, frozenset[str]], bool]],
    tell: Callable[[str], None],
    find: Callable[[], object],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Ask all ``checks``, then, for ever, those that a change affects. Ends by KeyboardInterrupt.

    ask(checks) -> ({check: files it had loaded}, whether all of them were asked). find() -> what discovery finds.
    """
    checks = tuple(checks)
    loaded: dict[str, frozenset[str]] = {}
    before, found = snapshot(folder), find()
    owed = checks
    while True:
        if owed:
            made, whole = ask(owed)
            loaded |= made
            owed = () if whole else owed  # a file that cannot be imported stops them all: they are asked once it can
            tell(f"watching {folder}; Ctrl-C ends")
        after = wait(folder, before, sleep)
        names, now = changed(before, after), find()
        what = affected(names, before, after, loaded, checks, moved=now != found)
        before, found = after, now
        owed = tuple(check for check in checks if check in what.checks or check in owed)
        asked = "all checks" if owed == checks else ", ".join(owed) or "nothing to ask"
        tell(f"{what.why}: {asked}")


def finder(target) -> Callable[[], object]:
    """What the child's discovery would find in the target's folder, to be compared with later."""

    def find() -> object:
        if target.module:  # named by the user: nothing is looked for
            return None
        file = str(target.file) if target.file else None
        return discover(str(target.folder), cls=target.cls, file=file)

    return find
