"""`compat bisect` over histories made here: lines, merges, commits that cannot be judged, faults that come and go."""

from __future__ import annotations

import json

import pytest

from compat import bisect, cli

from .repos import FACTS, Asker, commit, git, grow, repository, write
from .trees import MODEL, make_tree

REMOVED = {path: value for path, value in FACTS.items() if not path.startswith("state.")}
CHEAPER = FACTS | {"cost.parameters": 31}
UNASKABLE = "the target cannot be imported: ImportError: no module named 'einops'"
RULE = ["--rule", "LOAD.key_removed"]


@pytest.fixture
def asker(monkeypatch):
    monkeypatch.setattr(bisect, "answer", made := Asker())
    monkeypatch.setattr(bisect, "cross", lambda pairs, how: ([None] * len(pairs), 0))
    return made


@pytest.fixture
def line(tmp_path, monkeypatch, asker):
    """line("..x?..") commits a history: "." does not show it, "x" does, "?" cannot be judged. Returns the hashes."""
    repo = repository(tmp_path / "repo")
    monkeypatch.chdir(repo)

    def make(states: str) -> list[str]:
        failures = {"?": UNASKABLE, "x": ["logits are right"], ".": []}
        return grow(repo, [(REMOVED if state == "x" else FACTS, failures[state]) for state in states])

    return make


def ask(capsys, good: str, bad: str, *arguments: str) -> dict:
    capsys.readouterr()
    code = cli.main(["bisect", "--good", good, "--bad", bad, "--json", "-", *arguments])
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == code
    return told


@pytest.mark.parametrize("arguments", [RULE, ["--suite", "forward"], []], ids=["rule", "suite", "either"])
@pytest.mark.parametrize("at", [1, 8, 15])
def test_the_first_commit_is_found_by_rule_suite_or_whatever_breaks(line, capsys, asker, arguments, at):
    commits = line("." * at + "x" * (16 - at))
    told = ask(capsys, commits[0], commits[-1], *arguments)
    assert told["first"]["commit"] == commits[at] and told["exit_code"] == 0
    labels = [label for label, _ in asker.asked]
    assert len(labels) == len(set(labels)) == len(told["asked"]), "each commit is asked once"
    assert len(labels) <= 12, "two ends, five to find it, five to see that it stays"


def test_commits_that_cannot_be_imported_are_skipped_and_named(line, capsys):
    commits = line("....?...xxxx")
    told = ask(capsys, commits[0], commits[-1], *RULE)
    assert told["first"]["commit"] == commits[8]
    skipped = [one for one in told["asked"] if one["state"] == "skipped"]
    assert all(one["commit"] == commits[4] and one["why"] == [UNASKABLE] for one in skipped)


def test_skips_that_hide_the_culprit_leave_the_range_of_suspects(line, capsys):
    commits = line("...???xx")
    told = ask(capsys, commits[0], commits[-1], *RULE)
    assert told["first"] is None and told["exit_code"] == 3
    assert set(told["suspects"]) == set(commits[3:7])
    assert cli.main(["bisect", "--good", commits[0], "--bad", commits[-1], *RULE]) == 3
    said = capsys.readouterr().out
    assert said.startswith("ONE OF 4: ") and said.count("no module named 'einops'") == 3 and "commit 5" in said


@pytest.mark.parametrize("states", [".x.x", "..xx..xxxx", ".x........x"])
def test_what_comes_and_goes_is_said(line, capsys, states):
    commits = line(states)
    told = ask(capsys, commits[0], commits[-1], *RULE)
    assert told["contradictions"] and told["exit_code"] == 3
    assert cli.main(["bisect", "--good", commits[0], "--bad", commits[-1], *RULE]) == 3
    assert "more than one first commit" in capsys.readouterr().out


def test_a_merged_branch_is_searched_too(line, capsys, tmp_path):
    repo, [root] = tmp_path / "repo", line(".")
    git(repo, "checkout", "-q", "-b", "side")
    side = []
    for number, facts in enumerate((FACTS, REMOVED, REMOVED)):
        write(repo, facts, side=str(number))
        side.append(commit(repo, f"side {number}"))
    git(repo, "checkout", "-q", "main")
    (repo / "other").write_text("of main")
    commit(repo, "main goes on")
    git(repo, "merge", "-q", "--no-ff", "-m", "merge", "side")
    told = ask(capsys, root, "main", *RULE)
    assert told["first"]["commit"] == side[1]


