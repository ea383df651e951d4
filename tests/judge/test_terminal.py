"""The terminal: verdict first, plain ASCII when piped, hostile text inert, progress as it goes."""

from __future__ import annotations

import io
import re

import pytest

from compat.reports.terminal import PIPED_COLUMNS, Watcher, show, verdict
from compat.result import ERROR, FAILED, PASSED, SKIPPED, Result, Run


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def run(*results: Result, combos=("siglip2-smollm2",)) -> Run:
    found = Run(
        "id",
        "2025-11-21T03:03:46+00:00",
        {"label": "../fork", "commit": "1234567890abcdef", "dirty": True},
        "tiny",
        list(combos),
        results=list(results),
        elapsed_s=7.25,
    )
    return found


def result(check, status=PASSED, message="", test="holds", combo="siglip2-smollm2", detail="") -> Result:
    return Result(check, test, status, message, detail, 0.5, combo)


def shown(found: Run, stream=None, **options) -> str:
    stream = stream or io.StringIO()
    show(found, ".compat/runs/id.json", stream, **options)
    return stream.getvalue()


MIXED = (
    result("Config Compatibility"),
    result(
        "Generate Method",
        FAILED,
        "prompt 0, step 2: generate chose id 7",
        "cached equals full",
        detail="  File x.py, line 3",
    ),
    result("Generate Method", FAILED, "prompt 0, step 2: generate chose id 7", "ids are inside"),
    result("Edge Cases"),
    result("Edge Cases", SKIPPED, "takes one picture a row", "several pictures"),
    result("VRAM", ERROR, "KeyError: 'peak'"),
)


def test_the_verdict_comes_first_and_the_path_last():
    lines = shown(run(*MIXED)).strip().splitlines()
    assert lines[0] == (
        "FAILED: 2 of 4 checks passed, 1 failed, 1 could not be judged | ../fork at 1234567890 + local "
        "changes"
        " | siglip2-smollm2 (tiny) | 7.2 s"
    )
    assert lines[-1] == "Run: .compat/runs/id.json"


def test_the_table_has_a_row_a_check_with_its_counts_and_first_message():
    text = shown(run(*MIXED))
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["Config Compatibility"][:5] == ["passed", "1", "-", "-", "0.5"]
    assert rows["Generate Method"][:5] == ["FAILED", "-", "2", "-", "1.0"]
    assert rows["Generate Method"][5].startswith("prompt 0, step 2")
    assert rows["Edge Cases"][:4] == ["passed", "1", "-", "1"]
    assert rows["VRAM"][:4] == ["ERROR", "-", "1", "-"]


def test_failures_stand_in_full_and_what_tests_share_is_said_once():
    text = shown(run(*MIXED))
    below = text[text.index("\nFailures") :]
    assert below.count("generate chose id 7") == 1 and "File x.py, line 3" in below
    assert "cached equals full" in below and "ids are inside" in below
    assert below.index("Failures") < below.index("Errors of the harness") < below.index("Skipped (1)")
    assert "  takes one picture a row\n    Edge Cases: several pictures" in below


def test_piped_output_is_plain_ascii_of_bounded_width():
    found = run(*MIXED, result("Data Pipeline", FAILED, "Grüße 🙂 \x1b[31m… " + "wide " * 60))
    text = shown(found)
    assert text.isascii() and "\x1b" not in text
    table = [line for line in text.splitlines() if line.startswith(("|", "+"))]
    assert table and max(map(len, table)) <= PIPED_COLUMNS


def test_a_terminal_gets_colour_and_lines():
    text = shown(run(*MIXED), Terminal())
    assert "\x1b[" in text and "─" in text


@pytest.mark.parametrize(
    "text",
    ["[red]markup[/red] [/]", "\x1b[2J\x1b]0;title\x07gone", "\u202eesrever", "x" * 2**20, "a\nb\n---"],
)
def test_hostile_text_is_shown_and_does_nothing(text):
    found = run(result("Config Compatibility", FAILED, text, detail=text))
    found.output, found.notes, found.target = text, [text], {"label": text}
    out = shown(found, verbose=True)
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out and len(out) < 2**20 + 20_000
    assert "[red]markup" in out or "markup" not in text


def test_several_combos_are_told_apart():
    found = run(
        result("Config Compatibility"),
        result("Config Compatibility", FAILED, "no", combo="siglip-smollm2"),
        combos=("siglip2-smollm2", "siglip-smollm2"),
    )
    text = shown(found)
    assert "| siglip-smollm2  | Config Compatibility | FAILED" in text and "holds [siglip-smollm2]" in text


