"""`compat doctor`: what is needed against what is only absent, how to get it, and at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections import namedtuple

import pytest

from compat import cli, doctor, process
from tests.house.tree import ROOT


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with everything; tests take things away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMPAT_SANDBOX", raising=False)
    versions = {**doctor.TARGET_NEEDS, **doctor.TARGET_USES, **doctor.JUDGE_NEEDS}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "available_bytes", lambda: 64 << 30)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10**12))
    monkeypatch.setattr(doctor, "_said", lambda command: "NVIDIA H100, 81559 MiB")
    monkeypatch.setattr(process, "sandbox", lambda: ("bwrap",))
    return versions


def by_name(**options) -> dict[str, doctor.Answer]:
    return {answer.name: answer for answer in doctor.examine(**options)}


def test_a_machine_with_everything_is_fine(machine):
    answers = doctor.examine()
    assert all(answer.ok for answer in answers) and doctor.exit_code(answers) == 0
    wanted = {"python", "torch", "transformers", "git", "bubblewrap", "chromium", "c++ compiler", "gpu", "disk",
              "memory", "cache folder", "run folder"}  # fmt: skip
    assert wanted <= {answer.name for answer in answers}


@pytest.mark.parametrize(
    ("name", "take", "needed"),
    [
        ("torch", lambda m, v: v.pop("torch"), True),
        ("torch", lambda m, v: v.update(torch="2.8.1+cu128"), True),
        ("pytest", lambda m, v: v.pop("pytest"), True),
        ("transformers", lambda m, v: v.pop("transformers"), False),
        ("git", lambda m, v: m.setattr(doctor, "_said", lambda command: None), False),
        ("gpu", lambda m, v: m.setattr(doctor, "_said", lambda command: None), False),
        ("gpu", lambda m, v: v.update(torch="2.13.0+cpu"), False),
        ("bubblewrap", lambda m, v: m.setattr(process, "sandbox", lambda: ()), False),
        ("chromium", lambda m, v: m.setattr(doctor.shutil, "which", lambda name: None), False),
        ("c++ compiler", lambda m, v: m.setattr(doctor.shutil, "which", lambda name: None), False),
        ("memory", lambda m, v: m.setattr(doctor, "available_bytes", lambda: 1 << 30), True),
        ("disk", lambda m, v: m.setattr(doctor.shutil, "disk_usage", lambda p: namedtuple("u", "free")(10**8)), True),
        ("python", lambda m, v: m.setattr(doctor, "PYTHON", (9, 9)), True),
    ],
)
def test_what_is_missing_is_told_with_the_way_to_get_it(machine, monkeypatch, name, take, needed):
    take(monkeypatch, machine)
    answer = by_name()[name]
    assert not answer.ok and answer.needed is needed and answer.get
    assert answer.word == ("MISSING" if needed else "absent")
    assert doctor.exit_code([answer]) == int(needed)


def test_a_folder_that_cannot_be_written_to_is_found_by_trying(machine, monkeypatch, tmp_path):
    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    answer = by_name()["cache folder"]
    assert not answer.ok and "Read-only file system" in answer.found and "COMPAT_CACHE" in answer.get


def test_looking_leaves_nothing_behind(machine, tmp_path):
    by_name()
    assert not list(tmp_path.iterdir())


def test_another_interpreter_is_asked_for_what_runs_in_it(machine, monkeypatch):
    told = json.dumps([[3, 9, 2], {"torch": "2.13.0", "numpy": None, "transformers": "4.40.0"}])
    monkeypatch.setattr(doctor, "_said", lambda command: told if "-c" in command else "git version 2")
    found = by_name(python="fork/bin/python")
    assert found["target's python"].ok and found["target's torch"].ok and "torch" not in found
    assert not found["target's numpy"].ok and found["target's numpy"].get.startswith("fork/bin/python -m pip install ")
    assert found["target's transformers"].found == "4.40.0, older than 4.57.0"
    monkeypatch.setattr(doctor, "_said", lambda command: None)
    assert by_name(python="no/python")["target's python"].found == "no/python does not run"


def test_its_lower_bounds_are_those_of_the_project():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(line.split(">=") for line in declared["dependencies"])
    for name, least in {**doctor.TARGET_NEEDS, **doctor.TARGET_USES, **doctor.JUDGE_NEEDS}.items():
        assert bounds[name].partition(" ")[0] == least, name
    assert declared["requires-python"] == f">={'.'.join(map(str, doctor.PYTHON))}"


@pytest.mark.parametrize(
    ("version", "wanted"), [("2.13.0+cpu", (2, 13, 0)), ("2.9", (2, 9)), ("3.0.0rc1", (3, 0, 0)), ("odd", ())]
)
def test_a_version_is_compared_by_its_numbers(version, wanted):
    assert doctor.numbers(version) == wanted


def test_the_command_answers_for_this_machine_without_importing_torch(tmp_path):
    code = (
        "import sys\nfrom compat import cli\ncode = cli.main(['doctor'])\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    around = os.environ | {"PYTHONPATH": str(ROOT), "COMPAT_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=around, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.strip() == "[]"
    rows = re.findall(r"^(ok|MISSING|absent) +(\S.*?)  ", done.stdout, re.MULTILINE)
    assert {"python", "torch", "disk"} <= {name for _, name in rows}
    assert done.returncode == int("MISSING" in [word for word, _ in rows])
    assert ("missing: " in done.stdout) == (done.returncode == 1)


def test_a_json_file_that_cannot_be_written_is_an_error(capsys):
    assert cli.main(["doctor", "--json", "no/such/x.json"]) == 3 and "no folder no/such" in capsys.readouterr().err
