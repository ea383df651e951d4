"""Every command in the documentation works as printed.

Unusual: the lines are run by bash, verbatim, in a copy of the tree with a fork beside it and a .venv whose
programs are this interpreter. Quick ones run here; whole runs of the judge are marked slow; of `make` it is
checked what it would run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compat import store
from compat.cli import parser
from conftest import draw
from nanovlm.cli import parser as nanovlm_parser
from tests.house.tree import ROOT, copy_to, files
from tests.report.made import made

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = {"python": "", "compat": "-m compat", "nanovlm": "-m nanovlm", "nox": "-m nox"}


def documented() -> list[tuple[str, str]]:
    """(page, command), comments cut, each command once."""
    pages = [path for path in files() if path.suffix == ".md" and path.name != "MODIFICATIONS_LOG.md"]
    found = {}
    for page in pages:
        for block in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
            for line in block.splitlines():
                command = line.partition("  #")[0].strip()
                if command and not command.startswith("#"):
                    found.setdefault(command, str(page))
    return [(page, command) for command, page in found.items()]


def kind(command: str) -> str:
    """make, run (the judge asks everything), lock (nearly as much), gate (both), train, quick, or unknown."""
    program, *arguments = shlex.split(command)
    if program == "make":
        return "make"
    if program == ".venv/bin/compat" and arguments[0] == "run" and "--help" not in arguments:
        return "run"
    if program == ".venv/bin/compat" and arguments[0] in ("lock", "compare", "mutate") and "--help" not in arguments:
        return "lock"
    if program == ".venv/bin/compat" and arguments[0] in ("gate", "bisect") and "--help" not in arguments:
        return "gate"
    if program == ".venv/bin/python" and arguments[:3] == ["-m", "nanovlm", "train"] and "--help" not in arguments:
        return "train"  # tests/train/test_learning.py says how it ends
    if program == ".venv/bin/python" and arguments[:2] == ["-m", "pytest"]:
        return "run"
    if program == ".venv/bin/nox":
        return "quick" if "-l" in arguments else "run"
    if program in (".venv/bin/compat", ".venv/bin/nanovlm", ".venv/bin/python"):
        return "quick"
    return "unknown"


def commands(*kinds: str):
    return pytest.mark.parametrize("command", [line for _, line in documented() if kind(line) in kinds])


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tree, set up; beside it my-fork, a git repository with a model; in it a photo and a run that was kept."""
    home = tmp_path_factory.mktemp("home")
    clone, fork = home / "clone", home / "my-fork"
    clone.mkdir()
    copy_to(clone)
    programs = clone / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        (programs / name).chmod(0o755)
    (clone / ".venv" / ".ready").touch()
    draw(320, 240).save(clone / "photo.png")
    store.save(made(0), clone / ".compat" / "runs")
    shutil.copytree(ROOT / "nanovlm", fork / "nanovlm", ignore=shutil.ignore_patterns("__pycache__"))
    if shutil.which("git"):
        nobody = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # no signing, no templates
        git = ["git", "-C", str(fork), "-c", "user.name=A", "-c", "user.email=a@example.org"]
        for step in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "a fork"]):
            subprocess.run([*git, *step], env=os.environ | nobody, check=True, capture_output=True)
    return clone


def bash(clone: Path, command: str, timeout: float = 300) -> subprocess.CompletedProcess:
    passed_on = {name: os.environ[name] for name in os.environ if name not in ("MAKEFLAGS", "MFLAGS", "CI")}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=clone, env=passed_on, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_no_documented_command_goes_unchecked():
    assert len(documented()) > 8
    assert not [f"{page}: {command}" for page, command in documented() if kind(command) == "unknown"]


@commands("quick")
def test_a_quick_command_runs(clone, command):
    assert bash(clone, command, timeout=60).stdout.strip()


@commands("make")
def test_a_make_command_would_run_something_and_set_up_nothing(clone, command):
    program, *arguments = shlex.split(command)
    shown = bash(clone, shlex.join([program, "-n", *arguments])).stdout
    assert ".venv/bin/python -m " in shown and "venv .venv" not in shown


@pytest.mark.parametrize(
    "arguments",
    [shlex.split(line)[1:] for _, line in documented() if line.startswith(".venv/bin/compat ")],
    ids=" ".join,
)
def test_compat_understands_the_documented_arguments(arguments):
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            parser().parse_args(arguments)
    else:
        assert parser().parse_args(arguments).command == arguments[0]


@commands("train")
def test_training_understands_the_documented_arguments(command):
    assert nanovlm_parser().parse_args(shlex.split(command)[3:]).use_preset


@pytest.mark.slow
@commands("run")
def test_a_whole_run_ends_well(clone, command):
    assert "passed" in bash(clone, command).stdout.lower()


@pytest.mark.slow
@commands("lock")
def test_locks_are_made_and_compared(clone, command):
    expected = {"lock": "facts of", "compare": "IDENTICAL", "mutate": "mutants noticed"}
    assert expected[shlex.split(command)[1]] in bash(clone, command).stdout


@pytest.mark.slow
@commands("gate")
def test_a_gate_lets_the_tree_as_it_is_pass(clone, command):
    assert bash(clone, command).stdout.startswith("PASSED: nothing new")


@pytest.mark.parametrize("module", ["compat", "nanovlm"])
def test_help_shows_commands_and_asks_for_nothing(module):
    ask = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, timeout=60, input="")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"usage: {module}")
