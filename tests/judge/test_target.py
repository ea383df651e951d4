"""What the command line may name, and what it is told when it names something else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from compat.process import Child, CouldNotAsk
from compat.target import TargetError, resolve
from tests.judge.trees import COMBO, MODEL, make_tree, put


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_folder_is_itself(here):
    (here / "fork").mkdir()
    for text in (".", "fork", str(here)):
        target = resolve(text)
        assert (target.label, target.folder) == (text, Path(text).resolve())
        assert (target.module, target.cls, target.file, target.ref, target.missing) == (
            None,
            None,
            None,
            None,
            (),
        )


def test_a_folder_wins_over_every_other_reading(here):
    for name in ("a@b", "x.y:Z", "file.py:Class"):
        (here / name).mkdir()
        assert resolve(name).folder == here / name


def test_a_class_is_named_by_module_or_file(here):
    target = resolve("package.module:Class_1")
    assert (target.module, target.cls, target.file, target.folder) == (
        "package.module",
        "Class_1",
        None,
        here,
    )
    put(here / "deep/file.py", "")
    target = resolve("deep/file.py:Model")
    assert (target.module, target.cls, target.file) == (None, "Model", here / "deep/file.py")
    assert target.folder == here  # imports may start anywhere between the file and here
    assert target.as_dict() == {
        "folder": str(here),
        "module": None,
        "cls": "Model",
        "file": str(here / "deep/file.py"),
        "missing": [],
    }


def test_a_file_s_imports_reach_up_to_its_checkout_or_to_where_we_are(here, tmp_path):
    put(tmp_path / "far/away/file.py", "")
    text = f"{tmp_path}/far/away/file.py:Model"
    assert resolve(text).folder == tmp_path / "far/away"
    (tmp_path / "far/.git").mkdir()
    assert resolve(text).folder == tmp_path / "far"


def test_an_at_sign_in_a_folder_or_a_ref_is_understood(here):
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "COMPAT_CACHE": str(here / "cache")}
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    folder = here / "user@host"
    folder.mkdir()
    for command in (["init", "--quiet"], [*author, "commit", "--quiet", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True, env=environment)
    target = resolve("user@host@HEAD@{0}")
    assert target.ref == "HEAD@{0}" and len(target.commit) == 40 and target.dirty is False
    assert resolve("user@host@@").commit == target.commit  # @ alone is HEAD


@pytest.mark.parametrize(
    "text", ["", "nowhere", "nowhere@main", "a b", "fork:", ":Class", "1module:Class", "pkg:a.b", "@"]
)
def test_what_names_nothing_is_a_usage_error_that_lists_the_forms(here, text):
    with pytest.raises(TargetError) as caught:
        resolve(text)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20


def test_the_forms_are_listed(here):
    with pytest.raises(TargetError, match="give a folder, FOLDER@REF, package.module:Class or file.py:Class"):
        resolve("nowhere")
    with pytest.raises(
        TargetError, match="nowhere.py is not a file; file.py:Class needs an existing Python file"
    ):
        resolve("nowhere.py:Class")


def test_a_dirty_checkout_says_so_but_for_the_log(here, tmp_path):
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], [*author, "commit", "--quiet", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", str(here), *command], check=True, env=environment)
    assert resolve(".").dirty is False
    put(here / "MODIFICATIONS_LOG.md", "an entry\n")
    assert resolve(".").dirty is False
    put(here / "new.py", "")
    assert resolve(".").dirty is True


# -- a class named by the user, in the child -----------------------------------------------------------------


@pytest.fixture(scope="module")
def two_models(tmp_path_factory) -> Path:
    """A checkout whose package `models` has the model, a poorer copy and a module that passes it on."""
    tree = make_tree(tmp_path_factory.mktemp("named"), "main")
    text = (tree / MODEL).read_text()
    put(
        tree / "models/variant.py",
        text.replace("def generate(", "def generate_more(")
        .replace("greedy=False", "also=1")
        .replace(
            "    def forward(",
            "    def generate(self, input_ids, images, max_new_tokens=1):\n        return input_ids\n\n"
            "    def forward(",
        ),
    )
    put(tree / "models/api.py", "from .inner import VLM\n")
    put(tree / "models/inner.py", "from models.vision_language_model import VisionLanguageModel as VLM\n")
    return tree


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("models.variant:VisionLanguageModel", "models.variant:VisionLanguageModel"),
        ("models.api:VLM", "models.vision_language_model:VisionLanguageModel"),
        ("models/variant.py:VisionLanguageModel", "models.variant:VisionLanguageModel"),
    ],
)
def test_the_class_that_was_named_is_the_one_that_is_asked(two_models, monkeypatch, text, found):
    monkeypatch.chdir(two_models)
    with Child(resolve(text)) as child:
        assert child.ask("describe", combo=COMBO)["model_class"] == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("models.variant:Nobody", "module models.variant defines no class Nobody"),
        ("models.nowhere:Model", "no module named 'models.nowhere' can be imported"),
        ("nowhere_at_all:Model", "no module named 'nowhere_at_all' can be imported"),
        ("models/variant.py:Nobody", "no class Nobody is defined in variant.py"),
    ],
)
def test_a_class_that_is_not_there_is_told_in_one_sentence(two_models, monkeypatch, text, sentence):
    monkeypatch.chdir(two_models)
    with Child(resolve(text)) as child:
        with pytest.raises(CouldNotAsk, match=sentence) as caught:
            child.ask("describe", combo=COMBO)
        assert "\n" not in str(caught.value)
