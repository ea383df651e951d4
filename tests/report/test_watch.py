"""`compat run --watch`: what a change can affect, by what each check had loaded; everything where that is unsure."""

from __future__ import annotations

import os

import pytest

from compat import cli
from compat.combo import choose as choose_combos
from compat.plugin import Silent
from compat.result import Run
from compat.several import judge_several
from compat.suites import choose as choose_suites
from compat.target import resolve
from compat.watch import Loaded, Observed, affected, changed, finder, snapshot, wait, watch
from tests.judge.trees import make_tree

CHECKS = ("Config Compatibility", "Generate Method", "Data Pipeline")
MODEL = frozenset({"models/vlm.py"})
LOADED = dict(zip(CHECKS, (MODEL, MODEL | {"models/sampling.py"}, MODEL | {"data/collate.py"}), strict=True))
FILES = ("models/vlm.py", "models/sampling.py", "data/collate.py", "train.py", "config.json")


@pytest.fixture
def tree(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    return tmp_path


def asked(names, before=FILES, after=FILES, **more) -> tuple[str, ...]:
    sides = ({name: (1, 1, 1) for name in side} for side in (before, after))
    return affected(names, *sides, LOADED, CHECKS, **more).checks


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["models/vlm.py"], CHECKS),
        (["models/sampling.py"], ("Generate Method",)),
        (["data/collate.py"], ("Data Pipeline",)),
        (["data/collate.py", "models/sampling.py"], ("Generate Method", "Data Pipeline")),
        (["train.py"], ()),
        (["train.py", "data/collate.py"], ("Data Pipeline",)),
        (["config.json"], CHECKS),
    ],
)
def test_a_changed_file_affects_the_checks_that_had_loaded_it(names, wanted):
    assert asked(names) == wanted


def test_what_is_not_settled_by_that_affects_everything():
    assert asked(["new.py"], after=(*FILES, "new.py")) == CHECKS
    assert asked(["train.py"], after=[name for name in FILES if name != "train.py"]) == CHECKS
    assert asked(["train.py"], moved=True) == CHECKS


def test_a_check_that_was_never_asked_to_its_end_is_always_affected():
    one = {name: (1, 1, 1) for name in FILES}
    known = {check: files for check, files in LOADED.items() if check != "Generate Method"}
    assert affected(["train.py"], one, one, known, CHECKS).checks == ("Generate Method",)


