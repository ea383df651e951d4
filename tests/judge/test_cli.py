"""`compat run`: what is written where, what is said where, and which exit code says it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compat import cli, process, store
from compat.combo import choose as choose_combos
from compat.plugin import judge
from compat.result import SKIPPED, Run
from compat.suites import FOLDER, choose
from compat.target import Target

from .fake_child import FakeChild

ROOT = Path(__file__).parents[2]
LOG = "MODIFICATIONS_LOG.md"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The user's folder, beside a fork's."""
    for name in ("here", "fork"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("CI", raising=False)
    return tmp_path / "here"


@pytest.fixture
def child(monkeypatch):
    """child.fake answers instead of a process; child.made holds what it was made with."""

    class Answers:
        fake, made = FakeChild(), []

    def make(target: Target, **options):
        Answers.made.append((target, options))
        return Answers.fake

    Answers.fake, Answers.made = FakeChild(), []
    monkeypatch.setattr(process, "Child", make)
    return Answers


def saved(here: Path) -> Run:
    [path] = store.all_runs(here / ".compat" / "runs")
    return store.load(path)


def test_a_good_run_is_shown_saved_and_logged(here, child, capsys):
    assert cli.main(["run", "../fork", "--json", "copy.json"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("PASSED: 13 of 13 checks passed | ../fork | siglip2-smollm2 (tiny)")
    assert "Forward Pass Training: passed" in said.err and "PASSED:" not in said.err
    run = saved(here)
    assert run == store.load(here / "copy.json") and len(run.checks()) == 13
    assert run.environment["torch"] == "2.13.0" and run.output == "hello from the target\n" and run.notes
    log = (here / LOG).read_text(encoding="utf-8")
    assert run.log == {"path": LOG, "entry": log[log.index("---\n") :], "error": ""}
    assert "- **Status**: ✅ All Passed\n" in log and f".compat/runs/{run.id}.json" in log
    assert child.fake.closed and list((here.parent / "fork").iterdir()) == []


def test_options_reach_the_child(here, child):
    arguments = [
        "--python",
        "/usr/bin/python3",
        "--timeout",
        "7",
        "--device",
        "cuda",
        "--scale",
        "full",
        "-q",
        "--no-log",
    ]
    assert cli.main(["run", "../fork", "--suite", "backbones", *arguments]) == 0
    [(target, options)] = child.made
    assert target.folder == here.parent / "fork"
    assert options == {
        "python": "/usr/bin/python3",
        "timeout_s": 7.0,
        "run_timeout_s": 600.0,
        "device": "cuda",
        "scale": "full",
    }


def test_a_failed_check_is_exit_1_and_shown(here, child, capsys):
    child.fake = FakeChild("pictures are ignored")
    assert cli.main(["run", "../fork", "--suite", "forward"]) == 1
    out = capsys.readouterr().out
    assert (
        out.startswith("FAILED: 0 of 1 checks passed, 1 failed")
        and "another picture changes the logits" in out
    )
    assert "❌ Forward Pass Training" in (here / LOG).read_text(encoding="utf-8")


def test_an_error_of_ours_is_exit_3_and_not_called_a_failure(here, child, capsys):
    child.fake = FakeChild(changes={"backbones": lambda reply, parameters: reply["no such thing"]})
    assert cli.main(["run", "../fork", "--suite", "backbones"]) == 3
    out = capsys.readouterr().out
    assert (
        out.startswith("INCOMPLETE: 0 of 1 checks passed, 1 could not be judged")
        and "KeyError: 'no such thing'" in out
    )


def test_a_folder_nothing_can_be_asked_of_is_one_sentence_and_exit_3(here, child, capsys):
    def refuse(reply, parameters):
        raise process.CouldNotAsk("this folder holds no nanoVLM-style model")

    child.fake = FakeChild(changes={"describe": refuse})
    assert cli.main(["run", "../fork"]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err == "compat: this folder holds no nanoVLM-style model\n"
    assert list(here.iterdir()) == [] and child.fake.closed and child.fake.calls == ["describe"]


def test_ctrl_c_keeps_what_was_answered(here, child, capsys):
    def interrupt(reply, parameters):
        raise KeyboardInterrupt

    child.fake = FakeChild(changes={"backbones": interrupt})
    assert cli.main(["run", "../fork", "--suite", "train_config", "--suite", "backbones"]) == 3
    assert "INCOMPLETE: 1 of 1 checks passed (interrupted from the keyboard)" in capsys.readouterr().out
    assert len(saved(here).results) == 3 and "interrupted" in (here / LOG).read_text(encoding="utf-8")


@pytest.mark.parametrize("at_once", [1, 2])
def test_two_combos_share_the_children_there_is_room_for_and_are_told_in_order(
    here, child, capsys, monkeypatch, at_once
):
    monkeypatch.setattr("compat.parallel.places", lambda wanted, *_: min(wanted, at_once))
    names = ["siglip-smollm2", "siglip2-smollm2"]
    assert cli.main(["run", "../fork", "--suite", "forward", "--combo", names[0], "--combo", names[1]]) == 0
    assert len(child.made) == (1 if at_once == 1 else 0), "two of them are made in processes of their own"
    assert saved(here).combos == names
    asked = [result.combo for result in saved(here).results]
    each = len(asked) // 2
    assert each and asked == [names[0]] * each + [names[1]] * each
    assert "PASSED: 2 of 2 checks passed" in capsys.readouterr().out


def test_an_error_of_ours_is_exit_3_and_never_a_verdict_on_the_target(here, child, capsys, monkeypatch):
    monkeypatch.setattr(store, "save", lambda *_, **__: 1 / 0)
    assert cli.main(["run", "../fork", "--suite", "forward"]) == 3
    assert "compat: an error of ours, no verdict on the target: ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["../nowhere"], "'../nowhere' is no target"),
        (["../fork", "--combo", "dino"], "there are: siglip2-smollm2"),
        (["../fork", "--suite", "forwards"], "there are: config, signature, forward,"),
        (["../fork", "--log", "../fork/LOG.md"], "lies inside the target"),
    ],
)
def test_wrong_usage_is_exit_2_and_says_what_would_be_right(here, child, capsys, arguments, complaint):
    assert cli.main(["run", *arguments]) == 2
    said = capsys.readouterr()
    assert complaint in said.err and said.out == "" and list(here.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--timeout", "nan"],
        ["--timeout", "-1"],
        ["--scale", "huge"],
        ["-q", "-v"],
        ["--no-log", "--log", "x"],
    ],
)
def test_arguments_that_make_no_sense_are_exit_2(here, child, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "../fork", *arguments])
    assert ended.value.code == 2