def test_quiet_shows_verdict_and_failures_alone():
    text = shown(run(*MIXED), quiet=True)
    assert (
        text.startswith("FAILED: ")
        and "Failures" in text
        and "|" not in text.split("\n", 1)[1]
        and "Skipped" not in text
    )


def test_verbose_names_every_test_and_what_the_target_printed():
    found = run(*MIXED)
    found.output = "loading weights\n"
    text = shown(found, verbose=True)
    assert "Config Compatibility: holds" in text and "loading weights" in text


@pytest.mark.parametrize(
    ("results", "incomplete", "head"),
    [
        ((result("A"),), "", "PASSED: 1 of 1 checks passed |"),
        ((result("A"), result("B", SKIPPED, "no")), "", "PASSED: 1 of 2 checks passed, 1 skipped |"),
        (
            (result("A"),),
            "interrupted from the keyboard",
            "INCOMPLETE: 1 of 1 checks passed (interrupted from the keyboard) |",
        ),
        ((), "no model here", "INCOMPLETE: no check was answered (no model here) |"),
    ],
)
def test_the_verdict_in_one_line(results, incomplete, head):
    found = run(*results)
    found.incomplete = incomplete
    assert verdict(found).startswith(head) and "\n" not in verdict(found)


def test_progress_has_a_line_a_check_when_piped():
    stream = io.StringIO()
    watcher = Watcher(stream)
    watcher.start(3)
    watcher.started({"torch": "2.13.0", "device": "cpu", "gpu": None}, 3.04)
    for one in (result("A"), result("A", FAILED, "no"), result("B", SKIPPED, "no")):
        watcher.asking(one.check, one.test)
        watcher.answered(one)
    watcher.stop()
    assert stream.getvalue() == (
        "the target's process answers after 3.0 s (torch 2.13.0, device cpu)\n"
        "A: failed (2 tests, 1.0 s)\nB: skipped (1 test, 0.5 s)\n"
    )


def test_progress_names_the_combo_when_there_are_several():
    stream = io.StringIO()
    watcher = Watcher(stream, several=True)
    watcher.answered(result("A"))
    watcher.answered(result("A", combo="siglip-smollm2"))
    watcher.stop()
    lines = stream.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["siglip2-smollm2, A", "siglip-smollm2, A"]


def test_progress_can_name_every_test_or_nothing():
    said = {}
    for level in (0, 2):
        stream = io.StringIO()
        watcher = Watcher(stream, level)
        watcher.start(1)
        watcher.answered(result("A"))
        watcher.stop()
        said[level] = stream.getvalue()
    assert said == {0: "", 2: "passed  A: holds (0.50 s)\n"}


def test_progress_on_a_terminal_is_a_bar_that_goes_away():
    stream = Terminal()
    watcher = Watcher(stream)
    watcher.start(2)
    watcher.started({"torch": "2.13.0"}, 3.0)
    watcher.asking("A", "holds")
    watcher.answered(result("A"))
    watcher.stop()
    assert "1/2" in stream.getvalue() and watcher.bar is None


def test_the_bar_says_what_is_done_what_runs_and_how_long_it_will_take():
    stream = Terminal()
    watcher = Watcher(stream)
    watcher.start(20)
    watcher.started({"torch": "2.13.0"}, 3.0)
    watcher.bar.get_time = iter(range(1000)).__next__  # a second a look at the clock
    for number in range(10):
        watcher.asking("Generate Method", f"test {number}")
        watcher.answered(result("Generate Method"))
    task = watcher.bar.tasks[0]
    assert (task.completed, task.total, task.description) == (10, 20, "Generate Method")
    assert task.time_remaining and 5 <= task.time_remaining <= 60
    watcher.bar.refresh()
    watcher.stop()
    assert re.search(r"10/20 .*left 0:00:\d\d", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue()))


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_a_terminal_that_wants_no_colour_gets_none(monkeypatch, variable):
    monkeypatch.setenv(variable, "dumb" if variable == "TERM" else "1")
    text = shown(run(*MIXED), Terminal())
    assert not re.search(r"\x1b\[[\d;]*3[1-6]m", text)


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"])
def test_no_variable_puts_colour_into_a_pipe(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert "\x1b" not in shown(run(*MIXED))
