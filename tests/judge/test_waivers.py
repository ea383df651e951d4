"""waivers.toml: an entry holds for one change, one reason, one owner, and not for long."""

from __future__ import annotations

from datetime import date, timedelta

import pytest

from compat.findings import Finding
from compat.waivers import MAX_DAYS, fingerprint, proposal, read

TODAY = date(2026, 11, 21)
PATH = "state.blocks.{0..1}.weight"
FINDING = Finding("LOAD.key_removed", "breaking", "checkpoint", PATH, "[8, 4]", "(absent)", 2)
FACTS = {f"state.blocks.{layer}.weight": {"shape": [8, 4]} for layer in range(2)}
MARK = fingerprint(FINDING, FACTS, {})


def entry(**changes) -> str:
    """An entry that holds; a change of None leaves its line out."""
    held = {
        "fingerprint": f'"{MARK}"', "rule": '"LOAD.key_removed"', "path": f'"{PATH}"', "reason": '"split in v3"',
        "owner": '"ana"', "expires": str(TODAY + timedelta(days=30)),
    }  # fmt: skip
    return "[[waiver]]\n" + "".join(f"{k} = {v}\n" for k, v in (held | changes).items() if v is not None)


def test_an_entry_covers_the_change_it_was_written_for_and_no_other():
    [waiver], wrong = read(entry(), TODAY)
    assert not wrong and waiver.covers(FINDING, MARK, "any-combo")
    other = fingerprint(FINDING, FACTS | {"state.blocks.1.weight": {"shape": [8, 5]}}, {})
    assert other != MARK and not waiver.covers(FINDING, other, "any-combo")


def test_the_fingerprint_tells_rule_path_old_and_new_apart_and_no_display_text():
    def mark(rule="API.x", path="config.field.a", old="1", new="2", a=1, b=2):
        return fingerprint(Finding(rule, "breaking", "model", path, old, new), {"config.field.a": a}, {path: b})

    told = {mark(), mark(rule="API.y"), mark(path="config.field.b"), mark(a=3), mark(b=3), mark(b=None)}
    assert len(told) == 6
    assert mark(old="one", new="two") == mark(), "reworded is not another finding"


def test_a_pattern_and_its_paths_are_one_fingerprint():
    spelled = Finding(FINDING.rule, "breaking", "checkpoint", "state.blocks.{0,1}.weight", "x", "y")
    assert fingerprint(spelled, FACTS, {}) == MARK


def test_measured_values_may_round_differently_on_another_machine_and_may_not_be_others():
    finding = Finding("NUMERIC.logits", "behaviour", "model", "numbers.fp32.logits", "", "")
    a, b = [0.3, -1.4, 2.2], [0.9, -0.2, 1.7]
    near, far = [0.3000002, -1.4000003, 2.1999997], [0.9, -0.2, 1.2]
    marks = [fingerprint(finding, {finding.path: one}, {finding.path: b}) for one in (a, near)]
    assert marks[0] == marks[1] != fingerprint(finding, {finding.path: a}, {finding.path: far})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reason": '""'}, "has no reason yet: fill in why"),
        ({"reason": '" "', "owner": '""'}, "has no reason and no owner yet"),
        ({"owner": None}, "lacks owner"),
        ({"expires": "2026-11-20"}, "expired on 2026-11-20: mend what it waives"),
        ({"expires": str(TODAY + timedelta(days=MAX_DAYS + 1))}, "more than 180 days ahead; 2027-05-20 is the latest"),
        ({"expires": '"2026-12-01"'}, "which is no date; write expires = "),
        ({"expires": "2026-12-01T00:00:00"}, "which is no date"),
        ({"fingerprint": '"abc"'}, "not 16 hex digits"),
        ({"rule": "7"}, "has rule that is no text"),
        ({"combos": '"all"'}, "has combos that are no list of names"),
        ({"resaon": '"x"'}, "has resaon, which mean nothing here"),
    ],
)
def test_an_entry_that_does_not_hold_says_why_and_waives_nothing(changes, said):
    waivers, [wrong] = read(entry(**changes), TODAY)
    assert waivers == [] and said in wrong and wrong.startswith("waivers.toml: entry 1")


def test_the_last_day_and_the_longest_time_still_hold():
    for expires in (TODAY, TODAY + timedelta(days=MAX_DAYS)):
        assert read(entry(expires=expires), TODAY)[1] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[waiver]\n", "cannot be read"),
        ("waiver = 3\n", "entries begin with [[waiver]]"),
        ("[[waivers]]\n", "holds waivers"),
        ("waiver = [3]\n", "entry 1 is no table"),
        (entry() + entry(), "says the same as an entry above"),
    ],
)
def test_a_file_that_is_no_list_of_waivers_is_said_to_be_none(text, said):
    assert any(said in wrong for wrong in read(text, TODAY)[1])


def test_two_entries_of_one_change_may_stand_for_different_combos():
    text = entry(combos='["a"]') + entry(combos='["b"]', owner='"ben"')
    waivers, wrong = read(text, TODAY)
    assert not wrong and [waiver.owner for waiver in waivers if waiver.covers(FINDING, MARK, "b")] == ["ben"]


def test_a_proposed_entry_is_read_back_and_waits_for_its_reason_and_owner():
    hostile = Finding("LOAD.key_removed", "breaking", "checkpoint", 'state."\n[[waiver]]\x1b[31m\x7f', "a\\", "b\n")
    text = proposal([(FINDING, MARK, ["a", "b"]), (hostile, "0" * 16, ["a"])], TODAY)
    waivers, wrong = read(text, TODAY)
    assert not waivers and len(wrong) == 2 and all("no reason and no owner yet" in why for why in wrong)
    filled = text.replace('reason = ""', 'reason = "meant"').replace('owner = ""', 'owner = "ana"')
    waivers, wrong = read(filled, TODAY)
    assert not wrong and waivers[0].covers(FINDING, MARK, "b") and not waivers[0].covers(FINDING, MARK, "c")
    assert waivers[1].covers(hostile, "0" * 16, "a")
