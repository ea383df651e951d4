"""Entries and standing sections: what a run writes into a log, and that no human byte moves."""

from __future__ import annotations

import re

import pytest

from compat import cli, store
from compat.reports import log, sections
from compat.reports.history import History
from compat.reports.templating import TemplateBroken, Templates
from compat.result import FAILED, PASSED, SKIPPED, Result
from compat.suites import FOLDER, catalogue
from tests.report.made import HOSTILE, cost, finding, made


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(run, here, **more):
    store.save(run)
    return log.record(here / log.NAME, run, **more)


def text(here) -> str:
    return (here / log.NAME).read_text(encoding="utf-8")


def section(here, name: str) -> str:
    return text(here).partition(f"<!-- compat:{name} -->\n")[2].partition(f"<!-- /compat:{name} -->")[0]


# -- the entry ------------------------------------------------------------------------------------------------


def test_findings_stand_by_tier_with_the_fix_and_waived_ones_apart():
    run = made(0, findings=[
        finding("COST.flops", "behaviour", path="cost.flops", old="1", new="2", fix="Is the layer meant?"),
        finding(),
        finding("API.argument_added", "additive", path="signature.forward.scale", old="absent", new="1.0", fix=""),
        finding("NUMERIC.logits", "behaviour", path="numbers.fp32", waived="pooling is meant (Ada)"),
    ])  # fmt: skip
    told = log.entry(run, "x.json")
    assert (
        """\
**Findings** (2):
- LOAD
  - LOAD.key_renamed `state.decoder.blocks.{0..29}.attn.q_proj.weight`: `q_proj.weight` -> `query.weight`
    - Fix: `Keep the name, or map the old key to the new one on load.`
- COST
  - COST.flops `cost.flops`: `1` -> `2`
    - Fix: `Is the layer meant?`

**Additions** (1):
- API
  - API.argument_added `signature.forward.scale`: `absent` -> `1.0`

**Waived** (1):
- NUMERIC
  - NUMERIC.logits `numbers.fp32`: `q_proj.weight` -> `query.weight`
    - Waived: `pooling is meant (Ada)`
"""
        in told
    )
    assert "- **Status**: ⚠️ 13/13 Passed" in told  # every check passed, and yet it is not fine


def test_cost_stands_beside_the_previous_run_of_the_same_combo():
    before, other, now = made(1), made(2, ("dinov2-smollm2",)), made(25)
    told = log.entry(now, "x.json", History([before, other]))
    assert f"**Cost** (against {log.spelled(before.started)}):\n- FLOPs, forward: 7.14 MFLOP (+1.9 %)\n" in told
    assert "- Parameters: 186.40 k (+2.2 %)\n" in told and "- Run time: 7.0 s (-1.4 %)\n" in told
    assert "**Cost**:\n- FLOPs, forward: 7.00 MFLOP\n" in log.entry(before, "x.json")


def test_costs_of_another_device_are_not_compared():
    before, now = made(1), made(2)
    before.environment["gpu"] = "H100"
    assert "**Cost**:\n" in log.entry(now, "x.json", History([before]))


def test_new_breakages_are_named_above_the_list():
    before = made(0, failed={"VRAM": "it was so before"})
    now = made(1, failed={"VRAM": "it was so before", "Edge Cases": "and this is new"})
    told = log.entry(now, "x.json", History([before]))
    assert "- **New Breakages**: 1 (Edge Cases)\n" in told and told.index("New Breakages") < told.index("Test Results")
    assert "New Breakages" not in log.entry(before, "x.json", History([]))  # nothing is known to have worked


def test_a_figure_that_was_not_measured_says_why():
    run = made(0, facts={"siglip2-smollm2": {"not_measured": {"flops": "no formula for my_attention"}}})
    assert "**Skipped** (1):\n- flops: `no formula for my_attention`\n" in log.entry(run, "x.json")


# -- sections -------------------------------------------------------------------------------------------------


