"""`compat mutate`: mutants are small and drawn by seed; what a lock sees is noticed, what it does not is listed."""

from __future__ import annotations

import ast
import json

import pytest

from compat.cli import main
from compat.combo import load
from compat.forks import Bench, Copy, NotJudged
from compat.mutants import Mutant, mutants
from compat.mutate import NothingToMutate, Outcome, Report, mutate, text, wanted
from compat.target import resolve
from tests.judge.trees import fingerprint, make_tree

SOURCE = '''"""A module."""
from __future__ import annotations


def area(x: int, y, scale=2.5):
    """Its docstring says 1 + 1."""
    if x < 0 and not y:
        raise ValueError("below " + str(0))
    total = max(x, y) * scale
    total += 1
    return -total if x == y else round(total, ndigits=3)


class Thing:
    flag: bool = True

    def __repr__(self):
        return "thing " + str(1)
'''


def changed_lines(mutant: Mutant) -> list[str]:
    return [line for line in mutant.source.splitlines() if line not in SOURCE.splitlines()]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("operator", "    total = (max(x, y) / scale)"),
        ("operator", "    return (total) if x == y else round(total, ndigits=3)"),
        ("operator", "    if (x < 0 or not y):"),
        ("comparison", "    if x <= 0 and not y:"),
        ("comparison", "    return -total if x != y else round(total, ndigits=3)"),
        ("constant", "def area(x: int, y, scale=5.0):"),
        ("constant", "    flag: bool = False"),
        ("argument", "    total = max(y, x) * scale"),
        ("argument", "    return -total if x == y else round(total)"),
        ("statement", "    pass"),
        ("condition", "    if not (x < 0 and (not y)):"),
        ("condition", "    return -total if (not (x == y)) else round(total, ndigits=3)"),
    ],
)
def test_a_slip_of_each_kind_is_among_the_mutants(kind, line):
    assert line in [changed for one in mutants("a.py", SOURCE) if one.kind == kind for changed in changed_lines(one)]


def test_a_mutant_is_valid_differs_in_few_lines_and_leaves_words_alone():
    found = mutants("a.py", SOURCE)
    assert len({one.source for one in found}) == len(found) > 20
    for one in found:
        ast.parse(one.source)
        assert len(one.source.splitlines()) == len(SOURCE.splitlines()), "line numbers stay"
        assert SOURCE.splitlines()[one.line - 1] == one.old.splitlines()[0] != one.new.splitlines()[0]
        for kept in (
            '"""Its docstring says 1 + 1."""',
            'raise ValueError("below " + str(0))',
            'return "thing " + str(1)',
        ):
            assert kept in one.source


def test_only_files_asked_for_are_changed():
    assert wanted("a/b.py", []) and wanted("a/b.py", ["a"]) and wanted("a/b.py", ["x", "a/b.py"])
    assert not wanted("ab.py", ["a"]) and not wanted("a/b.py", ["a/c.py"])


def test_the_report_names_survivors_and_lines_that_nothing_watches():
    one, two = (Mutant("a.py", line, "constant", f"x = {line}", f"x = {line + 1}", "") for line in (3, 4))
    other = Mutant("a.py", 3, "statement", "x = 3", "pass", "")
    outcomes = (
        Outcome(one, "survived", "", ("c",)),
        Outcome(other, "killed", "NUMERIC.logits", ("c",)),
        Outcome(two, "survived", "COST.lower_peak", ("c",)),
        Outcome(two, "timeout", "no answer", ("c",)),
    )
    report = Report(".", 7, 50, outcomes, 1.5)
    assert report.kill_rate == 0.5 and report.unnoticed_lines == []
    assert Report(".", 7, 50, outcomes[:3], 1.5).unnoticed_lines == ["a.py:4"]
    said = text(report)
    assert "a.py:3 constant\n  - x = 3\n  + x = 4\n" in said and "(additive: COST.lower_peak)" in said
    assert "2 of 4 mutants noticed (50.0%), 1 of them by not ending; 2 survived; seed 7, 50 possible" in said
    assert json.loads(json.dumps(report.as_json()))["by"]["NUMERIC.logits"] == 1


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path, "main")


def test_a_copy_changes_and_comes_back_while_the_tree_stays(tree):
    before = fingerprint(tree)
    with Copy(resolve(str(tree))) as copy:
        held = (copy.target.folder / "models/config.py").read_bytes()
        with copy.changed({"models/config.py": "x = 1\n", "new/a.py": ""}) as target:
            assert (target.folder / "models/config.py").read_text() == "x = 1\n" and (
                target.folder / "new/a.py"
            ).exists()
        assert (copy.target.folder / "models/config.py").read_bytes() == held
        assert not (copy.target.folder / "new/a.py").exists()
    assert fingerprint(tree) == before and not copy.target.folder.exists()


@pytest.mark.slow
def test_mutants_of_a_fork_are_drawn_by_seed_and_mostly_noticed(tree):
    before = fingerprint(tree)
    combos = [load()["siglip2-smollm2"]]
    report = mutate(resolve(str(tree)), combos, seed=3, count=8, paths=["backbone/towers.py"])
    assert fingerprint(tree) == before, "the target itself is not touched"
    assert len(report.outcomes) == 8 < report.possible and report.kill_rate >= 0.5
    assert all(outcome.mutant.file == "backbone/towers.py" for outcome in report.outcomes)
    every = [one for one in mutants("backbone/towers.py", (tree / "backbone/towers.py").read_text())]
    assert len(every) == report.possible
    with pytest.raises(NothingToMutate, match=r"there are: .*backbone/towers.py"):
        mutate(resolve(str(tree)), combos, count=1, paths=["nowhere"])


@pytest.mark.slow
def test_what_does_not_end_is_late_what_cannot_be_imported_is_not(tree):
    model = (tree / "backbone/towers.py").read_text(encoding="utf-8")
    combo = load()["siglip2-smollm2"]
    with Bench(resolve(str(tree)), workers=1) as bench:

        def asked(new: str):
            return bench.pool.submit(bench.compared, {"backbone/towers.py": new}, combo, 20.0).result()

        assert asked(model).verdict == "identical"
        with pytest.raises(NotJudged) as endless:
            asked("while True:\n    pass\n" + model)
        assert endless.value.late
        with pytest.raises(NotJudged, match="nonsense") as broken:
            asked("import nonsense\n" + model)
        assert not broken.value.late
        assert asked(model).verdict == "identical", "the worker goes on"


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--count", "x"], ["--timeout", "0"]])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(SystemExit) as ended:
        main(["mutate", ".", *wrong])
    assert ended.value.code == 2


def test_wrong_arguments_end_with_one_line(capsys, tmp_path):
    assert main(["mutate", "nowhere"]) == 2
    assert main(["mutate", ".", "--combo", "none"]) == 2
    assert main(["mutate", ".", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
