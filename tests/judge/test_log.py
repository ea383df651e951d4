"""The log: the documents' form, every human byte kept, and nothing a fork says can break it."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compat import store
from compat.reports import entries, log
from compat.reports.text import code, one_line, printable, word
from compat.result import ERROR, FAILED, PASSED, SKIPPED, Result, Run

ROOT = Path(__file__).parents[2]


def run(*results: Result, combos=("siglip2-smollm2",)) -> Run:
    found = Run(
        "20251121T030346Z-9f3c1a",
        "2025-11-21T03:03:46+00:00",
        {"label": "../fork", "commit": "1234567890abcdef", "dirty": True},
        "tiny",
        list(combos),
    )
    found.environment = {
        "python": "3.11.9",
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
        "device": "cpu",
        "gpu": None,
    }
    found.results = list(results)
    return found


def result(check: str, status: str = PASSED, message: str = "", test: str = "holds", combo="siglip2-smollm2") -> Result:
    return Result(check, test, status, message, combo=combo)


def test_an_entry_has_the_form_people_know():
    found = run(
        result("Config Compatibility"),
        result("Generate Method", FAILED, "ValueError: not enough values to unpack (expected 5, got 4)"),
        result("Edge Cases"),
        result(
            "Edge Cases",
            SKIPPED,
            "this layout takes exactly one picture a row",
            "several pictures keep their order",
        ),
        result("Data Pipeline", SKIPPED, "the target has no data set"),
        result("VRAM", ERROR, "KeyError: 'peak'"),
    )
    assert (
        log.entry(found, ".compat/runs/x.json")
        == """\
---

### Integration Test Run - 2025-11-21 03:03:46 UTC
- **Device**: cpu
- **PyTorch**: 2.13.0+cpu
- **Status**: ⚠️ 2/4 Passed, 1 Skipped
- **Combo**: siglip2-smollm2 (tiny)
- **Target**: `../fork`
- **Git Commit**: `1234567890ab` (dirty)
- **Python**: 3.11.9
- **Transformers**: 5.23.0
- **GPU**: none
- **Run**: [`.compat/runs/x.json`](.compat/runs/x.json)

**Test Results**:
- ✅ Config Compatibility
- ❌ Generate Method
  - Error: `ValueError: not enough values to unpack (expected 5, got 4)`
- ✅ Edge Cases
- ⏳ Data Pipeline
  - Skipped: `the target has no data set`
- ⚠️ VRAM
  - Harness error: `KeyError: 'peak'`

