"""An older log: read into run records, put right, and checked against them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compat import cli, store
from compat.reports import entries, log, marks
from compat.reports.history import History
from compat.reports.importing import check, import_log
from compat.reports.repair import repair
from compat.result import FAILED, PASSED, SKIPPED
from tests.report.garbled import LEFT, WHOLE, damaged
from tests.report.made import HOSTILE, made

REAL = next(
    (path for parent in Path(__file__).parents
     if (path := parent / "shared" / "background" / "fork-modifications-log.md").exists()), None
)  # fmt: skip
PAGES = [(page, lost) for page in ("cp1254", "cp1252") for lost in ("", "\ufffd")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "lost"), [("utf-8", ""), *PAGES, ("latin-1", ""), ("mac_roman", "")])
def test_a_log_is_read_with_its_times_statuses_and_errors(here, page, lost):
    (here / "OLD.md").write_text(WHOLE if page == "utf-8" else damaged(page, lost), encoding="utf-8")
    found = import_log(here / "OLD.md")
    assert [run.started for run in found.new] == [
        "2025-10-02T00:00:00+00:00", "2025-10-02T09:10:11+00:00", "2025-10-02T10:00:00+00:00",
    ]  # fmt: skip
    assert [log.status_line(run) for run in found.new] == ["⏳ Pending, 2 Skipped", "⚠️ 1/3 Passed", "✅ All Passed"]
    assert [[r.status for r in run.results] for run in found.new] == [
        [SKIPPED] * 2, [PASSED, FAILED, FAILED], [PASSED] * 3,
    ]  # fmt: skip
    pending, failed, passed = found.new
    assert [r.message for r in pending.results] == ["Not yet tested"] * 2 and found.pending == 1
    assert failed.results[1].message.startswith("RuntimeError: shape '[2, 3]'")
    assert failed.results[2].message == "failed; the log says no more"
    assert failed.environment == {"device": "cuda", "torch": "2.8.0+cu128"} and failed.source == "OLD.md:32"
    assert "no time zone" in passed.notes[0] and "the day alone" in pending.notes[0]
    assert History.read().runs == found.new  # saved, and in order


def test_reading_twice_makes_no_second_record(here, capsys):
    (here / "OLD.md").write_text(damaged(), encoding="utf-8")
    assert cli.main(["log", "import", "OLD.md"]) == 0
    assert "OLD.md: 3 runs read, 1 of them pending\n" in capsys.readouterr().out
    assert cli.main(["log", "repair", "OLD.md"]) == 0
    capsys.readouterr()
    assert cli.main(["log", "import", "OLD.md"]) == 0
    assert "0 runs read, 0 of them pending, 3 known already" in capsys.readouterr().out
    assert len(store.all_runs()) == 3


def test_an_entry_of_our_own_comes_back_as_the_run_that_wrote_it(here):
    run = made(3, ("siglip2-smollm2", "dinov2-smollm2"), {"VRAM": "too `much`"}, {"Data Pipeline": "no data set"})
    store.save(run)
    log.record(here / log.NAME, run)
    store.path_of(run).unlink()
    [again] = import_log(here / log.NAME).new
    assert (again.id, again.started, again.combos, again.scale) == (run.id, run.started, run.combos, run.scale)
    assert [(c.combo, c.title, c.status) for c in again.checks()] == [
        (c.combo, c.title, c.status) for c in run.checks()
    ]
    assert (
        again.environment["torch"] == run.environment["torch"] and again.target["commit"] == run.target["commit"][:12]
    )


@pytest.mark.parametrize(
    "text", ["", "# nothing here\n", "### Integration Test Run - 2025-13-41 99:00:00\n- **Status**: x\n"]
)
def test_a_file_without_entries_says_so(here, capsys, text):
    (here / "OLD.md").write_text(text)
    assert cli.main(["log", "import", "OLD.md"]) == 3
    assert "OLD.md holds no entry of a run" in capsys.readouterr().err
    assert cli.main(["log", "import", "NONE.md"]) == 2
    assert "there is no file NONE.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    "noise", [HOSTILE, "\n".join(["### Integration Test Run - x"] * 3), "- ✅ a\n  - Error: `" + "x" * 10**6]
)
def test_noise_in_a_log_makes_no_run_and_no_crash(noise):
    text = noise.encode("utf-8", "replace").decode() + "\n" + WHOLE
    assert len(entries.parse(text)) >= 3


# -- repair ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "lost"), PAGES)
def test_marks_and_heading_emoji_come_back_and_nothing_else_changes(page, lost):
    before = damaged(page, lost)
    found = repair(before.encode())
    after = found.data.decode().split("\n")
    changed = {line for line, *_ in found.changes}
    for number, (old, new, whole) in enumerate(zip(before.split("\n"), after, WHOLE.split("\n"), strict=True), 1):
        assert new == (whole if number in changed else old)
    # All that was garbled outside code is right again.
    assert [
        line for line, whole in zip(after, WHOLE.split("\n"), strict=True) if line != whole and whole not in LEFT
    ] == []
    told = {emoji: how for _, _, emoji, how in found.changes}
    assert told["🔍"] == told["📝"] == "a byte is lost; from the heading's words"  # 0x8D and 0x9D have no character
    assert told["📞"] == ("exact" if page == "cp1252" else told["📝"]) and told["❌"] == told["⏳"] == "exact"


def test_what_cannot_be_proved_is_listed_and_stays():
    rest = marks.garbled("📝", "cp1254", "")
    text = f"## {rest} Miscellany\n\nGrÃ¼Ã\x9fe and GrÃ¼n\n\na lost \ufffd one\n\n- ✅ right already\n"
    data = text.encode() + b"no \xff utf-8\n"
    found = repair(data)
    assert found.data == data and found.changes == []
    told = {line: why for line, _, why in found.unproved}
    assert "a byte is lost; it could be" in told[1] and "📝" in told[1] and "📞" in told[1]
    assert (
        "is no status mark or heading" in told[3]
        and "a character is lost" in told[5]
        and "a character is lost" in told[8]
    )


def test_whole_and_foreign_text_is_left_alone():
    for text in (WHOLE, "Ελληνικά, âge, côté, naïve, Ğ\n## Überschrift\n- ça va\n", ""):
        found = repair(text.encode())
        assert found.data == text.encode() and found.changes == []


def test_crlf_and_missing_newlines_stay(here):
    data = damaged().replace("\n", "\r\n").rstrip().encode()
    found = repair(data)
    assert found.data.decode().replace("\r\n", "\n").rstrip().endswith("- ✅ Backward Pass") and found.changes
    assert found.data.count(b"\r\n") == data.count(b"\r\n")


def test_the_command_says_what_it_did_and_a_dry_run_does_nothing(here, capsys):
    (here / "OLD.md").write_text(damaged(), encoding="utf-8")
    assert cli.main(["log", "repair", "-n", "OLD.md"]) == 0
    would = capsys.readouterr().out
    assert (here / "OLD.md").read_text(encoding="utf-8") == damaged() and "marks would change" in would
    assert cli.main(["log", "repair", "OLD.md"]) == 0
    did = capsys.readouterr().out
    assert did == would.replace("would change", "changed")
    assert "âš ï¸ -> ⚠️  (exact)\n" in did
    assert cli.main(["log", "repair", "OLD.md"]) == 0
    assert "0 marks changed" in capsys.readouterr().out


def test_no_garbled_form_stands_for_two_marks():
    forms = {}
    for mark in marks.MARK.values():
        for page in marks.CODE_PAGES:
            for lost in marks.LOST:
                forms.setdefault(marks.garbled(mark, page, lost), set()).add(mark)
    for form, whose in forms.items():
        assert len(whose) == 1 or form not in marks.GARBLED
        if len(whose) == 1 and not form.isascii():
            assert marks.GARBLED[form] in whose


# -- check ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(here):
    for number in range(2):
        run = made(number, failed={"VRAM": "it takes 3.2 MB"})
        store.save(run)
        log.record(here / log.NAME, run)
    return here / log.NAME


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("- ❌ VRAM\n  - Error: `it takes 3.2 MB`", "- ✅ VRAM", "(siglip2-smollm2) passed in the log, failed in run"),
        ("it takes 3.2 MB`\n\n**Cost", "it takes 1 MB`\n\n**Cost", "'it takes 1 MB' in the log, 'it takes 3.2 MB' in"),
        ("- ✅ Edge Cases\n", "", "Edge Cases (siglip2-smollm2) is in run"),
        ("**PyTorch**: 2.13.0+cpu", "**PyTorch**: 2.9.0", "torch is 2.9.0 in the log, 2.13.0+cpu in run"),
        ("08:00:00 UTC\n", "08:30:00 UTC\n", "time is 2026-09-01T08:30:00+00:00 in the log, 2026-09-01T08:00:00+00:00"),
        ("⚠️ 12/13 Passed", "✅ All Passed", "the status says ✅ All Passed, the list below it 12/13 passed"),
        ("# Modifications Log", "<<<<<<< HEAD\n# Modifications Log", "a merge left <<<<<<< behind"),
        ("- [ ] Long sequence", "- [x] Long sequence", "the section coverage is not what the runs say"),
        ("<!-- /compat:issues -->\n", "", "markers do not pair up"),
    ],
)  # fmt: skip
def test_what_contradicts_the_records_is_said_with_both_values(kept, capsys, old, new, said):
    assert cli.main(["log", "check"]) == 0
    assert "2 entries, 0 contradictions" in capsys.readouterr().out
    before = kept.read_text(encoding="utf-8")
    assert old in before
    kept.write_text(before.replace(old, new, 1), encoding="utf-8")
    assert cli.main(["log", "check"]) == 1
    out = capsys.readouterr().out
    assert said in out and re.search(r"^MODIFICATIONS_LOG\.md:\d+: ", out)


def test_a_missing_and_a_doubled_entry_are_said_and_an_unknown_one_is_counted(kept):
    text = kept.read_text(encoding="utf-8")
    first, second = (at.start() for at in re.finditer("---\n\n### Integration", text))
    kept.write_text(text[:second], encoding="utf-8")
    assert [words for line, words in check(kept).wrong if "was to be logged here" in words]
    kept.write_text(text + "\n" + text[second:], encoding="utf-8")
    assert ["stands here again" in words for _, words in check(kept).wrong] == [True]
    kept.write_text(text, encoding="utf-8")
    store.all_runs()[0].unlink()
    found = check(kept)
    assert found.wrong == [] and found.unknown == [text[: first + 5].count("\n") + 1]


def test_an_imported_log_agrees_with_its_records(here, capsys):
    (here / "OLD.md").write_text(damaged(), encoding="utf-8")
    import_log(here / "OLD.md")
    assert cli.main(["log", "check", "OLD.md"]) == 0
    text = (here / "OLD.md").read_text(encoding="utf-8")
    (here / "OLD.md").write_text(text.replace("2.8.0+cu128", "2.7.0", 1), encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["log", "check", "OLD.md"]) == 0  # another entry now, one without a record
    assert "1 of 3 entries have no record here" in capsys.readouterr().out


# -- sync -----------------------------------------------------------------------------------------------------


def test_sync_adds_what_is_missing_once_and_in_order(here, capsys):
    for number in range(3):
        run = made(number)
        run.log = {"path": log.NAME, "entry": log.entry(run, f".compat/runs/{run.id}.json"), "error": "disk full"}
        store.save(run)
    store.save(made(9))  # was not to be logged
    elsewhere = made(10)
    elsewhere.log = {"path": "OTHER.md", "entry": "x", "error": ""}
    store.save(elsewhere)
    log.append(here / log.NAME, History.read().runs[1].log["entry"])
    assert cli.main(["log", "sync"]) == 0
    assert "2 entries added" in capsys.readouterr().out
    text = (here / log.NAME).read_text(encoding="utf-8")
    assert text.count("### Integration Test Run") == 3 and "*No check fails.*" in text
    assert cli.main(["log", "sync"]) == 0
    assert "no entries added" in capsys.readouterr().out
    assert (here / log.NAME).read_text(encoding="utf-8") == text
    assert all(not run.log.get("error") for run in History.read().runs)


# -- the real one ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(REAL is None, reason="the background documents are not beside this checkout")
def test_the_log_of_the_documents_is_read_and_put_right(here):
    data = REAL.read_bytes()
    (here / "OLD.md").write_bytes(data)
    found = import_log(here / "OLD.md")
    assert len(found.new) == 12 and found.pending == 1
    assert [run.count(PASSED) for run in found.new] == [0, 0, 0, 5, 5, 7, 8, 8, 6, 8, 8, 8]
    assert found.new[5].started == "2025-09-30T15:21:10+00:00"
    assert [r.message for r in found.new[5].results if r.status == FAILED] == [
        "not enough values to unpack (expected 5, got 4)"
    ]
    mended = repair(data)
    assert len(mended.changes) == 109 and mended.unproved == []
    text = mended.data.decode()
    for heading in ("## 📝 Detailed Test Results", "## 📞 Contact & References", "## 🔍 Code Analysis Notes",
                    "## 📋 Table of Contents", "## ⚠️ Known Issues", "- **Status**: ⏳ Pending"):  # fmt: skip
        assert heading in text
    assert not re.search("[âğ]", text)
