"""Sessions over one environment per dependency set.

Unusual: sessions install nothing of their own. `tested` is the .venv that make builds; the others live in
.nox/envs under a hash of what they hold, so torch is installed once a set and a changed set is a new folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests", "parity", "compat", "gpu"]

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = (ROOT / "constraints.txt").read_text().splitlines()
COMBOS = tomllib.loads((ROOT / "compat" / "combos.toml").read_text())


def tested(session: nox.Session) -> str:
    """The interpreter with the versions of constraints.txt."""
    session.run("make", "setup", f"PYTHON={sys.executable}", external=True, silent=True)
    return str(ROOT / ".venv" / "bin" / "python")


def environment(session: nox.Session, name: str, requirements: list[str]) -> str:
    """The interpreter of an environment that holds this project and ``requirements``."""
    holds = json.dumps([sys.version, PROJECT["project"], requirements])
    digest = hashlib.sha256(holds.encode()).hexdigest()[:12]
    folder = ROOT / ".nox" / "envs" / f"{name}-{digest}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        session.run(sys.executable, "-m", "venv", str(folder), external=True)
        session.run(str(python), "-m", "pip", "install", "-e", f"{ROOT}[dev]", *requirements, external=True)
        ready.touch()
    return str(python)


def run(session: nox.Session, python: str, module: str, *arguments: str) -> None:
    """python -m module with the arguments, then those that follow `--` on nox's command line."""
    session.run(python, "-m", module, *arguments, *session.posargs, external=True)


@nox.session
@nox.parametrize(
    "combo",
    [nox.param(name, id=name, tags=[row["vision"], row["language"]]) for name, row in COMBOS.items()],
)
def compat(session: nox.Session, combo: str) -> None:
    """Judge this model in one combo; a target or options may follow `--`."""
    run(session, tested(session), "compat", "run", "--combo", combo)


@nox.session
def gate(session: nox.Session) -> None:
    """What changed since the merge-base, and whether it may be merged; options may follow `--`."""
    run(session, tested(session), "compat", "gate")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything not marked slow."""
    run(session, tested(session), "pytest")


@nox.session
def parity(session: nox.Session) -> None:
    """Our numbers against those of transformers, the slow ones too."""
    run(session, tested(session), "pytest", "-k", "parity", "-m", "slow or not slow")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff."""
    run(session, tested(session), "ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy over both packages."""
    run(session, tested(session), "mypy")


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests marked gpu, on CUDA."""
    python = tested(session)
    sees = "import torch; print(torch.cuda.is_available())"
    if session.run(python, "-c", sees, external=True, silent=True).strip() != "True":
        session.skip("torch sees no CUDA device here")
    run(session, python, "pytest", "-m", "gpu", "--device", "cuda")


@nox.session
def minimums(session: nox.Session) -> None:
    """The tests with the lowest versions that pyproject.toml allows. Needs Python 3.11."""
    if sys.version_info[:2] != (3, 11):
        session.skip("the lowest versions have wheels for Python 3.11 only")
    lowest = [line.replace(">=", "==") for line in PROJECT["project"]["dependencies"]]
    run(session, environment(session, "minimums", lowest), "pytest")


@nox.session(name="transformers-4")
def transformers_4(session: nox.Session) -> None:
    """The tests with the last transformers before 5, and the tested torch."""
    torch = next(pin for pin in PINS if pin.startswith("torch=="))
    run(session, environment(session, "transformers-4", ["transformers>=4.57,<5", torch]), "pytest")