def test_another_rule_s_finding_is_not_it(line, capsys, tmp_path):
    commits = line("..")
    write(tmp_path / "repo", CHEAPER)
    commits.append(commit(tmp_path / "repo", "cheaper"))
    commits += line("xx")
    told = ask(capsys, commits[0], "main", *RULE)
    assert told["first"]["commit"] == commits[3] and "state.head.weight" in told["first"]["why"][0]


def test_a_tree_without_a_model_is_skipped_unless_it_is_what_is_looked_for(line, capsys, tmp_path):
    commits = line("..")
    write(tmp_path / "repo", {"state": {"error": "TypeError", "message": "no field lm_n_heads"}})
    commits.append(commit(tmp_path / "repo", "cannot be built"))
    commits += line("xx")
    told = ask(capsys, commits[0], "main", *RULE)
    assert told["first"] is None and set(told["suspects"]) == set(commits[2:4])
    told = ask(capsys, commits[0], commits[2], "--rule", "API.error_appeared")
    assert told["first"]["commit"] == commits[2]


def test_ends_that_do_not_fit_are_said_before_anything_between_is_asked(line, capsys, asker, tmp_path):
    commits = line("..xx?")
    git(tmp_path / "repo", "checkout", "-q", "-b", "side", commits[1])
    (tmp_path / "repo/x").write_text("x")
    side = commit(tmp_path / "repo", "aside")
    for good, bad, code, said in (
        (commits[2], commits[3], 2, None),
        (commits[0], commits[1], 2, f"{commits[1][:10]} (--bad) does not show it"),
        (commits[0], commits[4], 3, "(--bad) cannot be judged: the target cannot be imported"),
        (side, commits[3], 2, f"they part at {commits[1][:10]}, which may be given as --good"),
        (commits[0], commits[0], 2, "are the same commit"),
        ("v9", "main", 2, "'v9' names no commit"),
    ):
        # against a good commit that lacks the key already nothing is removed: with a rule such a pair shows nothing
        arguments = ["--suite", "forward"] if said is None else RULE
        assert cli.main(["bisect", "--good", good, "--bad", bad, *arguments]) == code
        [line_] = capsys.readouterr().err.splitlines()
        assert (said or "(--good) shows it: Forward Pass Training: logits are right") in line_
    assert len(asker.asked) == 6, "the two ends, where they can be ends"


def test_wrong_names_are_usage(line, capsys, tmp_path, monkeypatch):
    line("..")
    (tmp_path / "plain").mkdir()
    for arguments, said in (
        (["--rule", "LOAD.nothing"], "no rule named"),
        (["--suite", "nothing"], "no suite named"),
        (["--combo", "nothing"], "no combo named"),
        ([str(tmp_path / "plain")], "is in no git repository"),
    ):
        assert cli.main(["bisect", "--good", "HEAD~1", "--bad", "HEAD", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_history_is_searched_with_real_children_and_remembered(tmp_path, monkeypatch):
    repo = repository(make_tree(tmp_path, "main"))
    monkeypatch.setenv("COMPAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(repo)
    commits = [commit(repo, "one")]
    model = repo / MODEL
    text = model.read_text()
    renamed = text.replace("targets", "labels")
    for changed in (f"{text}# a remark\n", f"import no_such_module\n{text}", renamed, f"{renamed}# more\n"):
        model.write_text(changed)
        commits.append(commit(repo, "a change"))
    search = ["bisect", "--good", commits[0], "--bad", commits[-1], "--json", "out.json"]
    assert cli.main(search) == 3, "the commit that cannot be imported lies right before the culprit"
    told = json.loads((repo / "out.json").read_text())
    assert set(told["suspects"]) == {commits[2], commits[3]} and told["starts"]
    [skipped] = [one for one in told["asked"] if one["state"] == "skipped"]
    assert skipped["commit"] == commits[2] and "no_such_module" in skipped["why"][0]
    cli.main(search)
    again = json.loads((repo / "out.json").read_text())
    assert again["suspects"] == told["suspects"] and again["starts"] <= 1, "only what gave no answer is asked again"
