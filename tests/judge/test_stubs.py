"""Stand-ins for packages that are not installed: the target may mention them, all others see the truth."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from compat.child import stubs
from compat.child.protocol import NotSupported
from compat.process import Child
from compat.process import NotSupported as Skip
from compat.target import resolve
from tests.judge.trees import COMBO, MODEL, make_tree, put

ABSENT = next(
    name
    for name in ("gradio", "streamlit", "xformers", "decord", "liger_kernel")
    if importlib.util.find_spec(name) is None
)


@pytest.fixture
def target(tmp_path, monkeypatch):
    """import_(text): run text as a module of a target with stand-ins installed; all is undone afterwards."""
    monkeypatch.setattr(stubs, "settle_transformers", lambda: None)  # seconds, and a test of its own below
    monkeypatch.setattr(importlib.util, "find_spec", importlib.util.find_spec)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    stand_ins = stubs.StandIns(str(tmp_path))
    stand_ins.install()
    count = iter(range(100))

    def import_(text):
        name = f"fork_module_{next(count)}"
        put(tmp_path / f"{name}.py", text.replace("ABSENT", ABSENT))
        importlib.invalidate_caches()
        return importlib.import_module(name)

    import_.used = stand_ins.used
    yield import_
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    "text",
    [
        "import ABSENT",
        "import ABSENT.a.b as c",
        "from ABSENT import transforms",
        "from ABSENT.deep.inner import Thing",
        "from ABSENT import *",
        "def f():\n    import ABSENT\nf()",
    ],
)
def test_the_target_can_import_what_is_not_installed(target, text):
    target(text)
    assert target.used == [ABSENT]


def test_names_can_be_mentioned_in_every_ordinary_way(target):
    module = target(
        "import ABSENT as tv\n"
        "from ABSENT.transforms import Compose\n"
        "class Mine(tv.nn.Module): pass\n"
        "def f(x: tv.Tensor | None, y: 'int' = tv.CONSTANT) -> tv.Thing[int]: return x\n"
        "TABLE = {'a': Compose, 'b': tv.functional.resize}\n"
    )
    assert isinstance(module.Mine(), module.Mine) and module.f(3) == 3
    assert repr(module.TABLE["b"]) == f"<{ABSENT}.functional.resize, not installed>"


@pytest.mark.parametrize("use", ["tv.resize(1)", "tv.transforms.Compose([])", "tv.a.b.c.d()", "Thing(2)"])
def test_calling_one_is_a_skip_that_names_the_package(target, use):
    module = target(f"import ABSENT as tv\nfrom ABSENT.inner import Thing\ndef f():\n    return {use}\n")
    with pytest.raises(NotSupported, match=f"^needs {ABSENT}, which is not installed"):
        module.f()


@pytest.mark.parametrize(
    "guard", ["ImportError", "ModuleNotFoundError", "(ValueError, ImportError)", "Exception", ""]
)
def test_a_target_that_can_do_without_is_left_to_do_without(target, guard):
    module = target(
        f"try:\n    import ABSENT\n    HAS = True\nexcept {guard}:\n    HAS = False\n".replace(
            "except :", "except:"
        )
    )
    assert module.HAS is False and target.used == []


def test_a_try_for_something_else_is_no_guard(target):
    module = target(
        "try:\n    import ABSENT\n    HAS = True\nexcept ValueError:\n    HAS = False\nfinally:\n    pass\n"
    )
    assert module.HAS is True and target.used == [ABSENT]


def test_the_fallback_in_a_guard_is_no_guarded_import(target):
    module = target("try:\n    import nowhere_at_all\nexcept ImportError:\n    import ABSENT as other\n")
    assert repr(module.other.thing) == f"<{ABSENT}.thing, not installed>"


def test_nobody_else_gets_a_stand_in(target, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    put(elsewhere / "not_of_the_target.py", f"import {ABSENT}\n")
    sys.path.append(str(elsewhere))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("not_of_the_target")
    assert target.used == []


def test_who_asks_whether_it_is_installed_is_told_no(target):
    module = target("import ABSENT\nimport importlib.util\nFOUND = importlib.util.find_spec('ABSENT')\n")
    assert module.FOUND is None and importlib.util.find_spec(ABSENT) is None
    assert importlib.util.find_spec("json") is not None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(ABSENT)


def test_a_package_of_unknown_use_is_missing_for_the_target_too(target):
    with pytest.raises(ModuleNotFoundError, match="my_own_kernels"):
        target("import my_own_kernels\n")


def test_an_installed_package_is_the_real_one(target):
    assert target("import PIL\n").PIL is sys.modules["PIL"]
    assert target.used == []


def test_a_submodule_an_installed_package_lacks_stays_missing(target):
    with pytest.raises(ModuleNotFoundError, match="PIL.nowhere_at_all"):
        target("import PIL.nowhere_at_all\n")


# -- a whole tree --------------------------------------------------------------------------------------------

TRANSFORMERS = """
import torchvision.transforms as transforms
from torchvision.transforms.functional import resize
from transformers import AutoTokenizer
from transformers.utils import is_torchvision_available
import importlib.util
found = importlib.util.find_spec("torchvision") is not None
print("transformers sees torchvision:", is_torchvision_available(), found)


def get_tokenizer(name, extra_special_tokens=None, chat_template=None):
    tokenizer = AutoTokenizer.from_pretrained(name, extra_special_tokens=extra_special_tokens)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def get_image_processor(max_img_size, splitted_image_size):
    return transforms.Compose([transforms.Resize(max_img_size), transforms.ToTensor()])
"""


@pytest.fixture(scope="module")
def with_transformers(tmp_path_factory):
    """The main tree with AutoTokenizer and torchvision, which is mentioned before transformers is."""
    pytest.importorskip("transformers")
    tree = make_tree(
        tmp_path_factory.mktemp("stubs"), "main", {MODEL: [("import torch\n", "import torch\nimport peft\n")]}
    )
    put(tree / "data/processors.py", TRANSFORMERS)
    for unused in ("datasets", "collators"):
        (tree / f"data/{unused}.py").unlink()
    with Child(resolve(str(tree))) as child:
        child.ask("describe", combo=COMBO)
        yield child


def test_transformers_is_not_fooled_by_a_stand_in(with_transformers):
    there = importlib.util.find_spec("torchvision") is not None
    assert f"transformers sees torchvision: {there} {there}" in with_transformers.output


def test_a_tree_with_stand_ins_computes_what_it_can(with_transformers):
    row = {"tokens": [-1, 40, 41, 42], "images": [0], "labels": [-100, 41, 42, -100]}
    assert with_transformers.ask("forward", combo=COMBO, rows=[row])["finite"] is True


def test_what_needs_the_package_is_a_skip_that_names_it(with_transformers):
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed here")
    with pytest.raises(Skip, match="needs torchvision, which is not installed"):
        with_transformers.ask("process_image", combo=COMBO, sizes=[[32, 32]])


def test_auto_tokenizer_reads_the_stand_in_s_files(with_transformers):
    texts = ["the cat and the hat", "\n\n12"]
    reply = with_transformers.ask("tokenize", combo=COMBO, texts=texts)
    assert reply["decoded"] == texts and reply["ids"][0] == reply["reference_ids"][0]
    assert reply["special"]["image_token"] == ["<|image|>", 320] and reply["length"] == 338
    # transformers 5 rebuilds a GPT2Tokenizer without the digits step of tokenizer.json; 4 reads the file.
    drifts = int(with_transformers.hello["transformers"].split(".")[0]) >= 5
    assert (reply["ids"][1] != reply["reference_ids"][1]) is drifts
