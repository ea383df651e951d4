"""MODIFICATIONS_LOG.md: an entry a run, appended, and standing sections; nothing that a person wrote is ever changed.

Several processes may write at once, and a kill at any instant leaves a whole file: the new text is moved into place
under a lock on the log's folder, which leaves no lock file behind. Whatever fails, the entry is in the run's JSON.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from compat import store
from compat.reports import entries, sections
from compat.reports.history import History, not_run, status_words
from compat.reports.marks import MARK
from compat.reports.templating import TemplateBroken, Templates
from compat.reports.text import code
from compat.result import ERROR, PASSED, SKIPPED, Run
from compat.store import write_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "MODIFICATIONS_LOG.md"
LOCK_S = 60.0
MOST_FINDINGS = 20  # of a tier in an entry; the run has them all
OWN = "."  # the target whose log it is
PENDING = re.compile(r"^<!-- compat:tested pending -->[ \t]*\r?\n.*?^<!-- /compat:tested -->[ \t]*\r?\n?", re.M | re.S)


class LogNotWritten(Exception):
    """The log could not be written; the message says which file and why."""


# -- an entry -------------------------------------------------------------------------------------------------


def status_line(run: Run) -> str:
    """`✅ All Passed`, `⚠️ 11/13 Passed` or `⏳ Pending`; checks that were skipped whole are counted apart."""
    verdict, passed, asked, skipped = status_words(run)
    if not asked and run.results:
        line = f"{MARK[SKIPPED]} Pending"
    elif passed == asked and verdict == "passed":
        line = f"{MARK[PASSED]} All Passed"
    else:
        line = f"{MARK[ERROR]} {passed}/{asked} Passed"
    return line + (f", {skipped} Skipped" if skipped else "")


def spelled(started: str) -> str:
    return started.replace("T", " ").replace("+00:00", " UTC")


def commit_of(run: Run) -> str:
    commit = run.target.get("commit")
    return code(str(commit)[:12]) + (" (dirty)" if run.target.get("dirty") else "") if commit else "none"


def entry(run: Run, run_path: str, history: History | None = None, templates: Templates | None = None) -> str:
    """The run as the log has it: markdown that ends in one newline, whatever the target's messages hold.

    history: what it is compared with. Raises TemplateBroken.
    """
    history = (history or History([])).with_runs([run])
    summary = history.summary(run)
    rows = {row for row in history.rows if row.combo in run.combos and row.target == run.target.get("label")}
    whole = {(check.combo, check.title) for check in run.checks() if check.status == SKIPPED}
    facts = ("device", "torch", "python", "transformers")
    return (templates or Templates()).render(
        "entry.md.j2",
        run=run,
        run_path=str(run_path),
        started=spelled(run.started),
        status=status_line(run),
        facts={name: run.environment.get(name) or "unknown" for name in facts},
        gpu=run.environment.get("gpu") or "none",
        commit=commit_of(run),
        summary=summary,
        first=not any(earlier is not run for row in rows for earlier in history.until(run).of(row)),
        previous=spelled(summary.previous.started) if summary.previous else "",
        skipped=[n for n in not_run(run) if (n.check or n.combo) and (n.combo, n.check) not in whole],
        MOST_FINDINGS=MOST_FINDINGS,
    )


# -- writing --------------------------------------------------------------------------------------------------


class Log:
    """The text of a log while it is being changed. warnings: what was left undone, a sentence each."""

    def __init__(self, before: bytes, templates: Templates):
        self.text = before.decode("utf-8", "surrogateescape")
        self.templates = templates
        self.warnings: list[str] = []

    def add(self, text: str) -> None:
        """Put `text` at the end; a log without a word gets its header first."""
        if not self.text.strip():
            header = self.templates.render("header.md.j2") + "\n" + self.templates.render("sections.md.j2")
            self.text += header
        newline = sections.newline_of(self.text)
        # A blank line before the rule: without it markdown reads the line above as a heading.
        between = newline * (1 if self.text.endswith("\n") else 2)
        self.text += between + text.replace("\n", newline)

    def bring_up_to_date(self, history: History, run: Run | None = None) -> None:
        """Standing sections from all that is known, and pending modifications from `run`."""
        history = history.with_runs(entries.as_run(found, OWN) for found in entries.parse(self.text))
        target = OWN
        if run and not any(row.target == OWN for row in history.rows):
            target = str(run.target.get("label"))
        if run and run.results and run.target.get("label") == target:
            tested = self.templates.render("tested.md.j2", run=run, commit=commit_of(run))
            tested = tested.replace("\n", sections.newline_of(self.text))
            spans = sections.fenced(self.text)
            self.text = PENDING.sub(lambda m: m[0] if any(a <= m.start() < b for a, b in spans) else tested, self.text)
        try:
            self.text = sections.with_markers(self.text, self.templates.render("sections.md.j2"))
            self.text = sections.updated(self.text, sections.rendered(history, self.templates, target))
        except sections.MarkersBroken as error:
            self.warnings.append(f"the standing sections were left as they are: {error}")


@contextlib.contextmanager
def changing(path: Path, templates: Templates | None = None) -> Iterator[Log]:
    """The log, locked; written in one step when the block ends well. Raises LogNotWritten."""
    path = Path(path)
    try:
        if not path.parent.is_dir():
            raise NotADirectoryError(f"{path.parent} is no folder")
        with _locked(Path(os.path.realpath(path)).parent):
            try:
                before = path.read_bytes()
            except FileNotFoundError:
                before = b""
            if path.exists() and not os.access(path, os.W_OK):  # replacing it would get around the permission
                raise PermissionError(f"{path.name} is read-only")
            log = Log(before, templates or Templates())
            yield log
            after = log.text.encode("utf-8", "surrogateescape")
            if after != before:
                write_atomic(path, after)
    except OSError as error:
        raise LogNotWritten(f"the log {path} was not written: {error.strerror or error}") from error
    except TemplateBroken as error:
        raise LogNotWritten(f"the log {path} was not written: {error}") from error


def append(path: Path, text: str) -> None:
    """Add `text` at the end of the log. Raises LogNotWritten. What was there stays, in whatever encoding it is."""
    with changing(path) as log:
        log.add(text)


def record(
    path: Path, run: Run, templates: Templates | None = None, folder: Path = store.RUNS, more: str = ""
) -> list[str]:
    """Append the run's entry, bring the sections up to date; run.log then holds the entry. Returns warnings.

    more: markdown that the entry ends with.
    The run is saved before the log names it, and again if the log was not written. Raises LogNotWritten.
    """
    path, history = Path(path), History.read(folder)
    run.log = {"path": str(path), "entry": "", "error": ""}
    try:
        run.log["entry"] = entry(run, named(run, path, folder), history, templates) + more
        store.save(run, folder)
    except TemplateBroken as error:
        raise _kept(run, folder, LogNotWritten(f"the log {path} was not written: {error}")) from None
    except OSError:
        pass  # the caller says that runs cannot be saved; the log is a place of its own
    try:
        with changing(path, templates) as log:
            log.add(run.log["entry"])
            log.bring_up_to_date(History.read(folder).with_runs([run]), run)
            return log.warnings
    except LogNotWritten as error:
        raise _kept(run, folder, error) from None


def _kept(run: Run, folder: Path, error: LogNotWritten) -> LogNotWritten:
    run.log["error"] = str(error)
    try:
        saved = store.save(run, folder)
    except OSError as why:
        return LogNotWritten(f"{error}; nor was the run kept: {why.strerror or why}")
    return LogNotWritten(f"{error}; the entry is kept in {saved}, and compat log sync adds it")


def named(run: Run, path: Path, folder: Path = store.RUNS) -> str:
    """The run's file as a link from the log's folder."""
    return Path(os.path.relpath(store.path_of(run, folder), path.parent)).as_posix()


def sync(path: Path, templates: Templates | None = None, folder: Path = store.RUNS) -> list[str]:
    """Add the entries of runs that were to be logged here and are not, oldest first. Returns their ids."""
    history, added, settled = History.read(folder), [], []
    with changing(path, templates) as log:
        there = {found.id for found in entries.parse(log.text)}
        for run in history.runs:
            if not run.log or Path(run.log["path"]).resolve() != Path(path).resolve():
                continue
            text = run.log["entry"] or entry(run, named(run, Path(path), folder), history.until(run), templates)
            if run.id not in there and text.strip() not in log.text.replace("\r\n", "\n"):
                log.add(text)
                added.append(run)
            elif not run.log["error"]:
                continue
            run.log |= {"entry": text, "error": ""}
            settled.append(run)
        if added:
            log.bring_up_to_date(history, added[-1])
    for run in settled:
        store.save(run, folder)
    return [run.id for run in added]


def start_modification(path: Path, told: dict, templates: Templates | None = None) -> int:
    """Append the entry of a modification, pending until the next run; returns its number.

    told: type, title, files, impact, description.
    """
    with changing(path, templates) as log:
        numbers = [int(number) for number in re.findall(r"^### Modification #(\d{1,9})\b", log.text, re.MULTILINE)]
        number = max(numbers, default=0) + 1
        today = datetime.fromtimestamp(time.time()).date().isoformat()
        given = {"number": number, "date": today, "run": None, **told}
        log.add(log.templates.render("modification.md.j2", **given))
        return number


# -- the lock -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(folder: Path):
    """Only one process at a time; TimeoutError when another holds the lock for longer than LOCK_S."""
    until = time.monotonic() + LOCK_S
    if fcntl is None:
        lock = folder / f".{NAME}.lock"
        while True:
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                _wait(until, f"{lock} exists; remove it if no run is going on")
        try:
            yield
        finally:
            lock.unlink()
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _wait(until, f"another process holds the lock on {folder}")
        yield
    finally:
        os.close(handle)  # closing lets go of the lock


def _wait(until: float, why: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(why)
    time.sleep(0.02)