def test_a_suite_may_be_named_by_its_title():
    assert [s.name for s in choose(["Save Load Methods", "test_vram.py"])] == ["save_load", "vram"]


@pytest.mark.parametrize(
    ("ci", "arguments", "logged"),
    [
        ("true", [], False),
        ("true", ["--log", LOG], True),
        ("false", [], True),
        ("", [], True),
        ("", ["--no-log"], False),
    ],
)
def test_in_ci_nothing_is_logged_unless_asked(here, child, monkeypatch, ci, arguments, logged):
    monkeypatch.setenv("CI", ci)
    assert cli.main(["run", "../fork", "--suite", "backbones", *arguments]) == 0
    assert (here / LOG).exists() is logged


def test_a_target_is_logged_in_only_from_inside_it(here, child, monkeypatch, capsys):
    fork = here.parent / "fork"
    (fork / "sub").mkdir()
    monkeypatch.chdir(fork / "sub")
    assert cli.main(["run", "..", "--suite", "backbones"]) == 0
    assert "not logged" in capsys.readouterr().err and not list(fork.rglob(LOG))
    monkeypatch.chdir(fork)
    assert cli.main(["run", "--suite", "backbones"]) == 0
    assert (fork / LOG).exists()


def test_a_log_that_cannot_be_written_is_said_and_kept_in_the_run(here, child, capsys):
    (here / LOG).mkdir()
    assert cli.main(["run", "../fork", "--suite", "backbones"]) == 0
    assert f"the log {LOG} was not written" in capsys.readouterr().err
    run = saved(here)
    assert "✅ Backbone Loading" in run.log["entry"] and "not written" in run.log["error"]


def test_a_run_that_cannot_be_saved_is_said_and_still_shown(here, child, capsys):
    (here / ".compat").write_text("in the way")
    assert cli.main(["run", "../fork", "--suite", "backbones"]) == 0
    said = capsys.readouterr()
    assert "was not saved" in said.err and "PASSED" in said.out


