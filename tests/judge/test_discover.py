"""The model is found by what its code defines: never by a name, and without running any of it."""

from __future__ import annotations

import os

import pytest

from compat.child.discover import (
    MAX_BYTES,
    Place,
    broken_files,
    discover,
    imported_from,
    module_name,
    parse,
    python_files,
)
from compat.process import Child, CouldNotAsk
from compat.target import resolve
from tests.judge.trees import COMBO, put

MODEL = """
from torch import nn
class {name}(nn.Module):
    def __init__(self, cfg):
        self.vision_encoder, self.decoder = None, None
    def forward(self, input_ids, {images}, attention_mask=None, targets=None): ...
    def generate(self, input_ids, {images}, max_new_tokens=5): ...
"""
CONFIG = """
class {name}:
    vit_hidden_dim: int = 8
    vit_img_size: int = 8
    lm_hidden_dim: int = 8
    lm_vocab_size: int = 8
"""
TRAIN = "class {name}:\n    lr_mp: float = 1.0\n    batch_size: int = 2\n    compile: bool = False\n"


def model(name="Anything", images="images", head=""):
    return head + MODEL.format(name=name, images=images)


def tree(folder, files):
    for name, text in files.items():
        put(folder / name, text)
    return str(folder)


def found(folder, files, **named):
    return discover(tree(folder, files), **named)


@pytest.mark.parametrize("images", ["images", "image", "pixel_values"])
def test_names_of_classes_and_files_do_not_matter(tmp_path, images):
    hit = found(
        tmp_path,
        {
            "a/b.py": model("Zebra", images),
            "a/c.py": CONFIG.format(name="Stripes") + TRAIN.format(name="Run"),
        },
    )
    assert (hit.model.name, hit.config.name, hit.train_config.name) == ("Zebra", "Stripes", "Run")
    assert hit.others == []


@pytest.mark.parametrize(
    "code",
    [
        "class App:\n    def forward(self, request): ...\n    def generate(self): ...\n",
        "from torch import nn\nclass Text(nn.Module):\n    def forward(self, input_ids): ...\n"
        "    def generate(self, input_ids): ...\n",
        "from torch import nn\nclass Tower(nn.Module):\n    def forward(self, images): ...\n",
        "class NoModule:\n    def forward(self, input_ids, images): ...\n"
        "    def generate(self, input_ids, images): ...\n",
        "def forward(input_ids, images): ...\n",
        "",
        "# only words\n",
    ],
    ids=["a server", "a text model", "a vision tower", "no Module", "a function", "nothing", "a comment"],
)
def test_what_lacks_a_part_is_no_model(tmp_path, code):
    assert found(tmp_path, {"x.py": code, "config.py": CONFIG.format(name="C")}) is None


def test_an_empty_folder_holds_none(tmp_path):
    assert discover(str(tmp_path)) is None


def test_the_fullest_model_wins_and_the_others_are_named(tmp_path):
    full = model("Full") + "    def from_pretrained(self): ...\n    def save_pretrained(self): ...\n"
    hit = found(tmp_path, {"a.py": model("Plain"), "z/deep/b.py": full, "config.py": CONFIG.format(name="C")})
    assert hit.model.name == "Full" and hit.others == ["a.py:Plain"]


def test_of_equals_the_one_nearest_to_the_top_wins(tmp_path):
    files = {"old/copy/vlm.py": model(), "vlm.py": model(), "config.py": CONFIG.format(name="C")}
    assert found(tmp_path, files).model.module == "vlm"


def test_of_equals_that_lie_as_deep_none_is_guessed_and_a_variant_is_no_equal(tmp_path):
    files = {"a.py": model("One"), "b.py": model("Two"), "config.py": CONFIG.format(name="C")}
    assert found(tmp_path, files).rivals == ["a.py:One", "b.py:Two"]
    with Child(resolve(str(tmp_path))) as child, pytest.raises(CouldNotAsk, match="2 classes look like") as caught:
        child.ask("describe", combo=COMBO)
    assert "a.py:One, b.py:Two; name one instead of the folder, as FOLDER/a.py:One" in str(caught.value)
    variant = model("Two").replace("nn.Module", "One")
    assert found(tmp_path, {"b.py": "from a import One\n" + variant}).rivals == ["a.py:One"]


