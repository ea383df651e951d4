"""Small git repositories whose "model" is facts.json and failures.json, and an asker that reads those.

Unusual: git, the policy files and the verdict are real; only the child is not: what a tree would answer stands in
it. So a history of twenty commits is judged in a second.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from compat.asking import Answers, Unanswered, described
from compat.result import FAILED, PASSED, Result, Run

FACTS = {"state.head.weight": {"shape": [8, 4], "dtype": "float32", "persistent": True, "trainable": True,
                               "tied_to": None}, "cost.parameters": 32}  # fmt: skip
GIT = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]


def git(folder: Path, *words: str) -> str:
    apart = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run([*GIT, "-C", str(folder), *words], env=os.environ | apart, capture_output=True, text=True)
    assert done.returncode == 0, f"git {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def repository(folder: Path, branch: str = "main") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q", "-b", branch)
    return folder


def write(folder: Path, facts: dict | None = None, failures: list[str] | str = (), **files: str) -> None:
    """failures: tests of the forward check that fail; a text instead: why nothing can be asked."""
    (folder / "facts.json").write_text(json.dumps(FACTS if facts is None else facts))
    (folder / "failures.json").write_text(json.dumps(failures))
    for name, text in files.items():
        (folder / name.replace("__", "/")).parent.mkdir(parents=True, exist_ok=True)
        (folder / name.replace("__", "/")).write_text(text)


def commit(folder: Path, message: str, *options: str) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", message, *options)
    return git(folder, "rev-parse", "HEAD")


def grow(folder: Path, trees: list[tuple[dict, list[str] | str]]) -> list[str]:
    """A commit of the branch that is checked out for each (facts, failures), by one process of git's; the hashes."""
    branch = git(folder, "symbolic-ref", "HEAD")
    ask = [*GIT, "-C", str(folder), "rev-parse", "-q", "--verify", "HEAD"]
    tip = subprocess.run(ask, capture_output=True, text=True)
    stream = []
    for number, (facts, failures) in enumerate(trees):
        stream += [f"commit {branch}", f"mark :{number + 1}", "committer A <a@example.org> 1700000000 +0000"]
        stream += [_data(f"commit {number}"), *([f"from {tip.stdout.strip()}"] if not number and tip.stdout else [])]
        files = {"facts.json": json.dumps(facts), "failures.json": json.dumps(failures), "note": str(number)}
        stream += [line for name, text in files.items() for line in (f"M 100644 inline {name}", _data(text))]
    marks = folder / ".git" / "marks"
    command = [*GIT, "-C", str(folder), "fast-import", "--quiet", f"--export-marks={marks}"]
    subprocess.run(command, input="\n".join([*stream, ""]), text=True, check=True)
    git(folder, "reset", "-q", "--hard")
    found = dict(line.split() for line in marks.read_text().splitlines())
    return [found[f":{number + 1}"] for number in range(len(trees))]


def _data(text: str) -> str:
    return f"data {len(text.encode())}\n{text}"


def lock_of(folder: Path, combo: str = "siglip2-smollm2", label: str = ".") -> dict:
    head = {"schema": 1, "combo": combo, "scale": "tiny", "target": label, "commit": None, "dirty": None}
    return head | {"environment": {}, "facts": json.loads((folder / "facts.json").read_text())}


class Asker:
    """Stands in for compat.asking.answer; ``asked`` has the label and kind of every question."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []

    def __call__(self, questions, how, watcher=None) -> Answers:
        answers = []
        for question in questions:
            folder = question.target.folder
            self.asked.append((question.target.label, question.kind))
            failures = json.loads((folder / "failures.json").read_text())
            if isinstance(failures, str):
                answers.append(Unanswered(failures))
            elif question.suites:
                run = Run.begin(described(question.target), how.scale, [question.combo.name])
                run.results = [
                    Result(suite.title, test, FAILED if test in failures else PASSED, "it does" * (test in failures),
                           combo=question.combo.name)
                    for suite in question.suites
                    for test in ("logits are finite", *failures)
                    if suite.name == "forward" or test not in failures
                ]  # fmt: skip
                answers.append(run)
            else:
                answers.append(lock_of(folder, question.combo.name, question.target.label))
        return Answers(answers, len(answers))
