"""The comment and the job summary: the order, the marker, and text that stays text."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from compat import store
from compat.reports import comment
from compat.reports.history import History
from tests.house.tree import ROOT
from tests.report.machines import gate
from tests.report.made import HOSTILE, finding, made


def of_run(*runs) -> str:
    history = History(runs)
    return comment.of_run(history.summary(history.runs[-1]))


def outside_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", text)


def test_a_run_is_told_in_the_order_of_every_output():
    last = made(2, failed={"Backward Pass": "NaN", "VRAM": "no"}, skipped={"Data Pipeline": "no VQADataset"})
    last.findings = [finding(), finding("COST.flops", "behaviour", waived="meant (ada)")]
    text = of_run(made(0), made(1, failed={"VRAM": "no"}), last)
    assert text.startswith("### ❌ compat run: failed\n\n10 of 12 checks passed, 1 skipped\n")
    order = ["#### New failures (1)", "`Backward Pass`", "#### Still failing (1)", "`VRAM`", "#### New findings (1)",
             "`LOAD.key_renamed`", "fix: Keep the name", "#### Waived (1)", "waived: `meant (ada)`", "Not run (1)",
             "#### Trend"]  # fmt: skip
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_a_gate_is_told_in_the_order_of_every_output():
    text = comment.of_gate(gate())
    order = ["### ❌ compat gate: failed", "2 new, 1 waived", "Policy changed: head is judged by that of base",
             "`compat/rules.toml`", "#### Waivers that do not hold", "#### New findings", "`LOAD.key_renamed`",
             "`SUITE.save_load`", "#### Waived", "Not run (1)"]  # fmt: skip
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_a_run_without_news_is_short():
    text = of_run(made(0))
    assert text.startswith("### ✅ compat run: passed\n\n13 of 13 checks passed\n") and "####" not in text


MARKUP = "@everyone #1 [x](javascript:x) ![y](http://h/z.png)"


@pytest.mark.parametrize("text", [HOSTILE, MARKUP, "`` ` ``\n- x\n\n# y"])
def test_hostile_text_is_inert(text):
    run = made(1, failed={"Backward Pass": text}, target=text, combos=(text[:60],))
    run.findings = [finding(path=text, old=text, new=text, waived=text), finding(path=text, rule=text)]
    last = comment.sticky("run", of_run(made(0), run))
    last += comment.of_gate(gate(head=text, base=text, problems=[text], incomplete=[text], not_run=[text]))
    bare = outside_code(last).replace("<!-- compat:run -->", "").replace("<details><summary>", "")
    bare = bare.replace("</summary>", "").replace("</details>", "")
    for word in ("<", "@", "javascript", "![", "](", "\x1b", "\u202e", "1999-01-01"):
        assert word not in bare, word
    assert last.count("`") % 2 == 0 and all(line.count("`") % 2 == 0 for line in last.splitlines())
    assert last.count("<!-- compat:") == len(re.findall(r"`[^`\n]*<!-- compat:[^`\n]*`", last)) + 1


def test_it_fits_whatever_there_is_to_say():
    many = [f"combo {n}: " + "x" * 900 for n in range(500)]
    text = comment.sticky("gate", comment.of_gate(gate(incomplete=many, problems=many, not_run=many)))
    assert len(text) < 65_536 and "and 480 more" in text
    combos = tuple(map(str, range(200)))
    long = of_run(made(0, combos, failed={name: "y" * 600 for name in ("VRAM", "Edge Cases")}))
    assert len(long) < 65_536


def test_a_proof_stands_in_a_fence_that_it_cannot_end():
    proof = "rename, shim verified\n````\n<script>\n```\n\x1b[31m@all"
    row = gate()["new"][0] | {"proof": proof}
    text = comment.of_gate(gate() | {"new": [row]})
    fence = re.search(r"^(`+)\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    assert fence[1] == "``````" and fence[2] == proof.replace("\x1b[31m", "")
    assert "; `rename, shim verified`" in text


def test_the_marker_is_the_first_line():
    assert comment.sticky("gate", comment.of_gate(gate())).startswith("<!-- compat:gate -->\n### ")


def make(*names, here) -> subprocess.CompletedProcess:
    """As the workflow does: the standard library alone, no package that was installed."""
    return subprocess.run(
        [sys.executable, "-S", "-m", "compat.reports.comment", *names],
        cwd=here, env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, timeout=60,
    )  # fmt: skip


def test_it_is_made_from_json_by_the_standard_library_alone(tmp_path):
    (tmp_path / "gate.json").write_text(json.dumps(gate()))
    (tmp_path / "run.json").write_bytes(store.dumps(made()))
    done = make("gate.json", "run.json", here=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("<!-- compat:gate -->\n### ❌ compat gate: failed")


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"new": 3}', json.dumps(gate() | {"policy": None}), "\x00"])
def test_a_malformed_file_is_a_sentence_and_no_comment(tmp_path, text, capfdbinary):
    (tmp_path / "gate.json").write_text(text)
    assert comment.main([str(tmp_path / "gate.json")]) == 2
    said = capfdbinary.readouterr()
    assert said.out == b"" and said.err.startswith(b"compat.reports.comment: no comment was made: ")
