"""A whole `compat run`, and where its time goes: import, child start, suites.

Unusual: every round is a cold process, as a person has it; nothing is warmed up or shared between rounds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from compat.combo import choose
from compat.process import Child
from compat.target import resolve

ROOT = Path(__file__).parents[1]
COMBO = choose(None)[0]
ROUNDS = 3


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_import(benchmark):
    """What every command costs before it does anything: the interpreter and the command line."""
    benchmark.pedantic(python, args=("-m", "compat", "--help"), rounds=ROUNDS)


def test_child_start(benchmark):
    """A process for the target: torch and the model's code imported, the model built, one answer."""

    def start() -> dict:
        with Child(resolve(str(ROOT))) as child:
            return child.ask("describe", combo=COMBO.as_dict("tiny"))

    facts = benchmark.pedantic(start, rounds=ROUNDS)
    assert facts["vocab_size"] > 0


def test_whole_run(benchmark, tmp_path, monkeypatch):
    """`compat run` of the default combo: both of the above, every suite, the log entry and the table."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # started in an empty folder: what a run leaves stays there
    command = ("-m", "compat", "run", str(ROOT), "--combo", COMBO.name, "--log", "log.md")
    done = benchmark.pedantic(python, args=command, kwargs={"cwd": tmp_path}, rounds=ROUNDS)
    assert "PASSED" in done.stdout and (tmp_path / "log.md").is_file()
