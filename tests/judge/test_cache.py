"""What is kept from run to run: found again for an unchanged tree, asked anew for anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compat import asking, cache, lock
from compat.asking import How, Question
from compat.combo import choose
from compat.target import resolve

from .repos import FACTS
from .trees import MODEL, make_tree

ROOT = Path(__file__).parents[2]
COMBOS = choose(["siglip2-smollm2", "dinov2-smollm2"])


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPAT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tree"
    (folder / "models").mkdir(parents=True)
    (folder / "models/model.py").write_text("x = 1\n")
    return folder


class CountedChild:
    """Starts at the first question, as a Child does."""

    started: list[str] = []

    def __init__(self, target, **options):
        self.target, self.starts, self.output, self.hello = target, 0, "", {}

    def close(self):
        pass


@pytest.fixture
def children(monkeypatch):
    """Locks are made by a child that notes its start; ``children.started`` has them."""

    def make(child, combo, scale="tiny"):
        if not child.starts:
            child.starts = 1
            CountedChild.started.append(child.target.label)
        head = {"schema": lock.SCHEMA, "combo": combo.name, "scale": scale, "target": child.target.label}
        return head | {"commit": None, "dirty": None, "environment": {}, "facts": dict(FACTS)}

    CountedChild.started = []
    monkeypatch.setattr(asking.process, "Child", CountedChild)
    monkeypatch.setattr(lock, "make", make)
    monkeypatch.setattr(asking, "places", lambda *_: 1)
    return CountedChild


def ask(folder: Path, combos=COMBOS) -> list[dict]:
    target = resolve(str(folder))
    return asking.answer([Question(target, combo) for combo in combos], How(quiet=True)).answers


def test_an_unchanged_tree_is_not_asked_again_and_one_child_answers_for_all_combos(tree, children):
    first = ask(tree)
    assert len(children.started) == 1 and [made["combo"] for made in first] == [combo.name for combo in COMBOS]
    assert ask(tree) == first and len(children.started) == 1


def test_the_log_kept_runs_waivers_and_what_tools_leave_behind_are_outside_the_key(tree, children):
    ask(tree)
    for name in ("MODIFICATIONS_LOG.md", "waivers.toml", ".compat/runs/x.json", ".git/x", "a/__pycache__/x.pyc",
                 ".pytest_cache/x", "env/pyvenv.cfg", "env/lib/x.py"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    ask(tree)
    assert len(children.started) == 1


@pytest.mark.parametrize("change", ["edit", "same size", "new", "gone", "renamed", "data", "ignored", "link"])
def test_any_file_a_model_could_read_counts_committed_or_not(tree, children, change):
    (tree / "scale.txt").write_text("3")
    ask(tree)
    model = tree / "models/model.py"
    if change in ("edit", "same size"):
        before = model.stat()
        model.write_text("x = 2\n" if change == "same size" else "x = 22\n")
        os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of a file proves nothing
    elif change == "gone":
        model.unlink()
    elif change == "renamed":
        model.rename(tree / "models/other.py")
    elif change == "data":
        (tree / "scale.txt").write_text("4")
    elif change == "ignored":
        (tree / ".gitignore").write_text("*.bin\n")
        ask(tree)
        children.started.clear()
        (tree / "table.bin").write_bytes(b"1")
        children.started.append("")
    elif change == "link":
        (tree / "models/linked.py").symlink_to("model.py")
    else:
        (tree / "models/new.py").write_text("")
    ask(tree)
    assert len(children.started) == 2


@pytest.mark.parametrize("what", ["harness", "packages", "processor", "interpreter", "timeout", "combo", "suites"])
def test_whatever_else_an_answer_depends_on_is_in_the_key(tree, monkeypatch, what):
    target, how, question = resolve(str(tree)), How(), None
    question = Question(target, COMBOS[0])
    before = asking._key(question, "hash", how)
    if what == "harness":
        monkeypatch.setattr(cache, "harness_hash", lambda: "another")
    elif what == "packages":
        (tree / "torch-99.dist-info").mkdir()
        monkeypatch.setattr(sys, "path", [*sys.path, str(tree)])
        cache.surroundings.cache_clear()
    elif what == "processor":
        monkeypatch.setattr(cache, "processor", lambda: "another")
        cache.surroundings.cache_clear()
    elif what == "interpreter":
        (tree / "python").symlink_to(sys.executable)
        how = How(python=str(tree / "python"))
    elif what == "timeout":
        how = How(timeout_s=7)
    elif what == "combo":
        question = Question(target, COMBOS[1])
    else:
        from compat.suites import catalogue

        question = Question(target, COMBOS[0], tuple(catalogue()[:2]))
    assert asking._key(question, "hash", how) != before
    cache.surroundings.cache_clear()


def test_the_judge_s_tables_are_part_of_its_code(monkeypatch, tmp_path):
    (tmp_path / "rules.toml").write_text("a = 1")
    monkeypatch.setattr(cache, "HERE", tmp_path)
    cache.harness_hash.cache_clear()
    before = cache.harness_hash()
    (tmp_path / "rules.toml").write_text("a = 2")
    cache.harness_hash.cache_clear()
    assert cache.harness_hash() != before
    cache.harness_hash.cache_clear()


def spoil(path: Path, how: str) -> None:
    entry = json.loads(path.read_bytes())
    if how == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "edited":
        entry["payload"]["facts"]["cost.parameters"] = 1
        path.write_text(json.dumps(entry))
    elif how == "another key":
        entry["key"]["tree"] = "0" * 64
        path.write_text(json.dumps(entry))
    elif how == "no lock":
        entry |= {"payload": {"facts": []}, "digest": cache._digest({"facts": []})}
        path.write_text(json.dumps(entry))
    elif how == "not an object":
        path.write_text("[1]")
    elif how == "deep":
        path.write_text("[" * 100_000)
    elif how == "link":
        path.rename(path.with_suffix(".moved"))
        path.symlink_to(path.with_suffix(".moved"))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)


SPOILT = ["torn", "empty", "edited", "another key", "no lock", "not an object", "deep", "link", "folder", "pipe"]


@pytest.mark.parametrize("how", SPOILT)
def test_an_entry_that_cannot_be_believed_is_asked_again(tree, children, how):
    [first] = ask(tree, combos=COMBOS[:1])
    [path] = cache.folder().glob("*.json")
    spoil(path, how)
    assert ask(tree, combos=COMBOS[:1]) == [first] and len(children.started) == 2


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(tree, children, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPAT_CACHE", str(tmp_path / "file"))
    assert ask(tree) == ask(tree) and len(children.started) == 2


def test_a_tree_that_changes_while_it_is_asked_is_not_kept(tree, children, monkeypatch):
    make = lock.make

    def edits(child, combo, scale="tiny"):
        (tree / "models/model.py").write_text("x = 3\n")
        return make(child, combo, scale)

    monkeypatch.setattr(lock, "make", edits)
    ask(tree)
    assert not list(cache.folder().glob("*.json"))


def test_an_answer_that_a_crash_has_part_in_is_not_kept(tree, children, monkeypatch):
    make = lock.make

    def crashes(child, combo, scale="tiny"):
        made = make(child, combo, scale)
        child.starts += 1
        return made

    monkeypatch.setattr(lock, "make", crashes)
    ask(tree, combos=COMBOS[:1])
    ask(tree, combos=COMBOS[:1])
    assert len(children.started) == 2


def test_the_oldest_entries_go_when_there_are_too_many(tree, monkeypatch):
    monkeypatch.setattr(cache, "MOST_ENTRIES", 6)
    for number in range(8):
        cache.keep({"number": number}, number)
        os.utime(cache.place({"number": number}), (number, number))
    assert cache.kept({"number": 7}, int) == 7 and cache.kept({"number": 0}, int) is None


def test_parts_are_of_like_cost_and_keep_a_target_s_questions_together(tree):
    there = resolve(str(tree / "models"))
    suites = (object(),)
    head = [Question(resolve(str(tree)), combo, kind) for kind in ((), suites) for combo in COMBOS]
    questions = dict(enumerate([*head, *(Question(there, combo) for combo in COMBOS)]))
    parts = asking.shared_out(questions, 2)
    assert sorted(n for part in parts for n in part) == list(questions)
    assert all({4, 5} & set(part) == set() or part for part in parts) and len(parts) == 2
    assert set(parts[1]) >= {4, 5}, "both locks of the base come from one child"
    assert asking.shared_out(questions, 1) == [list(questions)]


@pytest.mark.slow
def test_a_gate_of_a_real_tree_asks_once_and_answers_within_a_second_afterwards(tmp_path, monkeypatch):
    """Child starts are counted, and the command is timed from outside, interpreter start included.

    Seconds of the processor, which it has to itself on a quiet machine: a busy one would time its neighbours.
    """
    import resource

    from .repos import commit, git, repository

    repo = repository(make_tree(tmp_path, "main"))
    commit(repo, "one")
    git(repo, "checkout", "-q", "-b", "work")
    environment = os.environ | {"COMPAT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def gate() -> tuple[dict, float, int]:
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "compat", "gate", "--no-log", "--json", "-"]
        done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=300)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
        return json.loads(done.stdout), spent, done.returncode

    cold, _, code = gate()
    assert cold["started"] <= 2, "head and base are one tree: it is asked once, in a lock and the checks at most"
    assert not cold["new"] and code == 0, cold["new"]
    warm = [gate() for _ in range(3)]
    assert {told["started"] for told, _, _ in warm} == {0}
    assert [told["new"] for told, _, _ in warm] == [cold["new"]] * 3
    assert min(spent for _, spent, _ in warm) <= 1.0
    model = repo / MODEL
    model.write_text(model.read_text().replace("targets", "labels"))
    changed, _, code = gate()
    assert changed["started"] >= 1 and code == 1 and "API" in {item["rule"][:3] for item in changed["new"]}