@pytest.mark.parametrize(("where", "why"), [("no/folder.json", "there is no folder no"), (".", "it is a folder")])
def test_a_json_file_that_cannot_be_written_is_exit_3_before_anything_is_asked(here, child, capsys, where, why):
    assert cli.main(["run", "../fork", "--json", where]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"compat: --json {where} cannot be written: {why}; nothing was asked\n"
    assert not child.fake.calls and list(here.iterdir()) == []


def test_a_json_file_that_could_not_be_written_after_all_is_no_success(here, child, capsys, monkeypatch):
    monkeypatch.setattr(store, "write_atomic", full_disk(store.write_atomic, "copy.json"))
    assert cli.main(["run", "../fork", "--suite", "backbones", "--json", "copy.json"]) == 3
    said = capsys.readouterr()
    assert "copy.json was not written: No space left" in said.err and "PASSED" in said.out


def full_disk(write, name: str):
    def refuse(path, data):
        if path.name == name:
            raise OSError(28, "No space left on device")
        write(path, data)

    return refuse


def test_json_on_stdout_is_json_and_nothing_else(here, child, capsys):
    assert cli.main(["run", "../fork", "--suite", "backbones", "--json", "-"]) == 0
    assert Run.from_json(json.loads(capsys.readouterr().out)).target["label"] == "../fork"


def test_quiet_says_verdict_and_failures_alone(here, child, capsys):
    assert cli.main(["run", "../fork", "--suite", "backbones", "-q"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("PASSED") and "|  " not in said.out


def test_pytest_settings_of_the_user_and_the_fork_have_no_say(here, child, monkeypatch):
    for folder in (here, here.parent / "fork"):
        (folder / "conftest.py").write_text("raise SystemExit('a conftest of the user was loaded')")
        (folder / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option -k nothing")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PYTEST_PLUGINS", "no_such_plugin")
    assert cli.main(["run", "../fork", "--suite", "backbones"]) == 0
    assert len(saved(here).results) == 2 and not list(here.rglob(".pytest_cache"))


def test_the_time_limit_of_a_run_leaves_the_rest_unasked(monkeypatch):
    child = FakeChild()
    run = Run.begin({"label": "x"}, "tiny", ["siglip2-smollm2"])
    judge(run, child, choose_combos(None), choose(["backbones", "vram"]), limit_s=0.0)
    assert {result.status for result in run.results} == {SKIPPED} and child.calls == []
    assert run.incomplete == "the run's time limit of 0 s is spent" and run.exit_code == 3


def test_the_child_is_asked_the_same_thing_once():
    child = FakeChild()
    judge(Run.begin({"label": "x"}, "tiny", ["siglip2-smollm2"]), child, choose_combos(None), choose(None))
    assert (
        child.calls.count("describe")
        == child.calls.count("save_load")
        == child.calls.count("state_dict")
        == 1
    )


def test_commands_that_only_read_import_nothing_heavy():
    code = (
        "import sys; from compat.cli import main; main(['list']); heavy = "
        "{'torch', 'pytest', 'numpy', 'rich', 'jinja2'} "
        "& set(sys.modules); sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "siglip2-smollm2" in done.stdout and "Save Load Methods" in done.stdout


def test_help_names_the_exit_codes_and_shows_a_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--help"])
    said = capsys.readouterr().out
    assert (
        ended.value.code == 0
        and "exit codes:" in said
        and "  3  could not complete" in said
        and "compat run ../my-fork" in said
    )


def test_started_from_a_fork_s_folder_its_modules_do_not_stand_in_for_ours(here):
    (here / "rich.py").write_text("raise SystemExit('the fork was imported')")
    (here / "argparse.py").write_text("raise SystemExit('the fork was imported')")
    start = f"import sys, runpy; sys.path[0:0] = ['', {str(ROOT)!r}]; sys.argv = ['compat', 'list']; "
    code = start + "runpy.run_module('compat', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=here, timeout=60
    )
    assert done.returncode == 0 and "combos" in done.stdout, done.stderr


def direct(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(FOLDER), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )


def test_plain_pytest_collects_the_suites_for_each_combo(here):
    done = direct(
        "--target",
        "../fork",
        "--combo",
        "siglip-smollm2",
        "--combo",
        "siglip2-smollm2",
        "--collect-only",
        "-q",
        cwd=here,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_forward.py::test_loss_is_finite[siglip-smollm2]" in done.stdout
    assert "test_forward.py::test_loss_is_finite[siglip2-smollm2]" in done.stdout


def test_plain_pytest_is_told_of_an_unknown_combo_and_of_a_folder_without_a_model(here):
    done = direct("--combo", "dino", cwd=here)
    assert done.returncode == 4 and "no combo named 'dino'" in done.stderr
    done = direct("--target", "../fork", cwd=here)
    assert done.returncode == 3 and "holds no nanoVLM-style model" in done.stdout
