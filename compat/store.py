"""Where runs are kept: one JSON file a run, under .compat/runs of the current directory.

A file is there whole or not at all (written beside its place, then moved there), and the folder hides
itself from git, so that judging a working tree does not make it dirty.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from compat.result import NotARun, Run

RUNS = Path(".compat", "runs")


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: whoever looks, at any instant, sees the old file or the new one."""
    path = Path(os.path.realpath(path))  # a link stays a link: its file is replaced
    mode = path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:  # a full disk or Ctrl-C: leave nothing behind, hide nothing
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def dumps(run: Run) -> bytes:
    return (json.dumps(run.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def path_of(run: Run, folder: Path = RUNS) -> Path:
    return Path(folder) / f"{run.id}.json"


def save(run: Run, folder: Path = RUNS) -> Path:
    """Write the run, over what was there of it, and return its path. Raises OSError."""
    path = path_of(run, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.parent.name == ".compat":
        hide(path.parent.parent)
    write_atomic(path, dumps(run))
    return path


def hide(folder: Path) -> None:
    """Make ``folder``, if need be, and keep git from seeing what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".gitignore").exists():
        write_atomic(folder / ".gitignore", b"*\n")


def load(path: Path) -> Run:
    """Raises OSError when there is no such file, NotARun when it holds something else."""
    try:
        return Run.from_json(json.loads(Path(path).read_bytes()))
    except (json.JSONDecodeError, UnicodeDecodeError, NotARun) as error:
        raise NotARun(f"{path}: {error}") from None


def all_runs(folder: Path = RUNS) -> list[Path]:
    """Saved runs, oldest first: the name begins with the time."""
    return sorted(Path(folder).glob("*.json"))