@pytest.mark.parametrize(
    "skipped", ["tests", ".hidden", "node_modules", "venv/lib", "build", "a/b/c/d/e/f/g/h"]
)
def test_tests_environments_and_hidden_folders_are_not_looked_into(tmp_path, skipped):
    put(tmp_path / "venv/pyvenv.cfg", "home = x\n")
    assert found(tmp_path, {f"{skipped}/vlm.py": model(), "test_vlm.py": model()}) is None


def test_files_that_cannot_be_read_are_passed_over_and_can_be_named(tmp_path):
    folder = tree(
        tmp_path,
        {
            "vlm.py": model(),
            "config.py": CONFIG.format(name="C"),
            "broken.py": "def f(:\n",
            "old.py": "print 'two'\n",
            "large.py": "x = 1\n" * (MAX_BYTES // 6 + 1),
            "deep.py": "(" * 5000 + ")" * 5000,
        },
    )
    (tmp_path / "binary.py").write_bytes(b"\x00\xff\xfe")
    (tmp_path / "gone.py").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.py")  # opening it would wait for ever
    (tmp_path / "loop").symlink_to(tmp_path)
    assert discover(folder).model.name == "Anything"
    named = broken_files(folder)
    assert [entry.split(" ")[0] for entry in named] == [
        "binary.py",
        "broken.py",
        "deep.py",
        "large.py",
        "old.py",
    ]
    assert next(entry for entry in named if entry.startswith("broken")) == "broken.py line 1 (invalid syntax)"
    assert parse(str(tmp_path / "pipe.py")) is None


def test_the_file_decides_its_encoding(tmp_path):
    (tmp_path / "vlm.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n" + model().encode())
    assert discover(str(tmp_path)).model.module == "vlm"


# -- configs -------------------------------------------------------------------------------------------------


def test_a_config_beside_the_model_is_preferred_to_an_equal_one_elsewhere(tmp_path):
    hit = found(
        tmp_path,
        {
            "models/vlm.py": model(head="import models.config\n"),
            "models/config.py": CONFIG.format(name="Near"),
            "aaa/config.py": CONFIG.format(name="Far"),
        },
    )
    assert hit.config == Place("models.config", "Near")


@pytest.mark.parametrize(
    "body",
    [
        "    def __init__(self, **k):\n        self.vit_hidden_dim = 1\n"
        "        self.lm_hidden_dim = 2\n        self.lm_n_heads = 3\n"
        "        self.lm_vocab_size: int = 4\n",
        "    def __init__(self, a, b):\n        self.vit_hidden_dim, self.lm_hidden_dim = a, b\n"
        "        (self.lm_n_heads, self.x) = a, b\n"
        "        self.y = self.lm_vocab_size = 4\n",
        "    vit_hidden_dim = 1\n    lm_hidden_dim = 2\n    lm_n_heads = 3\n    lm_vocab_size = 4\n",
        "    vit_hidden_dim: int\n    lm_hidden_dim: int\n    lm_n_heads: int = 3\n"
        "    lm_vocab_size: int = 4\n",
    ],
    ids=["set in __init__", "several at once", "class attributes", "annotations"],
)
def test_a_config_need_not_be_a_dataclass(tmp_path, body):
    hit = found(tmp_path, {"vlm.py": model(), "settings.py": "class Settings:\n" + body})
    assert hit.config == Place("settings", "Settings")


def test_a_model_is_not_taken_for_its_own_config(tmp_path):
    greedy = model().replace(
        "self.vision_encoder, self.decoder = None, None",
        "; ".join(
            f"self.{field} = 1"
            for field in ("vit_hidden_dim", "lm_hidden_dim", "lm_n_heads", "lm_vocab_size")
        ),
    )
    assert found(tmp_path, {"vlm.py": greedy}).config is None


# -- where imports start -------------------------------------------------------------------------------------


def test_absolute_imports_show_where_the_project_starts(tmp_path):
    hit = found(
        tmp_path,
        {
            "research/vlm/models/vlm.py": model(head="from models.config import C\n"),
            "research/vlm/models/config.py": CONFIG.format(name="C"),
            "models/other.py": "",
        },
    )
    assert hit.root == str(tmp_path / "research/vlm") and hit.model.module == "models.vlm"


def test_relative_imports_are_made_from_above_the_package(tmp_path):
    files = {f"src/pkg/{name}": "" for name in ("__init__.py", "models/__init__.py", "data/__init__.py")}
    files |= {
        "src/pkg/models/vlm.py": model(head="from ..data import x\nfrom .config import C\n"),
        "src/pkg/models/config.py": CONFIG.format(name="C"),
    }
    hit = found(tmp_path, files)
    assert hit.root == str(tmp_path / "src") and hit.model.module == "pkg.models.vlm"
    assert hit.config.module == "pkg.models.config"


def test_a_package_without_imports_of_its_own_starts_above_itself(tmp_path):
    files = {"pkg/__init__.py": "", "pkg/vlm.py": model(), "pkg/config.py": CONFIG.format(name="C")}
    assert found(tmp_path, files).model.module == "pkg.vlm"


def test_a_module_named_like_the_standard_library_decides_nothing(tmp_path):
    files = {
        "top/json/x.py": "",
        "top/inner/vlm.py": model(head="import json\n"),
        "top/inner/config.py": CONFIG.format(name="C"),
    }
    assert found(tmp_path, files).root == str(tmp_path / "top/inner")


def test_a_package_s_init_is_the_package():
    assert module_name("/r/a/b/__init__.py", "/r") == "a.b"
    assert module_name("/r/a/b.py", "/r") == "a.b"
    assert module_name("/r/b.py", "/r") == "b"


# -- a class the user named ----------------------------------------------------------------------------------


def test_a_named_class_is_taken_however_poor(tmp_path):
    files = {"vlm.py": model(), "config.py": CONFIG.format(name="C"), "odd.py": "class Odd:\n    pass\n"}
    assert found(tmp_path, files, cls="Odd").model == Place("odd", "Odd")
    assert discover(str(tmp_path), cls="Nobody") is None


def test_a_named_file_is_the_only_one_whose_classes_are_models(tmp_path):
    files = {
        "vlm.py": model(),
        "variant.py": model(),
        "config.py": CONFIG.format(name="C"),
        "tests/mine.py": model("Mine"),
        "data/words.py": "def get_tokenizer(name): ...\n",
    }
    hit = found(tmp_path, files, cls="Anything", file=str(tmp_path / "variant.py"))
    assert hit.model.module == "variant" and hit.config.module == "config" and hit.others == []
    assert hit.functions["get_tokenizer"] == [Place("data.words", "get_tokenizer")]
    assert discover(str(tmp_path), cls="Mine", file=str(tmp_path / "tests/mine.py")).model.name == "Mine"


def test_what_a_module_passes_on_is_followed(tmp_path):
    root = tree(
        tmp_path,
        {
            "pkg/__init__.py": "from .sub import A as B\nfrom pkg.other import C\nimport os\n",
            "pkg/sub/__init__.py": "from ..impl import A\n",
            "pkg/impl.py": "class A: ...\n",
            "pkg/other.py": "",
        },
    )
    init = os.path.join(root, "pkg/__init__.py")
    assert imported_from(init, "B", root) == (os.path.join(root, "pkg/sub/__init__.py"), "A")
    assert imported_from(os.path.join(root, "pkg/sub/__init__.py"), "A", root) == (
        os.path.join(root, "pkg/impl.py"),
        "A",
    )
    assert imported_from(init, "C", root) == (os.path.join(root, "pkg/other.py"), "C")
    assert imported_from(init, "os", root) is None and imported_from(init, "A", root) is None


def test_functions_of_the_data_side_are_listed_with_their_places(tmp_path):
    hit = found(
        tmp_path,
        {
            "models/vlm.py": model(head="from models.config import C\n"),
            "models/config.py": CONFIG.format(name="C"),
            "data/processors.py": "def get_tokenizer(name): ...\n",
            "scripts/x.py": "def get_tokenizer(): ...\n",
            "data/datasets.py": "class VQADataset: ...\n",
        },
    )
    assert hit.functions["get_tokenizer"] == [
        Place("data.processors", "get_tokenizer"),
        Place("scripts.x", "get_tokenizer"),
    ]
    assert hit.classes["VQADataset"] == [Place("data.datasets", "VQADataset")]


def test_a_huge_folder_is_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("compat.child.discover.MAX_FILES", 5)
    tree(tmp_path, {f"d{n}/f{m}.py": "" for n in range(4) for m in range(4)})
    assert len(python_files(str(tmp_path))) == 5