def test_a_new_log_has_every_section_filled(here):
    run = made(0)
    run.facts = {"siglip2-smollm2": {
        "special_tokens": {"eos_token": ["<|im_end|>", 2]},
        "loading_fields": {"lm_hidden_dim": [960, "shapes"], "vit_patch_size": [16, "refused"]},
    }}  # fmt: skip
    run.target["tags"] = [
        {"name": "v0.1", "date": "2026-08-01", "commit": run.target["commit"], "subject": "First one"}
    ]
    assert record(run, here) == []
    assert section(here, "issues") == "*No check fails.*\n"
    assert "- **PyTorch Version**: 2.13.0+cpu\n" in section(here, "environment")
    assert "  - FLOPs, forward: 7.00 MFLOP\n" in section(here, "metrics")
    assert "  - eos_token: `<|im_end|>` = 2\n" in section(here, "tokens")
    assert "  - `lm_hidden_dim`: 960\n  - no other value goes with the rest: `vit_patch_size`: 16\n" in section(
        here, "config"
    )
    assert section(here, "versions") == (
        "- **v0.1** (2026-08-01), `000000000000`: `First one`\n  - ✅ judged 2026-09-01\n"
    )
    assert text(here).count("<!-- compat:") == len(sections.NAMES)


def test_a_known_issue_vanishes_when_its_check_passes(here):
    record(made(0, failed={"Generate Method": "five instead of four"}), here)
    assert "- ❌ Generate Method, siglip2-smollm2 (tiny): `five instead of four`\n" in section(here, "issues")
    record(made(1, ("dinov2-smollm2",)), here)
    assert "Generate Method" in section(here, "issues")  # another combo says nothing of this one
    record(made(2), here)
    assert section(here, "issues") == "*No check fails.*\n"


def test_a_clone_without_run_records_knows_the_issues_from_the_log_itself(here):
    record(made(0, ("dinov2-smollm2",), {"VRAM": "too much"}), here)
    for path in store.all_runs():
        path.unlink()
    record(made(1), here)
    assert "- ❌ VRAM, dinov2-smollm2 (tiny): `too much`\n" in section(here, "issues")


def test_another_target_s_trouble_is_not_this_log_s(here):
    record(made(0), here)
    record(made(1, failed={"VRAM": "theirs"}, target="../fork"), here)
    assert section(here, "issues") == "*No check fails.*\n" and "theirs" in text(here)


def test_boxes_are_ticked_by_the_tests_that_answer_them(here):
    run = made(0, checks=())
    tests = {(check, test) for boxes in sections.COVERAGE.values() for tests in boxes.values() for check, test in tests}
    for check, test in sorted(tests, key=str):
        status = SKIPPED if check == "Data Pipeline" else FAILED if test and "padding carries" in test else PASSED
        said = "" if status == PASSED else "because"
        run.results.append(Result(check, test or "something", status, said, combo="siglip2-smollm2"))
    record(run, here)
    told = section(here, "coverage")
    assert "- [x] Save/load cycle\n" in told and "- [x] Long sequence handling\n" in told
    assert "- [ ] Data pipeline: `skipped under siglip2-smollm2: because`\n" in told
    assert (
        "- [ ] Attention mask variations: `failed under siglip2-smollm2: Edge Cases, padding carries no labels`" in told
    )
    assert told.count("- [") == 15 and told.count("- [x]") == 13
    run = made(1, checks=("VRAM",))
    assert "- [ ] Long sequence handling: `not asked" in "".join(
        f"- [ ] {box.title}: `{box.why}`\n" for box in sections.coverage(History([run]))["Edge Cases"]
    )


def test_every_box_names_tests_that_there_are():
    titles = {suite.title: suite.path.read_text(encoding="utf-8") for suite in catalogue(FOLDER)}
    for boxes in sections.COVERAGE.values():
        for tests in boxes.values():
            for check, test in tests:
                name = re.sub(r" \((\w+)\)$", "", test or "").replace("'s ", "_s ").replace(" ", "_")
                assert check in titles and f"def test_{name}" in titles[check], (check, test)


HUMAN = [
    "# Mine\n\nwords\n",
    "# Mine\r\n\r\nwords\r\n",
    "no newline at the end",
    "# Mine\n\n```text\n<!-- compat:issues -->\nan example\n<!-- /compat:issues -->\n```\n\nmore\n",
    "# Mine\n\nğŸ“‹ mojibake \udcff stays\n\n---\n\n"
    "### Integration Test Run - 2025-09-30 14:58:38\n- **Status**: ✅ All Passed\n",
    "```\nan open fence\n",
    "| a | table |\n<!-- a comment -->\n<!-- compat:unknown -->\n",
]


