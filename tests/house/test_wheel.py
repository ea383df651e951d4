"""The wheel holds every file of both packages, and works where nothing else of the project is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.house.tree import ROOT, copy_to, files

pytest.importorskip("hatchling", reason="the build backend comes with the dev extra")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build must not see, or leave, anything in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_to(source)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=60)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel):
    held = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    info = {path for path in held if path.parts[0].endswith(".dist-info")}
    wanted = {path for path in files() if path.parts[0] in ("nanovlm", "compat")}
    assert {path.suffix for path in wanted} >= {".py", ".toml", ".j2"}
    assert held - info == wanted
    assert {path.name for path in info} >= {"METADATA", "entry_points.txt", "LICENSE"}


@pytest.mark.slow
def test_the_wheel_alone_judges_a_fork_from_an_empty_folder(wheel, tmp_path):
    """A fresh environment with this one's dependencies, the wheel, and no trace of the source tree."""
    fresh, fork, empty = tmp_path / "env", tmp_path / "fork", tmp_path / "empty"
    venv.create(fresh, with_pip=False, symlinks=True)
    (packages,) = fresh.glob("lib/python*/site-packages")
    dependencies = [entry for entry in sys.path if entry.endswith("-packages")]
    # a line in a .pth file adds a folder but reads no .pth in it: an editable install does not come along
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(packages), str(wheel)], check=True, timeout=120)
    shutil.copytree(ROOT / "nanovlm", fork / "nanovlm", ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.stat().st_mtime_ns for path in fork.rglob("*")}
    empty.mkdir()

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CI")}
    python = str(fresh / "bin" / "python")
    where = [python, "-c", "import compat; print(compat.__file__)"]
    told = subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True, check=True)
    assert Path(told.stdout.strip()).is_relative_to(fresh)

    command = [python, "-m", "compat", "run", str(fork)]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Forward Signature" in done.stdout
    assert (empty / "MODIFICATIONS_LOG.md").is_file() and list(empty.glob(".compat/runs/*.json"))
    after = {path: path.stat().st_mtime_ns for path in fork.rglob("*")}
    assert after == before, "a fork is never written to"
