"""The Makefile, run in a copy with a stand-in interpreter: set-up happens once, and never by halves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.tree import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Answers the version question as Python X would, makes a .venv whose python notes what it is asked to do.
STAND_IN = """#!{python}
import os, sys
if sys.argv[1] == "-c":
    sys.version_info = ({version}, 0, "final", 0)
    exec(sys.argv[2])
elif sys.argv[1:3] == ["-m", "venv"]:
    os.makedirs(".venv/bin", exist_ok=True)
    with open(".venv/bin/python", "w") as file:
        file.write('#!/bin/sh\\necho "$@" >> calls; [ "$2" != pip ] || [ ! -e broken ]\\n')
    os.chmod(".venv/bin/python", 0o755)
"""


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    write_interpreter(tmp_path, "3, 11")
    return tmp_path


def write_interpreter(clone: Path, version: str) -> None:
    path = clone / "fake-python"
    path.write_text(STAND_IN.format(python=sys.executable, version=version))
    path.chmod(0o755)


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    # an outer make must not hand its own flags down
    environment = {name: os.environ[name] for name in os.environ if name not in ("MAKEFLAGS", "MFLAGS")}
    command = ["make", "PYTHON=./fake-python", *arguments]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=60)


def calls(clone: Path) -> list[str]:
    """What .venv's python was asked since the last look."""
    noted = clone / "calls"
    lines = noted.read_text().splitlines() if noted.exists() else []
    noted.unlink(missing_ok=True)
    return lines


def test_the_first_call_installs_the_pinned_versions_and_the_second_only_runs(clone):
    assert make(clone, "test").returncode == 0
    installed, ran = calls(clone)
    assert "pip" in installed and "-c constraints.txt" in installed
    assert ran.startswith("-m pytest")
    assert make(clone, "test", "ARGS=-k padding").returncode == 0
    assert calls(clone) == ["-m pytest -n auto --dist loadfile -k padding"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_dependency_installs_again(clone, name):
    make(clone, "setup")
    calls(clone)
    later = (clone / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(clone / name, (later, later))
    make(clone, "compat")
    installed, ran = calls(clone)
    assert "pip" in installed and ran.startswith("-m compat run")


def test_a_set_up_that_failed_half_way_is_done_again(clone):
    (clone / "broken").touch()
    assert make(clone, "test").returncode != 0
    assert [line.split()[1] for line in calls(clone)] == ["pip"], "pytest must not run on half an environment"
    (clone / "broken").unlink()
    assert make(clone, "test").returncode == 0
    assert [line.split()[1] for line in calls(clone)] == ["pip", "pytest"]


def test_an_interpreter_that_is_too_old_is_named_with_the_way_out(clone):
    write_interpreter(clone, "3, 10")
    done = make(clone, "test")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer; ./fake-python is 3.10" in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_fork_and_options_reach_compat(clone):
    make(clone, "setup")
    calls(clone)
    make(clone, "compat", "TARGET=../a fork", "ARGS=--no-log")
    assert calls(clone) == ["-m compat run ../a fork --no-log"]


def test_slow_asks_for_the_slow_tests(clone):
    make(clone, "slow")
    assert calls(clone)[-1].startswith("-m pytest -n auto --dist loadfile -m slow")


def test_commands_that_compat_lacks_fail_and_those_it_has_are_wired(clone):
    ask = [sys.executable, "-m", "compat", "--help"]
    listing = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    for command in ("gate", "report"):
        done = make(clone, command)
        if re.search(rf"^\s+{command}\b", listing.stdout, re.MULTILINE):
            asked = [line for line in calls(clone) if line.startswith(f"-m compat {command}")]
            assert asked, f"compat has {command} now: wire it in the Makefile"
        else:
            assert done.returncode != 0 and f'no command "{command}"' in done.stderr


def test_every_target_has_its_line_in_help_or_a_reason_to_hide(clone):
    source = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.+)$", source, re.MULTILINE)[1].split())
    shown = set(re.findall(r"^make (\w+)", make(clone, "help").stdout, re.MULTILINE))
    assert phony - shown == {"help", "setup"}
    assert make(clone).stdout == make(clone, "help").stdout, "plain make explains"


def test_clean_removes_what_can_be_made_again_and_keeps_runs(clone):
    make(clone, "setup")
    (clone / "pkg" / "__pycache__").mkdir(parents=True)
    (clone / ".compat").mkdir()
    (clone / ".benchmarks").mkdir()
    assert make(clone, "clean").returncode == 0
    assert not (clone / ".venv").exists() and not (clone / "pkg" / "__pycache__").exists()
    assert (clone / ".compat").is_dir() and (clone / ".benchmarks").is_dir()
