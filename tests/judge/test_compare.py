"""`compat compare` and `compat explain`: verdict first, layers as exact patterns, exit codes, no torch to read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compat import cli
from compat.ranges import expand, group
from compat.rules import NotComparable, compare

from .rule_pairs import KEY, OTHER, SKETCH
from .test_rules import lock

ROOT = Path(__file__).parents[2]
WORDS = st.sampled_from(["blocks", "weight", "0", "1", "2", "3", "10", "007", "{", "}", "{0..3}", "{{1}", ""])


@given(st.lists(st.lists(WORDS, min_size=1, max_size=4).map(".".join), max_size=40))
@example([f"blocks.{layer}.experts.{expert}" for layer in range(4) for expert in range(3) if layer != expert])
def test_patterns_name_exactly_the_names_they_were_made_of(names):
    patterns = group(names)
    assert sorted(name for pattern in patterns for name in expand(pattern)) == sorted(set(names))


def test_a_run_of_layers_is_one_pattern_and_a_gap_in_it_shows():
    layers = [f"decoder.blocks.{layer}.attn.q_proj.weight" for layer in range(30)]
    assert group(layers) == ["decoder.blocks.{0..29}.attn.q_proj.weight"]
    assert group(layers[:4] + layers[7:8] + ["norm"]) == ["decoder.blocks.{0..3,7}.attn.q_proj.weight", "norm"]
    assert group(["a.0.b", "a.00.b", "a.1.b"]) == ["a.{0..1}.b", "a.00.b"]


def renamed():
    old = {f"state.blocks.{layer}.q_proj.weight": KEY for layer in range(3)}
    return lock(old), lock({path.replace("q_proj", "query"): value for path, value in old.items()})


def test_a_rename_over_layers_is_one_finding_with_both_names():
    [finding] = compare(*renamed()).findings
    assert str(finding) == (
        "LOAD.key_renamed state.blocks.{0..2}.q_proj.weight: blocks.{0..2}.q_proj.weight -> blocks.{0..2}.query.weight"
    )
    assert finding.count == 3


def test_measured_values_are_one_finding_that_keeps_every_value():
    a = {f"gradient.blocks.{layer}.w": 1.0 for layer in range(3)}
    b = {f"gradient.blocks.{layer}.w": 1.0 + layer / 10 for layer in range(3)}
    [finding] = compare(lock(a), lock(b)).findings
    assert (finding.path, finding.old, finding.new) == ("gradient.blocks.2.w", "1.0", "1.2")
    assert finding.members == {"gradient.blocks.1.w": [1.0, 1.1], "gradient.blocks.2.w": [1.0, 1.2]}


def test_a_numeric_finding_names_the_innermost_first_module_that_differs():
    names = ["vision.patch", "vision.blocks.0.attn.q", "vision.blocks.0.attn", "vision.blocks.0", "vision", "model"]
    a = {f"activation.{order:03}.{name}": SKETCH for order, name in enumerate(names)}
    b = {path: SKETCH if path.endswith(("patch", ".q")) else OTHER for path in a}
    numbers = "numbers.fp32.logits"
    [finding] = compare(lock(a | {numbers: SKETCH}), lock(b | {numbers: OTHER})).findings
    assert finding.where == "vision.blocks.0.attn (vision.blocks.0.attn.q before it agrees)"


def test_what_fails_alike_on_both_sides_is_a_note_and_no_finding():
    a = {"backbones": {"error": "AttributeError", "message": "no rope_theta"}, "cost.parameters": 5}
    b = {"backbones": {"error": "AttributeError", "message": "no rope_theta in 5.2"}, "cost.parameters": 5}
    found = compare(lock(a), lock(b))
    assert found.verdict == "identical" and found.exit_code == 0
    assert "AttributeError on both sides" in found.notes[0]


def test_a_section_that_fails_in_b_hides_none_of_what_else_changed():
    a = {"tokenizer.special.eos_token": ["<end>", 2], "tokenizer.text.0": [1, 2], "cost.parameters": 5}
    b = {"tokenizer.special": {"error": "OSError", "message": ""}, "tokenizer.text.0": [1, 3], "cost.parameters": 6}
    found = compare(lock(a), lock(b))
    assert [finding.rule for finding in found.findings] == [
        "API.error_appeared", "DATA.tokenization", "COST.parameters",
    ]  # fmt: skip
    assert found.verdicts == {"data": "breaking", "model": "behaviour"}


def test_the_environment_is_noted_and_never_a_finding():
    facts = {"cost.parameters": 5}
    found = compare(lock(facts, environment={"torch": "2.9"}), lock(facts, environment={"torch": "2.10"}))
    assert found.verdict == "identical" and found.notes == ("environment: torch 2.9 -> 2.10",)


@pytest.mark.parametrize("other", [{"combo": "dinov3"}, {"scale": "full"}, {"schema": 2}, {"facts": {}}])
def test_locks_of_different_questions_are_refused(other):
    with pytest.raises(NotComparable):
        compare(lock({"cost.parameters": 5}), lock({"cost.parameters": 5}) | other)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a.json, b.json: a rename. same.json: a once more."""
    monkeypatch.chdir(tmp_path)
    a, b = renamed()
    for name, held in {"a": a, "b": b, "same": a}.items():
        written = held | {"target": name, "commit": None, "dirty": None}
        Path(f"{name}.json").write_text(json.dumps(written), encoding="utf-8")
    return tmp_path


