"""Runs on disk: JSON both ways, whole files only, whatever the target said."""

from __future__ import annotations

import json
import math
import os

import pytest

from compat import store
from compat.result import (
    DETAIL_CHARS,
    ERROR,
    FAILED,
    MESSAGE_CHARS,
    PASSED,
    SKIPPED,
    NotARun,
    Result,
    Run,
    bounded,
)


def run(*statuses: str) -> Run:
    found = Run.begin({"label": "../fork", "commit": "a" * 40, "dirty": True}, "tiny", ["siglip2-smollm2"])
    found.results = [
        Result(f"Check {n}", "holds", status, "" if status == PASSED else "because", combo="siglip2-smollm2")
        for n, status in enumerate(statuses)
    ]
    return found


def test_a_run_comes_back_from_its_file_as_it_was(tmp_path):
    before = run(PASSED, FAILED, SKIPPED)
    before.environment = {"torch": "2.13.0", "gpu": None}
    before.notes = ["Grüße 🙂"]
    path = store.save(before, tmp_path)
    assert store.load(path) == before
    assert "Grüße 🙂" in path.read_text(encoding="utf-8")


def test_no_nan_reaches_the_json(tmp_path):
    found = run(PASSED)
    found.environment = {"a": math.nan, "b": [math.inf, -math.inf], "c": {1: 2.5}, "d": object}
    data = json.loads(store.dumps(found), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert data["environment"] == {"a": "nan", "b": ["inf", "-inf"], "c": {"1": 2.5}, "d": repr(object)}


def test_text_that_is_no_utf8_is_escaped_and_bounded(tmp_path):
    found = run()
    found.results = [Result("C", "t", FAILED, "x\ud800\n" * 5000, "\udfff" * 10**6)]
    loaded = store.load(store.save(found, tmp_path)).results[0]
    assert len(loaded.message) <= MESSAGE_CHARS and len(loaded.detail) <= DETAIL_CHARS
    assert "\\ud800" in loaded.message and "\n" not in loaded.message
    assert "characters left out" in loaded.detail


def test_what_was_cut_is_counted_and_the_end_can_be_kept():
    text = "a" * 500 + "the end"
    assert bounded(text, 600) == text
    assert bounded(text, 100).startswith("aaa") and len(bounded(text, 100)) == 100
    assert bounded(text, 100, tail=True).endswith("the end") and "characters left out" in bounded(
        text, 100, tail=True
    )


def test_ids_sort_by_time_and_are_unique():
    first, second = run(), run()
    assert first.id != second.id and first.id[:16] <= second.id[:16]
    assert first.started.endswith("+00:00")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    store.write_atomic(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_replacing_keeps_the_mode_and_follows_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    store.write_atomic(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new" and real.stat().st_mode & 0o777 == 0o640


def test_the_folder_of_runs_hides_itself_from_git(tmp_path):
    store.save(run(PASSED), tmp_path / ".compat" / "runs")
    assert (tmp_path / ".compat" / ".gitignore").read_text() == "*\n"
    assert len(store.all_runs(tmp_path / ".compat" / "runs")) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1}', "\xff"])
def test_a_file_that_is_no_run_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(NotARun, match="x.json"):
        store.load(path)


def test_a_malformed_result_is_refused(tmp_path):
    data = run(PASSED).as_json()
    data["results"][0]["status"] = "fine"
    with pytest.raises(NotARun, match="fine"):
        Run.from_json(data)


def test_a_result_that_did_not_pass_says_why():
    with pytest.raises(ValueError, match="skipped without a message"):
        Result("C", "t", SKIPPED, "  ")


@pytest.mark.parametrize(
    ("statuses", "incomplete", "code"),
    [
        ((PASSED, PASSED), "", 0),
        ((PASSED, SKIPPED), "", 0),
        ((PASSED, FAILED), "", 1),
        ((ERROR, FAILED), "", 1),
        ((PASSED, ERROR), "", 3),
        ((SKIPPED, SKIPPED), "", 3),
        ((), "", 3),
        ((PASSED,), "the run's time limit is spent", 3),
        ((FAILED,), "the run's time limit is spent", 1),
        ((FAILED,), "interrupted from the keyboard", 3),
    ],
)
def test_the_exit_code_never_mixes_failed_with_not_asked(statuses, incomplete, code):
    found = run(*statuses)
    found.incomplete = incomplete
    assert found.exit_code == code


def test_a_check_has_the_worst_status_of_its_tests():
    found = run()
    found.results = [
        Result("C", "a", PASSED),
        Result("C", "b", SKIPPED, "no"),
        Result("C", "c", FAILED, "bad"),
        Result("D", "a", SKIPPED, "no"),
        Result("C", "a", PASSED, combo="other"),
    ]
    checks = found.checks()
    assert [(c.title, c.combo, c.status) for c in checks] == [
        ("C", "", FAILED),
        ("D", "", SKIPPED),
        ("C", "other", PASSED),
    ]
    assert checks[0].first_message == "bad" and checks[2].first_message == ""
