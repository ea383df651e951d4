"""The badge: the newest run's target as it stands, self-contained, and never greener than that."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml

import pytest

from compat import cli, store
from compat.reports import badge
from compat.reports.history import History
from compat.result import ERROR, Result
from tests.report.made import made


def test_it_counts_every_check_of_every_combo_as_its_last_run_left_it():
    runs = [made(0, ("a",), failed={"VRAM": "no"}), made(1, ("b",)), made(2, target="other", failed={"VRAM": "no"})]
    assert badge.message(History(runs[:2])) == ("25/26 passed", "red")
    assert badge.message(History([*runs[:2], made(3, ("a",))])) == ("26/26 passed", "green")
    assert badge.message(History(runs)) == ("12/13 passed", "red"), "of the newest run's target alone"


def test_what_was_not_asked_counts_neither_way():
    assert badge.message(History([made(0, skipped={"VRAM": "no GPU"})])) == ("12/12 passed", "green")
    assert badge.message(History([made(0, skipped={"VRAM": "no GPU"}, checks=("VRAM",))])) == ("nothing asked", "grey")
    assert badge.message(History([])) == ("no runs", "grey")


def test_an_error_of_ours_is_neither_green_nor_red():
    run = made(0)
    run.results.append(Result("VRAM", "ours", ERROR, "KeyError", combo="siglip2-smollm2"))
    assert badge.message(History([run]))[1] == "orange"


def test_the_svg_is_whole_and_needs_nothing_from_elsewhere():
    text = badge.svg(History([made(0)]))
    top = xml.fromstring(text)
    assert top.tag == "{http://www.w3.org/2000/svg}svg" and top.get("aria-label") == "compat: 13/13 passed"
    for word in ("href", "url(", "<script", "<style", "<image", "http://"):
        assert word not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    texts = [element.text for element in top.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["compat", "13/13 passed"]


def test_report_writes_either_form(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store.save(made(0, failed={"VRAM": "no"}))
    assert cli.main(["report", "--badge", "b.svg"]) == 0 and not (tmp_path / ".compat/report.html").exists()
    assert cli.main(["report", "--badge", "b.json", "-o", "page.html"]) == 0 and (tmp_path / "page.html").exists()
    assert json.loads((tmp_path / "b.json").read_text()) == {
        "schemaVersion": 1, "label": "compat", "message": "12/13 passed", "color": "b3261e",
    }  # fmt: skip
    xml.fromstring((tmp_path / "b.svg").read_text())
    capsys.readouterr()
    assert cli.main(["report", "--badge", "b.png"]) == 2 and "FILE.svg" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no/such/folder/b.svg", "."])
def test_a_badge_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    store.save(made(0))
    assert cli.main(["report", "--badge", name]) in (2, 3)
