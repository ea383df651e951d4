"""What a run measures beside its checks, and the git facts it takes along."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from compat.checkout import tags
from compat.combo import choose
from compat.figures import AFTER, measure
from compat.plugin import judge
from compat.process import Child, ChildFailed, NotSupported
from compat.result import FAILED, Result, Run
from compat.suites import choose as choose_suites
from compat.target import resolve
from tests.judge.fake_child import FakeChild

ROOT = Path(__file__).parents[2]
COMBO = "siglip2-smollm2"


def judged(child, *suites: str) -> Run:
    run = Run.begin({"label": "../fork"}, "tiny", [COMBO])
    return judge(run, child, choose([COMBO]), choose_suites(list(suites) or None))


def test_a_run_keeps_cost_special_tokens_and_deciding_fields():
    run = judged(FakeChild())
    assert set(run.cost[COMBO]) == {
        "parameters", "peak_forward_bytes", "peak_train_bytes", "flops_forward", "flops_backward", "tokens_per_s",
    }  # fmt: skip
    assert all(value > 0 for value in run.cost[COMBO].values())
    assert run.facts[COMBO] == {
        "special_tokens": {"eos_token": ["<|im_end|>", 2]},
        "loading_fields": {"lm_hidden_dim": [960, "shapes"], "vit_patch_size": [16, "refused"]},
    }


def test_memory_is_not_measured_twice():
    """The VRAM check asks three questions, and the figures are two of their answers."""
    child = FakeChild()
    assert judged(child, "vram").cost[COMBO]["peak_train_bytes"] > 0
    assert child.calls.count("memory") == 3


def test_a_figure_is_asked_for_only_where_its_check_passed_and_says_why_not():
    child = FakeChild("pictures are ignored")
    run = judged(child, "forward", "generate")
    missing = run.facts[COMBO]["not_measured"]
    assert missing["flops"] == missing["memory"] == "the check VRAM was not asked"
    assert set(missing) == set(AFTER) - {"speed"} and "tokens_per_s" in run.cost[COMBO]
    assert "lock_flops" not in child.calls and "memory" not in child.calls


def test_a_check_that_failed_keeps_the_figure_from_being_asked():
    checks = [Result("VRAM", "holds", FAILED, "too much", combo=COMBO)]
    run = Run.begin({"label": "."}, "tiny", [COMBO])
    run.results = checks
    child = FakeChild()
    described = child.ask("describe")
    _, facts = measure(child.ask, described, run.checks())
    assert facts["not_measured"]["flops"] == "the check VRAM did not pass" and child.calls == ["describe"]


@pytest.mark.parametrize("error", [NotSupported("no formula for my_attention"), ChildFailed("the process died")])
def test_what_the_target_cannot_answer_is_a_reason_and_the_rest_is_measured(error):
    def refuse(reply, parameters):
        raise error

    run = judged(FakeChild(changes={"lock_flops": refuse}))
    assert run.facts[COMBO]["not_measured"] == {"flops": str(error)}
    assert "flops_forward" not in run.cost[COMBO] and "tokens_per_s" in run.cost[COMBO]


@pytest.mark.slow
def test_this_model_s_figures_are_those_its_config_implies():
    with Child(resolve(str(ROOT)), timeout_s=60) as child:
        run = judged(child, "generate", "tokenizer", "state_dict", "vram")
    fields = run.facts[COMBO]["loading_fields"]
    assert fields["lm_hidden_dim"] == [960, "shapes"] and fields["vit_n_blocks"] == [12, "shapes"]
    assert fields["mp_pixel_shuffle_factor"][1] == "refused"
    assert not {"lm_max_length", "lm_attn_scaling", "vit_dropout"} & set(fields)  # sizes nothing that is saved
    assert "not_measured" not in run.facts[COMBO]
    tokens = run.facts[COMBO]["special_tokens"]
    assert tokens["image_token"][0] == "<|image|>" and len(tokens) > 60
    cost = run.cost[COMBO]
    assert cost["peak_train_bytes"] > cost["peak_forward_bytes"] > 4 * cost["parameters"] > 0
    assert 1.5 < cost["flops_backward"] / cost["flops_forward"] < 2.1  # twice the matrices, less the first layer's


# -- git --------------------------------------------------------------------------------------------------------


@pytest.fixture
def git(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    nobody = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_COMMITTER_DATE": "2026-09-01T08:00:00Z"}

    def run(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@example.org", *words]
        return subprocess.run(command, env=os.environ | nobody, check=True, capture_output=True, text=True).stdout

    run("init", "-q", "-b", "main")
    return run


def test_tags_carry_name_date_commit_and_subject(tmp_path, git):
    assert tags(tmp_path) == []
    git("commit", "-q", "--allow-empty", "-m", "First <b>one</b>")
    git("tag", "light")
    git("tag", "-a", "v1.0", "-m", "The first release\n\nmore words")
    head = git("rev-parse", "HEAD").strip()
    told = {tag["name"]: tag for tag in tags(tmp_path)}
    assert told["light"] == {"name": "light", "date": "2026-09-01", "commit": head, "subject": "First <b>one</b>"}
    assert told["v1.0"] == {"name": "v1.0", "date": "2026-09-01", "commit": head, "subject": "The first release"}
    assert tags(tmp_path.parent / "nowhere") == []


def test_git_merges_two_branches_logs_by_union(tmp_path, git):
    attributes = (ROOT / ".gitattributes").read_text()
    assert "MODIFICATIONS_LOG.md merge=union" in attributes
    (tmp_path / ".gitattributes").write_text(attributes)
    path = tmp_path / "MODIFICATIONS_LOG.md"
    path.write_text("# Modifications Log\n")
    git("add", ".")
    git("commit", "-q", "-m", "begin")
    for branch in ("one", "two"):
        git("checkout", "-q", "-b", branch, "main")
        path.write_text(path.read_text() + f"\n---\n\n### Integration Test Run - of {branch}\n")
        git("commit", "-q", "-a", "-m", branch)
    git("merge", "-q", "one", "-m", "both")
    text = path.read_text()
    assert "of one" in text and "of two" in text and "<<<<" not in text
