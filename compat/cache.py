"""Answers kept from run to run, so that an unchanged tree is not asked again.

Unusual: nothing in an entry is trusted. An entry that is torn, edited, a link, too large, of another key or of a
shape its reader refuses counts as absent, and the question is asked anew. Who may write into the folder may still
forge an answer: in CI, restore it only from runs that you trust.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compat.checkout import cache_folder
from compat.store import write_atomic

HERE = Path(__file__).resolve().parent
MOST_BYTES = 64 << 20
MOST_ENTRIES = 600
WHOLE_BYTES = 16 << 20  # larger files (weights, data) count by size and time
# What a run writes, tools leave behind, or only the gate reads: none of it changes what a model answers.
ASIDE = {".git", ".compat", "__pycache__", "node_modules", ".venv", ".nox", ".pytest_cache", ".ruff_cache",
         ".mypy_cache", ".hypothesis", ".benchmarks", "MODIFICATIONS_LOG.md", "waivers.toml"}  # fmt: skip
# Names of installed packages carry their versions: torch-2.13.0.dist-info.
_INSTALLED = """
import os, sys
found = {name for folder in sys.path if os.path.isdir(folder) for name in os.listdir(folder)
         if name.endswith((".dist-info", ".egg-info"))}
told = [sys.version, sys.prefix, *sorted(found)]
"""


def tree_hash(folder: Path) -> str:
    """A hash of every file below ``folder`` that a model could read, committed or not, ignored by git or not."""
    found = hashlib.sha256()
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in ASIDE and not os.path.exists(os.path.join(here, name, "pyvenv.cfg"))
        )
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        for name in sorted([*files, *links]):
            if name not in ASIDE and not name.endswith(".pyc"):
                path = os.path.join(here, name)
                found.update(f"{os.path.relpath(path, folder)}\0{_file(path)}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def _file(path: str) -> str:
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            within = "" if os.path.isdir(path) or not os.path.exists(path) else _file(os.path.realpath(path))
            return f"link {os.readlink(path)} {within}"
        if not stat.S_ISREG(status.st_mode):
            return "special"
        if status.st_size > WHOLE_BYTES:
            return f"large {status.st_size} {status.st_mtime_ns}"
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        return f"unreadable {error.errno}"


@functools.cache
def harness_hash() -> str:
    """A hash of the judge's own code and tables."""
    found = hashlib.sha256()
    for path in sorted([*HERE.rglob("*.py"), *HERE.rglob("*.toml")]):
        found.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes())
    return found.hexdigest()


@functools.cache
def surroundings(python: str | None) -> tuple[str, ...]:
    """The interpreter, the versions of every package it has, the processor: what else an answer depends on."""
    if python is None:
        here: dict = {}
        exec(_INSTALLED, here)
        versions = json.dumps(here["told"])
    else:
        asked = [python, "-c", f"{_INSTALLED}\nimport json; print(json.dumps(told))"]
        try:
            told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
            versions = told.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            versions = ""
    names = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "COMPAT_SANDBOX", "LANG", "TZ")
    return (python or sys.executable, versions, processor(), *(f"{name}={os.environ.get(name, '')}" for name in names))


def processor() -> str:
    """What the processor can do: kernels, and so the last digits, depend on it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return platform.machine() + " " + hashlib.sha256(line.encode()).hexdigest()[:16]
    return f"{platform.machine()} {platform.processor()}"


def folder() -> Path:
    return cache_folder() / "answers"


def place(key: dict) -> Path:
    return folder() / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:40]}.json"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True)


def kept(key: dict, read: Callable[[Any], Any]) -> Any | None:
    """read(payload) of the entry of ``key``; None where there is none that can be believed."""
    try:
        path = place(key)
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            return None
        entry = json.loads(path.read_bytes())
        if entry["key"] != json.loads(_text(key)) or entry["digest"] != _digest(entry["payload"]):
            return None
        return read(entry["payload"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def keep(key: dict, payload: Any) -> None:
    """Put ``payload`` where kept(key) finds it. A cache that cannot be written costs time and nothing else."""
    with contextlib.suppress(OSError, ValueError):
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        path = place(key)
        if path.is_symlink():
            path.unlink()
        entry = {"key": json.loads(_text(key)), "digest": _digest(payload), "payload": payload}
        write_atomic(path, (_text(entry) + "\n").encode())
        _forget_oldest()


def _digest(payload: Any) -> str:
    return hashlib.sha256(_text(payload).encode()).hexdigest()


def _forget_oldest() -> None:
    entries = list(folder().glob("*.json"))
    if len(entries) > MOST_ENTRIES:
        for path in sorted(entries, key=lambda path: path.lstat().st_mtime)[: MOST_ENTRIES // 2]:
            path.unlink(missing_ok=True)