def test_two_lock_files_are_compared_and_shown_with_the_fix(files, capsys):
    assert cli.main(["compare", "a.json", "b.json"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "BREAKING: 1 breaking | a -> b | siglip2-smollm2 (tiny)"
    assert any(line.startswith("  LOAD.key_renamed state.blocks.{0..2}.q_proj.weight: ") for line in said)
    assert any(line.strip().startswith("fix: ") for line in said)
    assert cli.main(["compare", "a.json", "same.json"]) == 0
    assert capsys.readouterr().out.startswith("IDENTICAL: nothing that matters changed")


def test_json_holds_what_the_table_says(files, capsys):
    assert cli.main(["compare", "a.json", "b.json", "--json", "-"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["verdicts"]) == ("breaking", {"checkpoint": "breaking"})
    assert said["findings"][0]["rule"] == "LOAD.key_renamed"
    assert cli.main(["compare", "a.json", "b.json", "--json", "out.json"]) == 1
    assert capsys.readouterr().out.startswith("BREAKING")
    assert json.loads(Path("out.json").read_text(encoding="utf-8")) == said


def test_wrong_arguments_end_with_2_and_one_line(files, capsys):
    Path("text.json").write_text("no lock", encoding="utf-8")
    for wrong, why in (
        (["a.json", "text.json"], "text.json is no lock"),
        (["a.json", "nowhere"], "'nowhere' is no target"),
        (["a.json", "b.json", "--combo", "granite-docling"], "siglip2-smollm2"),
        (["a.json", "b.json", "--scale", "full"], "tiny"),
        ([".", ".", "--combo", "none"], "no combo named 'none'"),
    ):
        assert cli.main(["compare", *wrong]) == 2
        [said] = capsys.readouterr().err.splitlines()
        assert why in said


def test_locks_of_a_combo_that_is_listed_no_more_are_still_compared(files, capsys):
    for name in ("a", "b"):
        held = json.loads(Path(f"{name}.json").read_text(encoding="utf-8"))
        Path(f"{name}.json").write_text(json.dumps(held | {"combo": "of-long-ago"}), encoding="utf-8")
    assert cli.main(["compare", "a.json", "b.json"]) == 1
    assert "of-long-ago (tiny)" in capsys.readouterr().out


def test_a_file_that_is_not_there_ends_with_3(files, capsys):
    assert cli.main(["compare", "a.json", "gone.json"]) == 3
    assert "gone.json" in capsys.readouterr().err


def test_explain_says_what_a_rule_means_and_lists_them_all(capsys):
    assert cli.main(["explain", "load.key_removed"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("LOAD.key_removed: breaking for checkpoint") and "\n  fix   " in said
    assert cli.main(["explain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 40
    assert cli.main(["explain", "LOAD.nothing"]) == 2


@pytest.mark.parametrize("command", [["explain"], ["compare", "a.json", "b.json"]], ids=" ".join)
def test_reading_commands_import_neither_torch_nor_numpy_nor_pytest(files, command):
    ask = (
        "import sys; sys.path.insert(0, sys.argv[1]); from compat.cli import main; main(sys.argv[2:]); "
        "print([name for name in ('torch', 'numpy', 'pytest', 'rich') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", ask, str(ROOT), *command], capture_output=True, text=True)
    assert shown.stdout.splitlines()[-1] == "[]", shown.stderr