**Skipped** (1):
- Edge Cases, several pictures keep their order: `this layout takes exactly one picture a row`
"""
    )


@pytest.mark.parametrize(
    ("statuses", "incomplete", "line"),
    [
        ((PASSED, PASSED), "", "✅ All Passed"),
        ((PASSED, SKIPPED), "", "✅ All Passed, 1 Skipped"),
        ((PASSED, FAILED), "", "⚠️ 1/2 Passed"),
        ((PASSED,), "interrupted from the keyboard", "⚠️ 1/1 Passed"),
        ((SKIPPED,), "", "⏳ Pending, 1 Skipped"),
    ],
)
def test_the_status_line_counts_checks(statuses, incomplete, line):
    found = run(*(result(f"C{n}", status, "" if status == PASSED else "why") for n, status in enumerate(statuses)))
    found.incomplete = incomplete
    assert f"- **Status**: {line}\n" in log.entry(found, "x")


def test_several_combos_have_a_list_each():
    found = run(
        result("Config Compatibility"),
        result("Config Compatibility", FAILED, "no", combo="siglip-smollm2"),
        combos=("siglip2-smollm2", "siglip-smollm2"),
    )
    text = log.entry(found, "x")
    assert "**Test Results** (siglip2-smollm2):\n- ✅ Config Compatibility\n" in text
    assert "**Test Results** (siglip-smollm2):\n- ❌ Config Compatibility\n  - Error: `no`\n" in text


def test_facts_the_child_never_told_are_unknown_and_a_folder_without_git_has_no_commit():
    found = run(result("Config Compatibility"))
    found.environment, found.target = {}, {"label": "fork"}
    text = log.entry(found, "x")
    assert "- **PyTorch**: unknown\n" in text and "- **Git Commit**: none\n" in text


HOSTILE = [
    "```\n---\n### Integration Test Run - 1999-01-01 00:00:00\n- **Status**: ✅ All Passed",
    "` closes the span **bold** <script>alert(1)</script> | a | table |",
    "\x1b[31mred\x1b[0m \x1b]8;;http://evil\x07link\x1b]8;;\x07 \x1b[2J \x9b31m",
    "\u202eesrever\u2066 \u200bzero\ufeff width",
    "nul \x00 bell \x07 backspace \x08 return \r line \u2028 separator \u2029",
    "lone \ud800 surrogate",
    "x" * 2**20,
    "` " * 2**19,
    "{{ 7 * 7 }} {% raw %}",
    "\n\n---\n\n",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_inside_one_code_span(text):
    found = run(result("Config Compatibility", FAILED, text), result("VRAM"), result("VRAM", SKIPPED, text, "t"))
    found.target = {"label": text, "commit": text, "dirty": False}
    found.environment = {"torch": text, "device": text, "python": text, "transformers": text, "gpu": text}
    found.incomplete = text
    entry = log.entry(found, text)
    assert len(entry) < 6000 and "49" not in entry.replace("{{ 7", "")
    allowed = (
        r"---|### Integration Test Run - 2025.*|- \*\*[A-Za-z ]+\*\*: .*|\*\*(Test Results|Skipped)\*\*.*:|"
        r"- [✅❌⚠️⏳]+ [A-Za-z ]+|  - Error: `[^`]*`|- VRAM, t: `[^`]*`|"  # and the blank line
    )
    for line in entry.split("\n"):
        assert re.fullmatch(allowed, line), line
        assert line.count("`") % 2 == 0
        assert not set("<>|[]{}*#!\\") & set(re.sub(r"`[^`]*`|\*\*[A-Za-z ]+\*\*|^### ", "", line)), line
    assert all(c == "\n" or c.isprintable() or c == "\ufe0f" for c in entry)
    assert entry.count("\n### ") == 1
    entry.encode("utf-8")


def test_cleaning_keeps_ordinary_text():
    assert printable("Grüße\n\t🙂 日本") == "Grüße\n\t🙂 日本"
    assert one_line("a  b\nc") == "a b c" and one_line("abcdef", 4) == "abc…"
    assert (
        code("`") == "`'`"
        and code(" ") == "`(no text)`"
        and word("2.13.0+cpu") == "2.13.0+cpu"
        and word("a|b") == "a?b"
    )


def test_a_new_log_gets_a_short_header_once(tmp_path):
    path = tmp_path / log.NAME
    log.append(path, "---\n\nfirst\n")
    log.append(path, "---\n\nsecond\n")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Modifications Log\n") and text.count("# Modifications Log") == 1
    assert text.index("first") < text.index("second") and os.listdir(tmp_path) == [log.NAME]


@pytest.mark.parametrize(
    "before",
    [
        "# My log\n\nğŸ“‹ mojibake stays\n".encode(),
        b"no newline at the end",
        b"\xff\xfe not utf-8 \x80\n",
        b"dos\r\nlines\r\n",
        b"```\nan open fence",
    ],
)
def test_existing_bytes_are_kept_and_the_entry_stands_apart(tmp_path, before):
    path = tmp_path / log.NAME
    path.write_bytes(before)
    log.append(path, "---\n\nentry ✅\n")
    after = path.read_bytes()
    assert after.startswith(before)
    added = after[len(before) :]
    newline = b"\r\n" if b"\r\n" in before else b"\n"
    assert added.lstrip(b"\r\n").startswith(b"---" + newline * 2 + "entry ✅".encode()) and added.endswith(newline)
    assert (before + added).replace(b"\r\n", b"\n").index(b"\n\n---\n") > 0


CROWD = """
import os, sys, time
from compat import store
from compat import store
from compat.reports import entries, log
from compat.result import PASSED, Result, Run
number, path = int(sys.argv[1]), sys.argv[2]
workers = []
for worker in range(number):  # forked, so that fifty interpreters need not start
    child = os.fork()
    if not child:
        for turn in range(2):
            run = Run.begin({"label": "."}, "tiny", ["siglip2-smollm2"])
            run.results = [Result(f"Check {worker}.{turn}", "holds", PASSED, combo="siglip2-smollm2")]
            log.record(path, run)
        os._exit(0)
    workers.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in workers))
