"""What belongs to the project: the files git knows or would take."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = {".git", ".venv", ".nox", ".compat", ".benchmarks", "__pycache__", "build", "dist", ".hypothesis"}
BUILT |= {".pytest_cache", ".mypy_cache", ".ruff_cache"}


@functools.cache
def files() -> list[Path]:
    """Relative paths, sorted; outside git (an unpacked archive), everything that is not built."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found = [Path(name) for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = []
        for folder, below, names in os.walk(ROOT):
            below[:] = [name for name in below if name not in BUILT]
            found += [Path(folder, name).relative_to(ROOT) for name in names]
    return sorted(path for path in found if (ROOT / path).is_file())


def copy_to(folder: Path) -> None:
    """A clone's worth of files, without git."""
    for path in files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