@pytest.mark.parametrize("human", HUMAN, ids=range(len(HUMAN)))
def test_every_human_byte_stays_in_its_order(here, human):
    path = here / log.NAME
    before = human.encode("utf-8", "surrogateescape")
    path.write_bytes(before)
    for number in range(3):
        record(made(number, failed={"VRAM": "x"} if number == 1 else {}), here)
    after = path.read_bytes()
    ours = re.compile(rb"(?s)\n?## [^\n]*\n\r?\n<!-- compat:(\w+) -->.*?<!-- /compat:\1 -->\r?\n")
    first = after.split(b"### Integration Test Run - 2026")[0]
    left = re.sub(
        rb"\s+", b" ", ours.sub(b"", first) if b"an example" not in human.encode("utf-8", "replace") else first
    )
    for line in before.split(b"\n"):
        assert line.strip() in after
    if b"an example" not in before:
        assert left.strip().removesuffix(b"---").strip() == re.sub(rb"\s+", b" ", before).strip()
    assert after.count(b"### Integration Test Run - 2026") == 3
    if b"\r\n" in before:
        assert after.count(b"\n") == after.count(b"\r\n")


def test_words_around_the_markers_stay_when_sections_change(here):
    record(made(0, failed={"VRAM": "x"}), here)
    path = here / log.NAME
    words = text(here).replace("<!-- compat:issues -->", "I wrote this.\n<!-- compat:issues -->")
    words = words.replace("<!-- /compat:issues -->", "<!-- /compat:issues -->\nAnd this.")
    words = re.sub(r"## 🔤.*?<!-- /compat:tokens -->\n", "", words, flags=re.DOTALL)
    path.write_text(words, encoding="utf-8")
    record(made(1), here)
    assert "I wrote this.\n<!-- compat:issues -->\n*No check fails.*\n<!-- /compat:issues -->\nAnd this.\n" in text(
        here
    )
    assert "compat:tokens" not in text(here)  # a section that somebody removed stays removed


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("<!-- compat:issues -->\nnever closed\n", "line 3: <!-- compat:issues --> is never closed"),
        ("<!-- /compat:issues -->\n", "closes nothing"),
        ("<!-- compat:issues -->\n<!-- compat:tokens -->\n<!-- /compat:tokens -->\n", "begins before compat:issues"),
    ],
)
def test_markers_that_do_not_pair_up_are_named_and_the_entry_is_added_all_the_same(here, broken, said):
    (here / log.NAME).write_text("# Mine\n\n" + broken)
    [warning] = record(made(0), here)
    assert said in warning
    assert text(here).startswith("# Mine\n\n" + broken) and "### Integration Test Run" in text(here)


def test_hostile_text_breaks_neither_the_sections_nor_the_entries(here):
    run = made(
        0,
        failed={"VRAM": HOSTILE},
        findings=[finding(path=HOSTILE, old=HOSTILE, new=HOSTILE, fix=HOSTILE, rule=HOSTILE)],
    )
    run.facts = {
        "siglip2-smollm2": {"special_tokens": {HOSTILE: [HOSTILE, 2]}, "loading_fields": {HOSTILE: [HOSTILE, "shapes"]}}
    }
    run.target["tags"] = [{"name": HOSTILE, "date": HOSTILE, "commit": HOSTILE, "subject": HOSTILE}]
    record(run, here)
    record(made(1, failed={"VRAM": HOSTILE}), here)
    told = text(here)
    assert told.count("\n### Integration Test Run") == 2 and "\x1b" not in told and "\u202e" not in told
    assert len(sections.places(told)) == len(sections.NAMES)
    outside = re.sub(r"`[^`\n]*`", "", told)
    assert not [line for line in outside.split("\n") if "<script" in line or "<img" in line or line.startswith("```")]
    assert all(line.count("`") % 2 == 0 for line in told.split("\n"))


# -- modifications --------------------------------------------------------------------------------------------


def test_the_next_run_completes_a_modification(here, capsys):
    told = ["--type", "Model Addition", "--files", "models/a.py", "b.py", "--impact", "none for `old` checkpoints"]
    assert cli.main(["log", "modification", *told]) == 0
    assert "modification #1; the next run fills in" in capsys.readouterr().out
    pending = text(here)
    assert "### Modification #1 - Model Addition (20" in pending and "  - `models/a.py`\n  - `b.py`\n" in pending
    assert "- **Compatibility Impact**: none for `old` checkpoints\n" in pending
    assert "- **Testing Required**:\n  - ⏳ Pending: the next run fills this in\n- **Git Commit**: Pending\n" in pending
    record(made(3, failed={"VRAM": "too much"}), here)
    done = text(here)
    assert "pending" not in done.lower().partition("### integration")[0]
    assert "  - ✅ Config Compatibility\n" in done and "  - ❌ VRAM: `too much`\n" in done
    assert f"- **Git Commit**: `{3:012x}`"[:22] in done and "- **Git Commit**: Pending" not in done
    before = done.partition("### Integration")[0]
    record(made(4), here)
    assert (
        text(here).partition("### Integration")[0].partition("### Modification")[2]
        == before.partition("### Modification")[2]
    )


