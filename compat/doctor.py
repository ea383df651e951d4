"""What the judge needs of this machine, what it makes use of, and how to get what is missing.

Unusual: nothing heavy is imported. Versions come from the metadata of installed packages, so the answer is there at
once, even where importing torch is what fails. Standard library only.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from compat import process
from compat.checkout import cache_folder
from compat.parallel import available_bytes

PYTHON = (3, 11)
OLDEST_CHILD = (3, 9)  # the worker's syntax; a fork may have such an interpreter
GB = 10**9
DISK_BYTES, MEMORY_BYTES = 2 * GB, 3 * GB  # locks, kept trees and answers; one child with torch, and the judge
# What asks the target (in its interpreter), and what judges (in ours): the lowest versions of pyproject.toml.
TARGET_NEEDS = {"torch": "2.9.0", "numpy": "1.26.0"}
TARGET_USES = {"transformers": "4.57.0", "tokenizers": "0.22.0", "safetensors": "0.4.3", "pillow": "10.3.0"}
JUDGE_NEEDS = {"pytest": "8.3.0", "rich": "13.7.0", "jinja2": "3.1.2", "numpy": "1.26.0"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COMPILERS = ("c++", "g++", "clang++")
ASK = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps([list(sys.version_info[:3]), found]))
"""


@dataclass(frozen=True)
class Answer:
    """name: of a thing. found: what is there, in words. ok: it will do. needed: without it nothing can be judged.

    get: how to get it, or what it is for; "" where all is well.
    """

    name: str
    ok: bool
    needed: bool
    found: str
    get: str = ""

    @property
    def word(self) -> str:
        return "ok" if self.ok else "MISSING" if self.needed else "absent"


def examine(python: str | None = None, here: Path | None = None) -> list[Answer]:
    """Everything in the order it is shown. python: the interpreter that targets run in, ours if None."""
    here = here or Path.cwd()
    answers = [*_python(python), *_packages(python), _git(), _sandbox(), _gpu(python), _compiler(), _browser()]
    return [*answers, _memory(), *_folders(here)]


def exit_code(answers: list[Answer]) -> int:
    return int(any(answer.needed and not answer.ok for answer in answers))


def as_json(answers: list[Answer]) -> dict:
    return {"schema": 1, "exit_code": exit_code(answers), "answers": [asdict(answer) for answer in answers]}


# -- interpreters and packages ----------------------------------------------------------------------------------


def _python(python: str | None) -> list[Answer]:
    there = f"{platform.python_version()} ({sys.executable})"
    wanted = ".".join(map(str, PYTHON))
    found = [Answer("python", sys.version_info >= PYTHON, True, there, f"the judge needs Python {wanted} or newer")]
    if python:
        version, _ = _asked(python)
        oldest = ".".join(map(str, OLDEST_CHILD))
        told = f"{'.'.join(map(str, version))} ({python})" if version else f"{python} does not run"
        get = f"name an interpreter of Python {oldest} or newer with --python"
        found.append(Answer("target's python", tuple(version or ()) >= OLDEST_CHILD, True, told, get))
    return found


def _packages(python: str | None) -> list[Answer]:
    own = {name: _version(name) for name in JUDGE_NEEDS}
    found = [_package(name, own[name], least, True, sys.executable) for name, least in JUDGE_NEEDS.items()]
    names = [*TARGET_NEEDS, *TARGET_USES]
    theirs = _asked(python)[1] if python else {name: _version(name) for name in names}
    label = "target's " if python else ""
    for group, needed in ((TARGET_NEEDS, True), (TARGET_USES, False)):
        for name, least in group.items():
            if python or name not in JUDGE_NEEDS:
                found.append(_package(name, theirs.get(name), least, needed, python or sys.executable, label))
    return found


def _package(name: str, version: str | None, least: str, needed: bool, python: str, label: str = "") -> Answer:
    ok = version is not None and numbers(version) >= numbers(least)
    told = version or "not installed"
    if version and not ok:
        told += f", older than {least}"
    return Answer(f"{label}{name}", ok, needed, told, f"{python} -m pip install '{name}>={least}'")


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _asked(python: str) -> tuple[list[int], dict[str, str | None]]:
    """(version, {package: version}) of another interpreter; ([], {}) when it does not run."""
    out = _said([python, "-I", "-c", ASK, *TARGET_NEEDS, *TARGET_USES])
    try:
        version, found = json.loads(out or "")
    except ValueError:
        return [], {}
    return version, found


