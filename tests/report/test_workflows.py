"""The workflows: pinned, no right too many, and nothing of an event reaches a shell as code."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import yaml

from compat import cli
from compat.commands.gate import APPROVED
from compat.reports.comment import MARKER
from tests.house.tree import ROOT

FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))
ACTIONS = sorted((FOLDER / "actions").glob("*/action.yml"))
WRITES = {("comment.yml", "comment"): {"pull-requests"}, ("matrix.yml", "code-scanning"): {"security-events"}}
FROM_OUTSIDE = re.compile(r"\$\{\{")  # in a script nothing is filled in: values come by env


def load(path) -> dict:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    if True in document:  # YAML 1.1 takes the key `on` for a truth value
        document["on"] = document.pop(True)
    return document


def jobs(path) -> dict[str, dict]:
    return load(path).get("jobs") or {"action": load(path)["runs"]}


def steps(path) -> list[dict]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def name(path) -> str:
    return path.name if path in WORKFLOWS else path.parent.name


every = pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=name)
workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=name)


def test_all_that_is_promised_is_there():
    assert {"ci.yml", "gate.yml", "comment.yml", "matrix.yml", "gpu.yml", "nightly.yml"} <= {p.name for p in WORKFLOWS}
    assert [path.parent.name for path in ACTIONS] == ["judge"]


@every
def test_every_action_is_pinned_by_commit(path):
    used = [step["uses"] for step in steps(path) if "uses" in step]
    wrong = [use for use in used if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+@[0-9a-f]{40}|\./\.github/actions/\w+", use)]
    assert not wrong
    for use in used:
        assert not use.startswith("./") or (ROOT / use / "action.yml").is_file()


def test_one_action_is_used_at_one_commit_and_its_version_stands_beside_it():
    text = "".join(path.read_text() for path in [*WORKFLOWS, *ACTIONS])
    used = re.findall(r"uses: (\S+)@([0-9a-f]{40})(  # v[\d.]+)?\n", text)
    assert used and all(version for _, _, version in used)
    assert len(set(used)) == len({action for action, _, _ in used})


@workflows
def test_the_token_only_reads_but_for_one_job_each_with_a_reason(path):
    document = load(path)
    assert document["permissions"] in ({"contents": "read"}, {})
    for job, content in document["jobs"].items():
        rights = content.get("permissions", {})
        assert isinstance(rights, dict), "write-all, or read-all, is more than a job needs"
        assert {right for right, how in rights.items() if how != "read"} == WRITES.get((path.name, job), set())


@workflows
def test_a_job_that_may_write_runs_nothing_of_a_change(path):
    for job, content in load(path)["jobs"].items():
        if (path.name, job) in WRITES:
            for step in content["steps"]:
                assert "ref" not in step.get("with", {}) and "repository" not in step.get("with", {})
                for word in ("pip install", "compat run", "compat gate", "make ", "git checkout", "git fetch"):
                    assert word not in step.get("run", "")
                assert not step.get("uses", "").startswith("./")


@workflows
def test_no_workflow_is_triggered_with_rights_by_somebody_else_s_change(path):
    triggers = load(path)["on"]
    assert "pull_request_target" not in triggers and "issue_comment" not in triggers
    if "workflow_run" in triggers:
        assert load(path)["permissions"] == {} and path.name == "comment.yml"


@every
def test_nothing_is_filled_into_a_script(path):
    assert not [step["run"] for step in steps(path) if FROM_OUTSIDE.search(step.get("run", ""))]


@every
def test_no_checkout_keeps_the_token(path):
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@every
def test_no_secret_is_named(path):
    assert "secrets." not in path.read_text()


@workflows
def test_every_job_ends(path):
    assert all(job["timeout-minutes"] <= 90 for job in load(path)["jobs"].values())


@every
def test_every_script_is_one_that_bash_can_read(path):
    for step in steps(path):
        if "run" in step:
            done = subprocess.run(["bash", "-n"], input=step["run"], text=True, capture_output=True, timeout=30)
            assert done.returncode == 0, done.stderr


@every
def test_every_value_of_a_step_or_job_that_is_asked_for_is_given(path):
    document, text = load(path), path.read_text()
    ids = {step["id"] for step in steps(path) if "id" in step}
    assert set(re.findall(r"steps\.(\w+)\.", text)) <= ids
    for job in document.get("jobs", {}).values():
        needs = job.get("needs", [])
        needed = {needs} if isinstance(needs, str) else set(needs)
        assert needed <= set(document["jobs"])
        assert set(re.findall(r"needs\.([\w-]+)\.", json.dumps(job))) <= needed
    if "inputs" in document:
        assert set(re.findall(r"inputs\.(\w+)", text)) == set(document["inputs"])


def test_the_gate_is_approved_by_a_label_and_reads_history():
    [job] = load(FOLDER / "workflows/gate.yml")["jobs"].values()
    checkout, judge = job["steps"][:2]
    assert checkout["with"]["fetch-depth"] == 0
    asked = "github.event.action == 'labeled' && github.event.label.name == 'policy-approved'"
    assert judge["with"]["approved"] == f"${{{{ {asked} }}}}", "a label of an earlier commit would approve the next one"
    action = load(ACTIONS[0])
    [step] = [step for step in action["runs"]["steps"] if step.get("id") == "judge"]
    assert step["env"][APPROVED] == "${{ inputs.approved }}" and action["inputs"]["approved"]["default"] == "false"
    assert load(FOLDER / "workflows/gate.yml")["on"]["pull_request"]["types"].count("labeled") == 1


def test_the_judge_is_installed_in_place_so_that_a_project_which_holds_it_is_judged_by_its_base():
    assert '-e "$project"' in ACTIONS[0].read_text()


def test_the_gpu_job_waits_for_a_reviewer():
    [job] = load(FOLDER / "workflows/gpu.yml")["jobs"].values()
    assert job["environment"] == "gpu" and "self-hosted" in job["runs-on"]
    assert "pull_request_target" not in load(FOLDER / "workflows/gpu.yml")["on"]
    others = [job for path in WORKFLOWS for job in load(path)["jobs"].values() if path.name != "gpu.yml"]
    assert all(job["runs-on"] == "ubuntu-latest" for job in others), "strangers' code stays off our own machines"


def test_the_nightly_list_holds_public_repositories_once():
    forks = json.loads((FOLDER / "forks.json").read_text())
    assert len(forks) > 3 and all(set(fork) == {"repo", "ref"} for fork in forks)
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", fork["repo"]) for fork in forks)
    assert len({(fork["repo"].lower(), fork["ref"]) for fork in forks}) == len(forks)


def test_the_comment_is_found_again_by_the_marker_it_is_written_with():
    assert f'startswith("{MARKER.format("gate")}")' in (FOLDER / "workflows/comment.yml").read_text()
    assert load(FOLDER / "workflows/comment.yml")["on"]["workflow_run"]["workflows"] == [
        load(FOLDER / "workflows/gate.yml")["name"]
    ]


@pytest.mark.parametrize("command", ["gate", "run"])
def test_the_action_s_words_are_those_of_the_command_line(command, tmp_path):
    """The script itself, with a `compat` that prints what it was given."""
    action = load(ACTIONS[0])
    [script] = [step["run"] for step in action["runs"]["steps"] if step.get("id") == "judge"]
    program = tmp_path / "compat-venv" / "bin" / "compat"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done > {tmp_path}/words\nexit 1\n')
    program.chmod(0o755)
    hostile = 'main"; touch pwned; "$(touch pwned)'
    around = {"PATH": "/usr/bin:/bin", "RUNNER_TEMP": str(tmp_path), "GITHUB_OUTPUT": str(tmp_path / "output")}
    around |= {"COMMAND": command, "TARGET": "my fork", "BASE": hostile, "COMBO": "siglip2-smollm2 siglip-smollm2"}
    around |= {"THEIR_PYTHON": ""}
    if command == "run":
        around["BASE"] = ""
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", script], env=around, cwd=tmp_path, timeout=30)
    assert done.returncode == 1 and "code=1" in (tmp_path / "output").read_text() and not (tmp_path / "pwned").exists()
    options = cli.parser().parse_args((tmp_path / "words").read_text().splitlines())
    assert (options.command, options.target, options.no_log) == (command, "my fork", True)
    assert options.combo == ["siglip2-smollm2", "siglip-smollm2"] and options.junit.endswith("compat-out/junit.xml")
    assert command == "run" or options.base == hostile
