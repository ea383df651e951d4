"""The log: the documents' form, every human byte kept, and nothing a fork says can break it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compat.reports import log
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


def result(
    check: str, status: str = PASSED, message: str = "", test: str = "holds", combo="siglip2-smollm2"
) -> Result:
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
- **Run**: `.compat/runs/x.json`

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
    found = run(
        *(result(f"C{n}", status, "" if status == PASSED else "why") for n, status in enumerate(statuses))
    )
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
    found = run(
        result("Config Compatibility", FAILED, text), result("VRAM"), result("VRAM", SKIPPED, text, "t")
    )
    found.target = {"label": text, "commit": text, "dirty": False}
    found.environment = {"torch": text, "device": text, "python": text, "transformers": text, "gpu": text}
    found.incomplete = text
    entry = log.entry(found, text)
    assert len(entry) < 6000 and "49" not in entry.replace("{{ 7", "")
    allowed = (
        r"---|### Integration Test Run - 2025.*|- \*\*[A-Za-z ]+\*\*: .*|\*\*(Test Results|Skipped)\*\*.*:|"
        r"- [✅❌⚠️⏳]+ [A-Za-z ]+|  - Error: `[^`]*`|- VRAM, t: `[^`]*`|"
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
    assert added.lstrip(b"\r\n").startswith(b"---" + newline * 2 + "entry ✅".encode()) and added.endswith(
        newline
    )
    assert (before + added).replace(b"\r\n", b"\n").index(b"\n\n---\n") > 0


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / log.NAME
    script = (
        "import sys; from compat.reports.log import append\n"
        "for n in range(8): append(sys.argv[1], f'entry {sys.argv[2]}.{n}\\n')"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(path), str(n)], cwd=ROOT) for n in range(5)
    ]
    assert [worker.wait(60) for worker in workers] == [0] * 5
    entries = re.findall(r"entry \d\.\d", path.read_text(encoding="utf-8"))
    assert len(entries) == 40 == len(set(entries)) and os.listdir(tmp_path) == [log.NAME]


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
