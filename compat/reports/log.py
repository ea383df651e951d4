"""MODIFICATIONS_LOG.md: an entry a run, appended; nothing that a person wrote is ever changed.

Several processes may append at once, and a kill at any instant leaves a whole file: the new text is moved
into place under a lock on the log's folder, which leaves no lock file behind.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import jinja2

from compat.reports.text import code, word
from compat.result import ERROR, FAILED, PASSED, SKIPPED, Run
from compat.store import write_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "MODIFICATIONS_LOG.md"
TEMPLATES = Path(__file__).with_name("templates")
MARK = {PASSED: "✅", FAILED: "❌", ERROR: "⚠️", SKIPPED: "⏳"}
LOCK_S = 30.0


class LogNotWritten(Exception):
    """The entry could not be appended; the message says to which file and why."""


def status_line(run: Run) -> str:
    """`✅ All Passed`, `⚠️ 11/13 Passed` or `⏳ Pending`; checks that were skipped whole are counted apart."""
    checks = run.checks()
    asked = len(checks) - run.count(SKIPPED)
    passed = run.count(PASSED)
    if not asked:
        line = "⏳ Pending"
    elif passed == asked and not run.incomplete:
        line = "✅ All Passed"
    else:
        line = f"⚠️ {passed}/{asked} Passed"
    return line + (f", {run.count(SKIPPED)} Skipped" if run.count(SKIPPED) else "")


def entry(run: Run, run_path: str) -> str:
    """The run as the log has it: markdown that ends in one newline, whatever the target's messages hold."""
    commit = run.target.get("commit")
    return (
        _environment()
        .get_template("entry.md.j2")
        .render(
            run=run,
            run_path=str(run_path),
            started=run.started.replace("T", " ").replace("+00:00", " UTC"),
            status=status_line(run),
            mark=MARK,
            facts={
                name: run.environment.get(name) or "unknown"
                for name in ("device", "torch", "python", "transformers")
            },
            gpu=run.environment.get("gpu") or "none",
            commit="none"
            if not commit
            else code(commit[:12]) + (" (dirty)" if run.target.get("dirty") else ""),
            skipped=[
                result
                for check in run.checks()
                if check.status != SKIPPED
                for result in check.results
                if result.status == SKIPPED
            ],
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # markdown: `code` and `word` make values harmless
    )
    environment.filters |= {"code": code, "word": word}
    return environment


def append(path: Path, text: str) -> None:
    """Add `text` at the end of the log, creating it with a short header where there is none.

    Raises LogNotWritten. Existing bytes stay as they are, in whatever encoding they are.
    """
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
            write_atomic(path, _joined(before, text))
    except OSError as error:
        raise LogNotWritten(f"the log {path} was not written: {error.strerror or error}") from error


def _joined(before: bytes, text: str) -> bytes:
    if not before.strip():
        header = _environment().get_template("header.md.j2").render()
        return before + header.encode("utf-8") + text.encode("utf-8")
    newline = "\r\n" if before.count(b"\r\n") * 2 > before.count(b"\n") else "\n"
    ended = before.endswith(b"\n")
    # A blank line before the rule: without it markdown reads the line above as a heading.
    return before + (newline * (1 if ended else 2) + text.replace("\n", newline)).encode("utf-8")


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