def test_a_snapshot_sees_every_kind_of_change_and_no_by_product(tree):
    before = snapshot(tree)
    assert set(before) == set(FILES)
    for name in (".git/index", ".compat/runs/x.json", "models/__pycache__/vlm.pyc", "README.md", "MODIFICATIONS_LOG.md",
                 "env/pyvenv.cfg", "env/lib/x.py", "models/vlm.py~"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    assert changed(before, snapshot(tree)) == []
    (tree / "models/vlm.py").write_text("x = 22\n")
    (tree / "train.py").unlink()
    (tree / "new.py").symlink_to("nowhere")
    assert changed(before, snapshot(tree)) == ["models/vlm.py", "train.py"]


def test_a_file_put_in_place_with_an_old_time_is_a_change(tree):
    before = snapshot(tree)
    status = (tree / "train.py").stat()
    (tree / "other").write_text("x = 2\n")
    os.utime(tree / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(tree / "other", tree / "train.py")
    assert changed(before, snapshot(tree)) == ["train.py"]


def test_it_waits_until_files_are_still(tree):
    writes = iter(["", "a = 1\n", "a = 12\n", "a = 123\n", "", ""])
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if text := next(writes):
            (tree / "train.py").write_text(text)

    after = wait(tree, snapshot(tree), sleep)
    assert after == snapshot(tree) and (tree / "train.py").read_text() == "a = 123\n" and len(slept) == 5


class Loop:
    """watch() with a written list of changes; ends by Ctrl-C when there is none left."""

    def __init__(self, tree, changes, answers=None):
        self.asked, self.said = [], []
        self.answers = answers or {}
        self.changes = iter(changes)
        self.still = False
        with pytest.raises(KeyboardInterrupt):
            watch(tree, CHECKS, self.ask, self.said.append, lambda: self.found, self.sleep)

    found = "model"

    def ask(self, checks):
        self.asked.append(checks)
        whole = self.answers.get(len(self.asked), True)
        return ({check: LOADED[check] for check in checks} if whole else {}), whole

    def sleep(self, seconds):
        if self.still:  # the second look after a change
            self.still = False
            return
        change = next(self.changes, None)
        if change is None:
            raise KeyboardInterrupt
        change(self)
        self.still = True


def write(path, text="x = 2\n"):
    def change(loop):
        path.write_text(text + f"# {len(loop.asked)}, {len(loop.said)}\n")

    return change


def test_everything_first_then_what_each_change_affects(tree):
    loop = Loop(tree, [write(tree / "data/collate.py"), write(tree / "train.py"), write(tree / "models/vlm.py")])
    assert loop.asked == [CHECKS, ("Data Pipeline",), CHECKS]
    assert "no check has loaded train.py: nothing to ask" in loop.said
    assert "data/collate.py: Data Pipeline" in loop.said and "models/vlm.py: all checks" in loop.said


def test_a_run_that_broke_off_is_owed_until_one_is_whole(tree):
    changes = [write(tree / "models/vlm.py", "def f(:\n"), write(tree / "train.py"), write(tree / "train.py")]
    loop = Loop(tree, changes, answers={2: False})
    assert loop.asked == [CHECKS, CHECKS, CHECKS]
    assert loop.said[-1] == "no check has loaded train.py: nothing to ask"


def test_a_model_that_discovery_finds_elsewhere_is_asked_everything(tree):
    def move(loop):
        write(tree / "train.py")(loop)
        loop.found = "another"

    assert Loop(tree, [move]).asked == [CHECKS, CHECKS]


def test_discovery_is_the_child_s_own(tmp_path):
    tree = make_tree(tmp_path, "v02")
    find = finder(resolve(str(tree)))
    first = find()
    assert first.model.name == "VisionLanguageModel"
    text = (tree / "models/vision_language_model.py").read_text()
    (tree / "models/vision_language_model.py").write_text(text + "\n# a comment\n")
    assert find() == first
    (tree / "models/vision_language_model.py").write_text(text.replace("VisionLanguageModel", "Other"))
    assert find() != first


@pytest.mark.parametrize(
    ("words", "why"),
    [(["--json", "x"], "keeps nothing"), (["--log", "x.md"], "keeps nothing"), (["--junit", "x"], "keeps nothing")],
)
def test_what_it_would_not_keep_is_refused(tree, monkeypatch, tmp_path_factory, capsys, words, why):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    assert cli.main(["run", str(tree), "--watch", *words]) == 2 and why in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_process_tells_which_check_loaded_what(tmp_path):
    pick = "        pick = likeliest if greedy else drawn\n"
    lazy = [(pick, f"        import late\n\n{pick}        pick = late.same(pick)\n")]
    late = "def same(value):\n    return value\n"
    tree = make_tree(tmp_path, "v02", {"models/vision_language_model.py": lazy}, {"late.py": late})

    class Quiet(Silent):
        def stop(self):
            """No bar."""

    loaded = Loaded(Quiet())

    def make_child():
        loaded.child = Observed(resolve(str(tree)))
        return loaded.child

    run = Run.begin({"label": "."}, "tiny", ["siglip2-smollm2"])
    judge_several(run, make_child, choose_combos(None), choose_suites(["config", "generate"]), 600, loaded)
    loaded.note()
    assert not run.incomplete and set(loaded.by_check) == {"Config Compatibility", "Generate Method"}
    config, generate = (loaded.by_check[name] for name in ("Config Compatibility", "Generate Method"))
    assert "models/vision_language_model.py" in config and "late.py" not in config
    assert "late.py" in generate and config < generate
