"""`compat gate`: which base, what counts as new, who may change the rules, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from compat import base as bases
from compat import cli, lock, store
from compat import gate as gates
from compat.rules import TABLE

from .repos import FACTS, GIT, Asker, commit, git, lock_of, repository, write
from .trees import MODEL, make_tree

ROOT = Path(__file__).parents[2]
REMOVED = {path: value for path, value in FACTS.items() if not path.startswith("state.")}
CHEAPER = FACTS | {"cost.parameters": 31}
TEST = "logits are right"


@pytest.fixture
def asker(monkeypatch):
    monkeypatch.setattr(gates, "answer", made := Asker())
    monkeypatch.setattr(gates, "cross", lambda pairs, how: ([None] * len(pairs), 0))
    return made


@pytest.fixture
def repo(tmp_path, monkeypatch, asker):
    """A repository with one commit on main, a branch `work` checked out; we stand in it."""
    folder = repository(tmp_path / "repo")
    write(folder)
    commit(folder, "one")
    git(folder, "checkout", "-q", "-b", "work")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("COMPAT_POLICY_APPROVED", raising=False)
    monkeypatch.setenv("COMPAT_CACHE", str(tmp_path / "cache"))
    return folder


def gate(*arguments: str) -> int:
    return cli.main(["gate", "--no-log", *arguments])


def asked(capsys, *arguments: str) -> dict:
    """The answer as JSON, which must agree with the exit code."""
    capsys.readouterr()
    code = gate("--json", "-", *arguments)
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == code
    return told


def rules(items: list[dict]) -> list[str]:
    return [item["rule"] for item in items]


def waiver(item: dict, **changes) -> str:
    held = {name: json.dumps(item[name]) for name in ("fingerprint", "rule", "path")}
    held |= {"reason": '"head is split"', "owner": '"ana"', "expires": str(date.today() + timedelta(days=30))} | changes
    return "[[waiver]]\n" + "".join(f"{name} = {value}\n" for name, value in held.items())


# -- what is new ----------------------------------------------------------------------------------------------------


def test_an_unchanged_branch_passes_and_a_breaking_change_fails(repo, capsys):
    assert gate() == 0
    assert capsys.readouterr().out.startswith("PASSED: nothing new | . against the last commit, which main has too, ")
    write(repo, REMOVED)
    told = asked(capsys)
    assert told["exit_code"] == 1 and rules(told["new"]) == ["LOAD.key_removed"]
    assert told["verdicts"]["checkpoint"] == "breaking"


def test_what_is_only_added_passes_and_is_told(repo, capsys):
    write(repo, CHEAPER)
    told = asked(capsys)
    assert told["exit_code"] == 0 and not told["new"] and rules(told["additions"])


def test_a_check_that_fails_on_head_alone_is_new_and_one_that_fails_on_base_too_is_not(repo, capsys, asker):
    write(repo, failures=[TEST])
    told = asked(capsys)
    assert told["exit_code"] == 1 and rules(told["new"]) == ["SUITE.forward"] and told["new"][0]["path"] == TEST
    commit(repo, "a failure")
    git(repo, "branch", "-f", "main")
    (repo / "note").write_text("more")
    assert gate() == 0
    said = capsys.readouterr().out
    assert "Fails on base too, so no news" in said and f"SUITE.forward {TEST}" in said


def test_base_is_asked_for_its_checks_only_where_head_fails(repo, capsys, asker):
    gate()
    assert [kind for label, kind in asker.asked if label != "."] == ["lock"]
    write(repo, failures=[TEST])
    gate()
    assert [kind for label, kind in asker.asked if label != "."] == ["lock", "lock", "suites"]


def test_what_cannot_be_asked_is_no_verdict_on_either_side(repo, capsys):
    write(repo, failures="the target cannot be imported: ImportError")
    told = asked(capsys)
    assert told["exit_code"] == 3 and "head could not be asked: the target cannot be imported" in told["incomplete"][0]
    commit(repo, "broken")
    git(repo, "branch", "-f", "main")
    write(repo)
    told = asked(capsys)
    assert told["exit_code"] == 3 and "base (the last commit" in told["incomplete"][0]


def test_what_is_found_stands_though_something_could_not_be_asked(repo, capsys, asker, monkeypatch):
    write(repo, REMOVED)

    def one_refuses(questions, how, watcher=None):
        told = asker(questions, how)
        last = max(n for n, q in enumerate(questions) if q.suites)
        told.answers[last] = gates.Unanswered("out of time")
        return told

    monkeypatch.setattr(gates, "answer", one_refuses)
    told = asked(capsys)
    assert told["exit_code"] == 1 and told["new"] and told["incomplete"]


def test_one_finding_under_two_combos_is_told_once(repo, capsys):
    write(repo, REMOVED)
    told = asked(capsys, "--combo", "siglip2-smollm2", "--combo", "dinov2-smollm2")
    assert [item["combos"] for item in told["new"]] == [["siglip2-smollm2", "dinov2-smollm2"]]


def test_the_order_is_verdict_policy_new_waived_not_run_and_the_rest(repo, capsys):
    write(repo, REMOVED)
    item = asked(capsys)["new"][0]
    write(repo, {**REMOVED, **{"state.extra.bias": FACTS["state.head.weight"], "cost.parameters": 31}}, failures=[TEST])
    (repo / "waivers.toml").write_text(waiver(item))
    gate("--approve-policy-change")
    said = capsys.readouterr().out
    places = [said.index(f"\n{heading}") for heading in ("Policy changed", "New\n", "Waived\n")]
    assert said.startswith("FAILED: ") and places == sorted(places)


# -- the base -------------------------------------------------------------------------------------------------------


def test_a_branch_is_compared_with_where_it_left_main_not_with_main(repo, capsys):
    write(repo, CHEAPER)
    commit(repo, "more")
    git(repo, "checkout", "-q", "main")
    write(repo, FACTS | {"cost.parameters": 64})
    fork = git(repo, "rev-parse", "HEAD")[:10]
    commit(repo, "main moved on")
    git(repo, "checkout", "-q", "work")
    told = asked(capsys)
    assert told["base"] == f"the merge-base with main, {fork}" and told["exit_code"] == 0


def test_on_main_a_dirty_tree_is_compared_with_head_and_a_clean_one_with_the_commit_before(repo, capsys):
    git(repo, "checkout", "-q", "main")
    first = git(repo, "rev-parse", "HEAD")[:10]
    write(repo, REMOVED)
    told = asked(capsys)
    assert told["base"].endswith(first) and rules(told["new"]) == ["LOAD.key_removed"]
    commit(repo, "two")
    told = asked(capsys)
    assert told["base"] == f"the commit before, on main, {first}" and rules(told["new"]) == ["LOAD.key_removed"]


def test_the_default_branch_is_what_origin_says_it_is(repo, tmp_path, monkeypatch, capsys):
    git(repo, "checkout", "-q", "main")
    git(repo, "branch", "-m", "main", "trunk")
    git(repo, "branch", "-D", "-q", "work")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(repo), str(clone))
    git(clone, "checkout", "-q", "-b", "work")
    monkeypatch.chdir(clone)
    write(clone, CHEAPER)
    commit(clone, "more")
    assert asked(capsys)["base"].startswith("the merge-base with origin/trunk")


def test_a_base_may_be_named_and_a_fork_elsewhere_judged(repo, monkeypatch, tmp_path, capsys):
    git(repo, "tag", "v1")
    write(repo, REMOVED)
    commit(repo, "two")
    monkeypatch.chdir(tmp_path)
    told = asked(capsys, "repo", "--base", "v1")
    assert told["base"].startswith("v1, ") and rules(told["new"]) == ["LOAD.key_removed"]
    assert asked(capsys, "repo@v1", "--base", "work")["base"].startswith("work, ")
    assert not (repo / ".compat").exists()


def test_a_folder_inside_a_repository_is_compared_with_the_same_folder_of_the_base(repo, monkeypatch, capsys):
    (repo / "research/vlm").mkdir(parents=True)
    write(repo / "research/vlm")
    commit(repo, "two")
    write(repo / "research/vlm", REMOVED)
    (repo / "waivers.toml").write_text("[[waiver]]\n")
    told = asked(capsys, "research/vlm", "--base", "HEAD")
    assert rules(told["new"]) == ["LOAD.key_removed"]
    assert told["policy"]["changes"][0]["path"] == "waivers.toml", "policy is that of the repository, not the folder"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--base", "v9"], 2, "'v9' names no commit"),
        (["--base", "gone.json"], 3, "gone.json cannot be read: No such file"),
        (["--base", "facts.json"], 2, "is no lock"),
        (["--base", "empty"], 2, "holds no lock"),
        (["--combo", "none"], 2, "no combo named 'none'"),
        (["nowhere"], 2, "'nowhere' is no target"),
        (["--json", "no/file.json"], 3, "cannot be written: there is no folder no"),
    ],
)
def test_wrong_arguments_are_one_sentence(repo, capsys, asker, arguments, code, said):
    (repo / "empty").mkdir()
    assert gate(*arguments) == code
    [line] = capsys.readouterr().err.splitlines()
    assert said in line and not asker.asked


def test_without_git_or_history_the_way_out_is_named(repo, tmp_path, monkeypatch, capsys):
    git(repo, "checkout", "-q", "main")
    assert gate() == 3
    assert "it is the first one; name one with --base REF, or compare with a lock" in capsys.readouterr().err
    shutil.rmtree(repo / ".git")
    assert gate() == 2
    assert "is in no git repository" in capsys.readouterr().err


def test_a_shallow_clone_without_the_base_ends_with_3_and_names_fetch_depth(repo, tmp_path, monkeypatch, capsys):
    git(repo, "checkout", "-q", "main")
    write(repo, CHEAPER)
    commit(repo, "two")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repo}", str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    assert gate() == 3
    assert "fetch-depth: 0" in capsys.readouterr().err
    assert gate("--base", "HEAD~1") == 3
    assert "fetch-depth: 0" in capsys.readouterr().err


def test_locks_serve_as_a_base_without_any_history(repo, capsys):
    shutil.rmtree(repo / ".git")
    (repo / "baselines").mkdir()
    for combo in ("siglip2-smollm2", "dinov2-smollm2"):
        lock.write(repo / f"baselines/{combo}.json", lock_of(repo, combo))
    told = asked(capsys, "--base", "baselines")
    assert told["exit_code"] == 0 and told["combos"] == ["siglip2-smollm2", "dinov2-smollm2"]
    write(repo, REMOVED)
    assert rules(asked(capsys, "--base", "baselines")["new"]) == ["LOAD.key_removed"]
    told = asked(capsys, "--base", "baselines/dinov2-smollm2.json")
    assert told["combos"] == ["dinov2-smollm2"] and told["exit_code"] == 1
    told = asked(capsys, "--base", "baselines/dinov2-smollm2.json", "--combo", "siglip2-smollm2")
    assert told["exit_code"] == 3 and "holds no lock of it" in told["incomplete"][0]


# -- waivers and policy ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken(repo, capsys):
    """The repository with a breaking change in it, and the finding."""
    write(repo, REMOVED)
    return asked(capsys)["new"][0]


def test_a_waiver_of_base_counts(repo, broken, capsys):
    write(repo, FACTS)
    (repo / "waivers.toml").write_text(waiver(broken))
    commit(repo, "waived beforehand")
    write(repo, REMOVED)
    told = asked(capsys, "--base", "HEAD")
    assert told["exit_code"] == 0 and not told["policy"]["changes"]
    assert [(item["rule"], item["reason"].split(" (")[0]) for item in told["waived"]] == [
        ("LOAD.key_removed", "head is split")
    ]


@pytest.mark.parametrize("approve", ["", "flag", "environment"])
def test_a_waiver_that_comes_with_the_change_counts_once_it_is_approved(repo, broken, capsys, monkeypatch, approve):
    (repo / "waivers.toml").write_text(waiver(broken))
    if approve == "environment":
        monkeypatch.setenv("COMPAT_POLICY_APPROVED", "true")
    told = asked(capsys, *["--approve-policy-change"] * (approve == "flag"))
    assert told["policy"]["changes"] == [{"path": "waivers.toml", "what": "1 new or changed, 0 gone", "narrows": False}]
    assert told["exit_code"] == (0 if approve else 1)
    assert len(told["waived"]) == bool(approve) and len(told["new"]) == (not approve) and not told["problems"]


def test_a_change_of_policy_alone_fails_until_it_is_approved(repo, capsys):
    (repo / "baselines").mkdir()
    lock.write(repo / "baselines/siglip2-smollm2.json", lock_of(repo))
    told = asked(capsys)
    assert told["exit_code"] == 1 and not told["new"]
    assert told["policy"]["changes"][0]["path"] == "baselines/siglip2-smollm2.json"
    gate()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("FAILED: 1 change of policy to approve") and said[2].startswith("Policy changed")
    assert gate("--approve-policy-change") == 0


def test_an_expired_an_unused_and_an_unfilled_entry_each_fail(repo, broken, capsys):
    yesterday = str(date.today() - timedelta(days=1))
    for changes, facts, said in (
        ({"expires": yesterday}, REMOVED, f"expired on {yesterday}"),
        ({}, FACTS, "is unused: nothing it waives is found"),
        ({"reason": '""'}, REMOVED, "has no reason yet"),
        ({"owner": "3"}, REMOVED, "has owner that is no text"),
    ):
        write(repo, facts)
        (repo / "waivers.toml").write_text(waiver(broken, **changes))
        told = asked(capsys, "--approve-policy-change")
        assert told["exit_code"] == 1 and said in told["problems"][0], said
        assert not told["waived"]


def test_an_unused_waiver_of_base_may_go_without_approval_and_no_longer_counts(repo, broken, capsys):
    write(repo)
    (repo / "waivers.toml").write_text(waiver(broken))
    commit(repo, "a waiver")
    assert "unused" in asked(capsys, "--base", "HEAD")["problems"][0]
    (repo / "waivers.toml").unlink()
    told = asked(capsys, "--base", "HEAD")
    assert told["exit_code"] == 0 and told["policy"]["changes"][0]["narrows"]
    write(repo, REMOVED)
    assert asked(capsys, "--base", "HEAD")["new"], "what head gave up does not count, though base has it"


def test_an_entry_for_another_combo_is_neither_used_nor_unused(repo, broken, capsys):
    (repo / "waivers.toml").write_text(waiver(broken, combos='["dinov2-smollm2"]'))
    told = asked(capsys, "--approve-policy-change")
    assert told["new"] and not told["problems"]


def test_a_failing_check_is_waived_like_a_finding_whatever_it_says(repo, capsys):
    write(repo, failures=[TEST])
    (repo / "waivers.toml").write_text(waiver(asked(capsys)["new"][0]))
    told = asked(capsys, "--approve-policy-change")
    assert told["exit_code"] == 0 and rules(told["waived"]) == ["SUITE.forward"]


def test_a_refreshed_lock_accepts_what_it_says_once_it_is_approved(repo, capsys):
    (repo / "baselines").mkdir()
    path = repo / "baselines/siglip2-smollm2.json"
    lock.write(path, lock_of(repo))
    commit(repo, "a lock")
    write(repo, REMOVED)
    assert rules(asked(capsys, "--base", "HEAD", "--approve-policy-change")["new"]) == ["LOAD.key_removed"]
    lock.write(path, lock_of(repo))
    assert asked(capsys, "--base", "HEAD")["exit_code"] == 1
    told = asked(capsys, "--base", "HEAD", "--approve-policy-change")
    assert told["exit_code"] == 0 and "baselines/siglip2-smollm2.json" in told["waived"][0]["reason"]


@pytest.fixture
def with_judge(repo, monkeypatch):
    """The judge that runs lies in the repository, as ours does; its tables are committed there."""
    (repo / "compat/matchers").mkdir(parents=True)
    for name in ("rules.toml", "tolerances.toml"):
        shutil.copy(TABLE.with_name(name), repo / "compat" / name)
    commit(repo, "a judge")
    git(repo, "branch", "-f", "main")
    monkeypatch.setattr(bases, "JUDGE", repo / "compat")
    return repo / "compat"


def test_a_change_cannot_loosen_the_rules_it_is_judged_by(repo, with_judge, capsys):
    table = with_judge / "rules.toml"
    before = table.read_text()
    head, _, tail = before.partition("[LOAD.key_removed]\n")
    table.write_text(f"{head}[LOAD.key_removed]\n" + tail.replace('severity = "breaking"', 'severity = "additive"', 1))
    assert table.read_text() != before
    write(repo, REMOVED)
    told = asked(capsys)
    assert [item["severity"] for item in told["new"]] == ["breaking"]
    assert told["policy"]["changes"] == [
        {"path": "compat/rules.toml", "what": "LOAD.key_removed is breaking -> additive", "narrows": False}
    ]
    told = asked(capsys, "--approve-policy-change")
    assert told["exit_code"] == 0 and rules(told["additions"]) == ["LOAD.key_removed"]


def test_a_change_cannot_loosen_the_tolerances_it_is_judged_by(repo, with_judge, capsys):
    a, b = {"numbers.fp32.loss": 4.0}, {"numbers.fp32.loss": 4.1}
    write(repo, FACTS | a)
    commit(repo, "a loss")
    git(repo, "branch", "-f", "main")
    table = with_judge / "tolerances.toml"
    table.write_text(table.read_text().replace("relative = 1e-6", "relative = 0.5"))
    write(repo, FACTS | b)
    assert rules(asked(capsys)["new"]) == ["NUMERIC.loss"]
    assert asked(capsys, "--approve-policy-change")["exit_code"] == 0


# -- what is written ------------------------------------------------------------------------------------------------


def test_propose_writes_entries_to_fill_in_and_the_locks_and_then_passes(repo, broken, capsys):
    (repo / "waivers.toml").write_text("# ours\n")
    assert gate("--propose") == 1
    text = (repo / "waivers.toml").read_text()
    assert text.startswith("# ours\n") and text.count("[[waiver]]") == 1
    assert lock.read(repo / ".compat/proposed/siglip2-smollm2.json")["facts"] == REMOVED
    assert git(repo, "status", "--porcelain", ".compat") == ""
    told = asked(capsys, "--approve-policy-change")
    assert told["exit_code"] == 1 and "no reason and no owner yet" in told["problems"][0]
    (repo / "waivers.toml").write_text(text.replace('""', '"meant"'))
    assert gate("--approve-policy-change") == 0


def test_nothing_new_proposes_no_entry(repo, capsys):
    assert gate("--propose") == 0
    assert not (repo / "waivers.toml").exists()


def test_the_run_is_saved_and_logged_with_what_was_found(repo, broken, capsys):
    capsys.readouterr()
    assert cli.main(["gate"]) == 1
    [run] = [run for run in map(store.load, store.all_runs(Path(".compat/runs"))) if run.log]
    assert [(row["combo"], row["rule"], row["waived"]) for row in run.findings] == [
        ("siglip2-smollm2", "LOAD.key_removed", "")
    ]
    log = (repo / "MODIFICATIONS_LOG.md").read_text(encoding="utf-8")
    assert "Integration Test Run" in log and "**Gate**: `FAILED: 1 new finding" in log and "LOAD.key_removed" in log
    assert run.log["entry"] in log


def test_json_goes_to_a_file_beside_the_table(repo, broken, capsys):
    assert gate("--json", "out.json") == 1
    told = json.loads((repo / "out.json").read_text())
    assert told["verdict"] == "failed" and "FAILED: 1 new finding" in capsys.readouterr().out


# -- as a hook ------------------------------------------------------------------------------------------------------


def hook() -> list[str]:
    """The words of the hook that .pre-commit-hooks.yaml offers."""
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with transformers")
    [offered] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert offered["id"] == "compat-gate" and offered["pass_filenames"] is False
    return offered["entry"].split()


def test_the_hook_stops_a_breaking_change_and_writes_no_file_that_git_sees(repo, capsys):
    program, *words = hook()
    assert program == "compat" and cli.main(words) == 0
    write(repo, REMOVED)
    before = git(repo, "status", "--porcelain")
    assert cli.main(words) == 1 and git(repo, "status", "--porcelain") == before


@pytest.mark.slow
def test_git_refuses_a_commit_that_the_hook_stops(tmp_path, monkeypatch):
    repo = repository(make_tree(tmp_path, "main"))
    commit(repo, "one")
    (tmp_path / "bin").mkdir()
    compat = tmp_path / "bin/compat"
    compat.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m compat "$@"\n')
    script = repo / ".git/hooks/pre-commit"
    script.write_text("#!/bin/sh\nexec " + " ".join(hook()) + "\n")
    for path in (compat, script):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COMPAT_CACHE", str(tmp_path / "cache"))
    (repo / "README.md").write_text("words\n")
    commit(repo, "words alone")
    model = repo / MODEL
    model.write_text(model.read_text().replace("targets", "labels"))
    git(repo, "add", "-A")
    done = subprocess.run([*GIT, "-C", str(repo), "commit", "-q", "-m", "renamed"], capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED: " in done.stdout + done.stderr
    assert git(repo, "log", "-1", "--format=%s") == "words alone"