def test_a_modification_in_a_log_of_dos_lines_is_completed_in_them(here):
    (here / log.NAME).write_bytes(b"# Mine\r\n\r\nwords\r\n")
    told = {"type": "x", "title": "x", "files": ["a"], "impact": "y", "description": ""}
    log.start_modification(here / log.NAME, told)
    record(made(0), here)
    data = (here / log.NAME).read_bytes()
    assert b"  - \xe2\x9c\x85 VRAM\r\n" in data and b"Pending" not in data
    assert data.count(b"\n") == data.count(b"\r\n")


def test_modifications_are_numbered_after_those_there_are(here):
    (here / log.NAME).write_text("# Mine\n\n### Modification #7 - By hand (2025-09-30)\n- **Git Commit**: Pending\n")
    assert (
        log.start_modification(
            here / log.NAME, {"type": "x", "title": "x", "files": ["a"], "impact": "y", "description": ""}
        )
        == 8
    )
    record(made(0), here)
    assert "### Modification #7 - By hand (2025-09-30)\n- **Git Commit**: Pending\n" in text(here)  # a person's own


@pytest.mark.parametrize("words", [["--type", " "], ["--impact", ""]])
def test_a_modification_without_words_is_wrong_usage(here, words, capsys):
    told = {"--type": "x", "--files": "a", "--impact": "y"} | {words[0]: words[1]}
    assert cli.main(["log", "modification", *(part for pair in told.items() for part in pair)]) == 2
    assert f"{words[0]} is empty" in capsys.readouterr().err and not (here / log.NAME).exists()


# -- templates ------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(here):
    (here / "mine").mkdir()
    return here / "mine"


def test_a_template_of_ones_own_goes_before_ours(here, mine):
    (mine / "entry.md.j2").write_text("---\n\n{{ run.target.label | code }} says {{ status }}\n", encoding="utf-8")
    record(made(0), here, templates=Templates(mine))
    assert text(here).endswith("---\n\n`.` says ✅ All Passed\n") and section(here, "issues") == "*No check fails.*\n"


@pytest.mark.parametrize(
    ("name", "inside", "said"),
    [
        ("entry.md.j2", "one\n{% if %}", "entry.md.j2, line 2"),
        ("entry.md.j2", "\n\n{{ run.no_such_thing }}", "entry.md.j2, line 3: UndefinedError"),
        ("section_issues.md.j2", "{{ 1 / 0 }}", "section_issues.md.j2, line 1: ZeroDivisionError"),
        ("entry.md.j2", "{{ run.__class__.__init__.__globals__ }}", "entry.md.j2, line 1: SecurityError"),
        ("entry.md.j2", b"\xff", "entry.md.j2 cannot be read"),
    ],
)
def test_a_broken_template_loses_nothing(here, mine, name, inside, said):
    (here / log.NAME).write_text("# Mine\n")
    (mine / name).write_bytes(inside if isinstance(inside, bytes) else inside.encode())
    run = made(0)
    with pytest.raises(log.LogNotWritten, match=re.escape(said)):
        record(run, here, templates=Templates(mine))
    assert text(here) == "# Mine\n" and said in store.load(store.path_of(run)).log["error"]
    assert log.sync(here / log.NAME) == [run.id] and log.sync(here / log.NAME) == []
    assert text(here).count("### Integration Test Run") == 1


def test_a_template_is_read_before_the_target_is_asked(here, mine, capsys):
    (mine / "entry.md.j2").write_text("{% if %}")
    assert cli.main(["run", ".", "--template", "mine"]) == 2
    assert "entry.md.j2, line 1" in capsys.readouterr().err
    (mine / "entry.md.j2").rename(mine / "entri.md.j2")
    assert cli.main(["run", ".", "--template", "mine"]) == 2
    assert "replaces no template; there are: entry.md.j2" in capsys.readouterr().err
    with pytest.raises(TemplateBroken, match="nowhere is no folder"):
        Templates(here / "nowhere")
    assert not (here / ".compat").exists()


def test_figures_of_a_cost_that_is_no_number_are_left_out():
    run = made(0, cost={"siglip2-smollm2": cost(0) | {"flops_forward": "nan"}})
    assert "FLOPs, forward" not in log.entry(run, "x") and "FLOPs, backward" in log.entry(run, "x")