"""


@pytest.mark.parametrize("number", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_processes_that_log_at_once_lose_nothing(tmp_path, number):
    path = tmp_path / log.NAME
    ask = [sys.executable, "-c", CROWD, str(number), log.NAME]
    done = subprocess.run(ask, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = path.read_text(encoding="utf-8")
    logged = re.findall(r"^- ✅ (Check \d+\.\d)$", text, re.MULTILINE)
    assert sorted(logged) == sorted(f"Check {worker}.{turn}" for worker in range(number) for turn in range(2))
    assert text.count("\n### Integration Test Run") == 2 * number == len(store.all_runs(tmp_path / ".compat" / "runs"))
    assert {found.id for found in entries.parse(text)} == {
        p.stem for p in store.all_runs(tmp_path / ".compat" / "runs")
    }
    assert sorted(os.listdir(tmp_path)) == [".compat", log.NAME]


VICTIM = """
import sys
from compat.reports.log import append
print("begun", flush=True)
for turn in range(10**6):
    append(sys.argv[1], f"---\\n\\nentry {turn} begins\\n" + "x" * 5000 + f"\\nentry {turn} ends\\n")
"""


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_a_whole_file(tmp_path):
    path = tmp_path / log.NAME
    seen, delays = 0, random.Random(0)
    for _ in range(25):
        victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert victim.stdout.readline() == b"begun\n"
        time.sleep(delays.uniform(0.001, 0.06))
        victim.kill()
        victim.wait()
        victim.stdout.close()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        begun, ended = (re.findall(rf"^entry (\d+) {word}$", text, re.MULTILINE) for word in ("begins", "ends"))
        assert begun == ended and len(begun) >= seen and (not text or text.endswith(" ends\n"))
        seen = len(begun)
    assert seen > 25
    log.append(path, "the lock is free\n")  # a dead holder holds nothing


def test_without_fcntl_a_lock_file_serves_and_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "fcntl", None)
    monkeypatch.setattr(log, "LOCK_S", 0.1)
    path = tmp_path / log.NAME
    log.append(path, "entry\n")
    assert os.listdir(tmp_path) == [log.NAME]
    (tmp_path / f".{log.NAME}.lock").touch()
    with pytest.raises(log.LogNotWritten, match="remove it if no run is going on"):
        log.append(path, "another\n")
    assert "another" not in path.read_text()


def test_a_held_lock_is_waited_for_and_then_named(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="this system has no fcntl")
    monkeypatch.setattr(log, "LOCK_S", 0.1)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(log.LogNotWritten, match="another process holds the lock"):
        log.append(tmp_path / log.NAME, "entry\n")
    os.close(handle)


@pytest.mark.parametrize("place", ["no/such/folder/LOG.md", "a_folder"])
def test_a_log_that_cannot_be_written_is_said_by_name(tmp_path, place):
    (tmp_path / "a_folder").mkdir()
    with pytest.raises(log.LogNotWritten, match=Path(place).parts[0]):
        log.append(tmp_path / place, "entry\n")


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / log.NAME
    path.write_text("mine\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(log.LogNotWritten, match="No space left"):
        log.append(path, "entry\n")
    assert path.read_text() == "mine\n" and os.listdir(tmp_path) == [log.NAME]


def test_a_log_that_cannot_be_written_keeps_the_entry_in_the_run(tmp_path, monkeypatch):
    """A read-only log, then a full disk; `compat log sync` adds the entries, once."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / log.NAME
    path.write_text("mine\n")
    runs = [run(result("VRAM")), run(result("Edge Cases"))]
    runs[1].id = "20251121T040000Z-000001"
    real = log.write_atomic
    for found, why in zip(runs, ("is read-only", "No space left"), strict=True):
        found.target["label"] = "."

        def refuse(*_, why=why):
            raise OSError(28, why)

        monkeypatch.setattr(log, "write_atomic", refuse)
        with pytest.raises(
            log.LogNotWritten, match=f"{why}.*is kept in .compat/runs/{found.id}.json, and compat log sync"
        ):
            log.record(path, found)
        assert path.read_text() == "mine\n"
        kept = store.load(store.path_of(found)).log
        assert why in kept["error"] and kept["entry"].startswith("---\n\n### Integration Test Run")
    monkeypatch.setattr(log, "write_atomic", real)
    assert log.sync(path) == [found.id for found in runs] and log.sync(path) == []
    assert (
        path.read_text(encoding="utf-8").startswith("mine\n")
        and len(entries.parse(path.read_text(encoding="utf-8"))) == 2
    )


def test_a_read_only_log_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / log.NAME
    path.write_text("mine\n")
    monkeypatch.setattr(os, "access", lambda where, mode: False)  # root may write whatever the mode says
    with pytest.raises(log.LogNotWritten, match="is read-only"):
        log.append(path, "entry\n")
    assert path.read_text() == "mine\n"