def _said(command: list[str]) -> str | None:
    """What a program printed, None when it is not there, fails, or takes more than 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# -- programs ------------------------------------------------------------------------------------------------------


def _install(debian: str, mac: str = "") -> str:
    if sys.platform == "darwin" and mac:
        return f"brew install {mac}"
    if shutil.which("apt-get"):
        return f"sudo apt-get install {debian}"
    return f"install {debian} with your package manager"


def _git() -> Answer:
    told = _said(["git", "--version"])
    get = f"for FOLDER@REF, the gate and bisection: {_install('git', 'git')}"
    return Answer("git", told is not None, False, told or "not found", get)


def _sandbox() -> Answer:
    prefix = process.sandbox()
    get = "to cut a fork's network and end what it starts: " + _install("bubblewrap")
    if os.environ.get("COMPAT_SANDBOX") == "none":
        return Answer("bubblewrap", False, False, "switched off by COMPAT_SANDBOX=none", "unset COMPAT_SANDBOX")
    if not prefix and shutil.which("bwrap"):
        return Answer("bubblewrap", False, False, "installed, and does not run: user namespaces are off", get)
    return Answer("bubblewrap", bool(prefix), False, f"{prefix[0]} runs" if prefix else "not found", get)


def _gpu(python: str | None) -> Answer:
    told = _said(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    if not told:
        get = "for --device cuda; everything else runs without"
        return Answer("gpu", False, False, "none that nvidia-smi knows", get)
    torch = (_asked(python)[1].get("torch") if python else _version("torch")) or ""
    if torch.endswith("+cpu"):
        get = "install a torch that is built for CUDA to use --device cuda"
        return Answer("gpu", False, False, f"{told.splitlines()[0]}, but torch {torch} cannot use it", get)
    return Answer("gpu", True, False, "; ".join(told.splitlines()))


def _compiler() -> Answer:
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    get = "for torch.compile: " + ("xcode-select --install" if sys.platform == "darwin" else _install("g++"))
    return Answer("c++ compiler", found is not None, False, found or "not found", get)


def _browser() -> Answer:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    get = f"for the tests of the report's page: {_install('chromium', '--cask chromium')}"
    return Answer("chromium", found is not None, False, found or "not found", get)


# -- room ------------------------------------------------------------------------------------------------------------


def _memory() -> Answer:
    free = available_bytes()
    get = "a tiny model's process takes up to 2 GB; end other programs"
    return Answer("memory", free >= MEMORY_BYTES, True, f"{free / GB:.1f} GB available", get)


def _folders(here: Path) -> list[Answer]:
    cache, runs, temporary = cache_folder(), here / ".compat", Path(tempfile.gettempdir())
    found = [
        _folder("cache folder", cache, "set COMPAT_CACHE to a folder you may write to"),
        _folder("run folder", runs, "start compat in a folder you may write to, or pass --json FILE"),
        _folder("temporary folder", temporary, "set TMPDIR to a folder you may write to"),
    ]
    free = shutil.disk_usage(_standing(cache)).free
    get = f"free some room, or set COMPAT_CACHE to another disk; {DISK_BYTES / GB:.0f} GB will do"
    return [*found, Answer("disk", free >= DISK_BYTES, True, f"{free / GB:.1f} GB free at {_standing(cache)}", get)]


def _standing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _folder(name: str, path: Path, get: str) -> Answer:
    """Tried for real where it stands: permission bits do not tell of a read-only disk. Nothing is left behind."""
    standing = _standing(path)
    try:
        with tempfile.NamedTemporaryFile(dir=standing, prefix=".compat-doctor-"):
            pass
    except OSError as error:
        return Answer(name, False, True, f"{standing}: {error.strerror or error}", get)
    told = f"{path} can be written to" if standing == path else f"{path} can be made"
    return Answer(name, True, True, told)
