"""GitHub Actions: one command an item, at most ten of a level; and nobody else gives orders to the runner."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from compat import actions, cli, process
from compat.reports import annotations, machine
from tests.house.tree import ROOT
from tests.judge.fake_child import FakeChild
from tests.report.machines import gate
from tests.report.made import HOSTILE, made


def runner(text: str) -> list[str]:
    """What GitHub's runner would obey in a step's output: its rules for ``::``, ``##[`` and stop-commands."""
    obeyed, token = [], ""
    for line in text.split("\n"):
        line = line.strip()
        if token:
            token = "" if line == f"::{token}::" else token
        elif match := re.fullmatch(r"::stop-commands::(.+)", line):
            token = match[1]
        elif re.match(r"::\w[\w-]*[^:]*::", line) or "##[" in line:
            obeyed.append(line)
    assert not token, "commands were stopped and never allowed again"
    return obeyed


def script(code: str, tmp_path: Path, **streams) -> subprocess.CompletedProcess:
    """Runs in a step of GitHub Actions."""
    around = {"GITHUB_ACTIONS": "true", "PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | streams
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=around, text=True, timeout=60, **given)


LOUD = """
import os, sys
from compat.actions import commands_stopped, say
with commands_stopped({data}):
    print("::error::out"); print("  ::set-env name=PATH::x", file=sys.stderr); print("text ##[error]x")
    os.write(2, b"::add-path::fd\\n")
    sys.stdout.write("::notice::no end of line")
say(["::error title=a::b"], {data})
"""


def test_what_is_printed_inside_gives_no_orders_and_ours_are_obeyed(tmp_path):
    done = script(LOUD.format(data=False), tmp_path)
    assert runner(done.stdout) == ["::error title=a::b"]
    assert "::error::out" in done.stdout and "::add-path::fd" in done.stdout, "it is shown, and only not obeyed"


def test_two_pipes_are_one_meanwhile(tmp_path):
    done = script(LOUD.format(data=False), tmp_path, stderr=subprocess.PIPE)
    assert done.stderr == "" and runner(done.stdout) == ["::error title=a::b"]


def test_data_on_stdout_is_left_alone(tmp_path):
    with open(tmp_path / "out.json", "w+") as file:
        done = script(LOUD.format(data=False), tmp_path, stdout=file, stderr=subprocess.PIPE)
        file.seek(0)
        assert "stop-commands" not in file.read()
    assert runner(done.stderr) == ["::error title=a::b"]
    done = script(LOUD.format(data=True), tmp_path, stderr=subprocess.PIPE)
    assert "stop-commands" not in done.stdout and runner(done.stderr) == ["::error title=a::b"]


def test_the_word_is_another_each_time(tmp_path):
    words = {re.search(r"stop-commands::(\w+)", script(LOUD.format(data=False), tmp_path).stdout)[1] for _ in range(2)}
    assert len(words) == 2 and all(len(word) == 32 for word in words)


def test_commands_are_allowed_again_after_an_exception(tmp_path):
    done = script("from compat.actions import commands_stopped\nwith commands_stopped(): raise SystemExit(3)", tmp_path)
    assert done.returncode == 3 and runner(done.stdout) == []


def test_elsewhere_nothing_is_printed(capfd, monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    with actions.commands_stopped():
        print("::error::x")
    assert capfd.readouterr().out == "::error::x\n"


def test_the_command_line_guards_every_command(tmp_path):
    code = "import sys\nfrom compat import cli\nsys.exit(cli.main(['explain', '::error::no\\n::error::such']))"
    done = script(code, tmp_path)
    assert done.returncode == 2 and "no rule named" in done.stdout and runner(done.stdout) == []


def test_an_annotation_names_file_line_rule_and_fix(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vision_language_model.py").write_text("x")
    run = made()
    run.target["folder"] = str(tmp_path)
    items = machine.of_gate(gate())
    told = annotations.lines(items, run, tmp_path)
    [failing] = [line for line in told if "SUITE.save_load" in line]
    assert failing.startswith("::error file=models/vision_language_model.py,line=2,title=SUITE.save_load ")
    [renamed] = [line for line in told if "LOAD.key_renamed state" in line]
    assert "q_proj.weight -> query.weight [siglip2-smollm2] | fix: " in renamed
    assert not [line for line in told if "COST.flops" in line], "what is waived is no annotation"
    assert [line for line in told if line.startswith("::error title=GATE.policy")], "the file is not in this checkout"
    assert "::error file=compat/rules.toml,line=1,title=GATE.policy" in "".join(annotations.lines(items, run, ROOT))


@pytest.mark.parametrize("text", [HOSTILE, "a\r\n::set-output name=x::y", "100%0A::error::x", "::error::x"])
def test_hostile_text_is_one_command(tmp_path, text):
    run = made(failed={"Backward Pass": text})
    run.target["folder"] = str(tmp_path)
    told = annotations.lines(machine.of_run(run), run, tmp_path)
    assert len(told) == 1 and len(told[0].splitlines()) == 1
    assert runner("\n".join(told)) == told
    head, _, data = told[0].partition("::")[2].partition("::")
    assert head.startswith("error title=") and "%0A::" not in data.replace("%250A", "")


def test_more_than_ten_of_a_level_are_counted():
    items = [machine.Item("SUITE.config", "error", f"no {number}") for number in range(25)]
    told = annotations.lines(items, None, Path())
    assert len(told) == 10 and "and 16 more" in told[-1]
    assert len(annotations.lines(items[:10], None, Path())) == 10


def test_the_summary_is_appended_and_bounded(tmp_path, monkeypatch):
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    annotations.append_summary("### one")
    assert page.read_text() == "before\n### one\n\n"
    annotations.append_summary("é\n" * 2**19)
    assert page.stat().st_size <= annotations.SUMMARY_BYTES and page.read_text().endswith(annotations.CUT)
    size = page.stat().st_size
    annotations.append_summary("x\n" * 2**19)
    assert page.stat().st_size <= annotations.SUMMARY_BYTES and page.read_text().startswith("before\n")
    assert page.stat().st_size >= size


def test_a_run_in_a_step_tells_of_the_failure_and_the_target_tells_the_runner_nothing(tmp_path, monkeypatch, capsys):
    orders = "::error::owned\n##[error]owned\n::set-env name=PATH::x"

    def raise_(reply, parameters):
        raise process.TargetRaised("ValueError", orders, "models/vlm.py:7")

    child = FakeChild(changes={"save_load": raise_})
    child.output = orders
    monkeypatch.setattr(process, "Child", lambda target, **options: child)
    (tmp_path / "fork").mkdir()
    page = tmp_path / "summary.md"
    for name, value in (("GITHUB_ACTIONS", "true"), ("GITHUB_STEP_SUMMARY", page), ("GITHUB_WORKSPACE", tmp_path)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "fork", "--no-log", "--verbose"]) == 1
    said = capsys.readouterr()
    obeyed = runner(said.out)
    assert obeyed and all(re.match(r"::error title=SUITE\.\w+ [\w ]+::.+: ValueError: ", line) for line in obeyed)
    assert runner(said.out.replace("stop-commands", "x")) != obeyed, "the target's orders were on the screen"
    told = page.read_text()
    assert told.startswith("### ❌ compat run: failed") and "`ValueError: ::error::owned" in told
