"""Who may import whom, read from the source: imports inside functions too, those for type checkers not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house.tree import ROOT

# read by everything, so nothing but the standard library
PLAIN = {"config", "train_config", "checks", "errors", "registry", "presets"}
LAST = {"train", "evaluate", "measure", "commands"}

# module of nanovlm, or folder -> the modules of nanovlm it may import; what is not named here is free
MAY_IMPORT = {
    "config": PLAIN,
    "train_config": PLAIN,
    "checks": PLAIN,
    "errors": PLAIN,
    "registry": PLAIN,
    "presets": PLAIN,
    "recompute": PLAIN,
    "loss": PLAIN,
    "layers": PLAIN | {"recompute"},
    "cache": PLAIN,
    "checkpoint": PLAIN,
    "hub": PLAIN,
    "weights": PLAIN | {"checkpoint", "hub"},
    "projector": PLAIN | {"layers", "pooling"},
    "pooling": PLAIN | {"layers"},
    "data": PLAIN | {"images", "prompts", "data"},
    "vision": PLAIN | {"layers", "cache", "recompute", "weights"},
    "language": PLAIN | {"layers", "cache", "recompute", "weights"},
}
# what a target may bring or lack: the child imports these only where it finds them
MAY_BE_MISSING: set[str] = set()
# distribution in pyproject.toml -> what it is imported as, where the two differ
IMPORTED_AS = {"huggingface-hub": "huggingface_hub", "lmms-eval": "lmms_eval", "pillow": "PIL"}


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no module below {package}/"
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that ``source`` imports; ``from a import b`` gives a.b, relative ones made absolute."""
    found = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return found


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def top(name: str) -> str:
    return name.partition(".")[0]


def test_the_reader_sees_relative_late_and_type_only_imports():
    source = (
        "import torch.nn as nn\n"
        "from . import errors\n"
        "from ..layers import RMSNorm\n"
        "if TYPE_CHECKING:\n    import transformers\nelse:\n    import json\n"
        "def late():\n    from compat.cli import main\n"
    )
    assert imports(source, "nanovlm.vision.siglip") == {
        "torch.nn", "nanovlm.vision.errors", "nanovlm.layers.RMSNorm", "json", "compat.cli.main",
    }  # fmt: skip
    assert imports("from . import siglip", "nanovlm.vision", is_package=True) == {"nanovlm.vision.siglip"}


@pytest.mark.parametrize("path", modules("nanovlm"), ids=name_of)
def test_the_model_knows_neither_the_judge_nor_transformers(path):
    assert not {name for name in imports_of(path) if inside(name, "compat", "transformers")}


@pytest.mark.parametrize("path", modules("nanovlm"), ids=name_of)
def test_a_module_of_the_model_imports_only_what_lies_below_it(path):
    module = name_of(path).removeprefix("nanovlm").removeprefix(".")
    part = top(module)
    mine = {name.removeprefix("nanovlm.") for name in imports_of(path) if name.startswith("nanovlm.")}
    if part in MAY_IMPORT:
        above = {name for name in mine if top(name) not in MAY_IMPORT[part]}
        if path.name == "__init__.py" and part in ("vision", "language"):
            above = {name for name in above if top(name) != part}
        assert not above, f"{module} may import {sorted(MAY_IMPORT[part])} of nanovlm"
    if part == "vlm":
        named = {name for name in mine if top(name) in ("vision", "language")}
        assert not named, "backbones are named by the registry alone"
    if part not in LAST | {"cli", "__main__", ""}:
        assert not {name for name in mine if top(name) in LAST | {"cli"}}, "these come last"


@pytest.mark.parametrize("part", sorted(PLAIN))
def test_what_everything_reads_needs_the_standard_library_alone(part):
    others = {name for name in imports_of(ROOT / "nanovlm" / f"{part}.py") if top(name) != "nanovlm"}
    assert {top(name) for name in others} <= sys.stdlib_module_names


@pytest.mark.parametrize("part", ["layers", "cache"])
def test_layers_and_cache_need_torch_alone(part):
    others = {name for name in imports_of(ROOT / "nanovlm" / f"{part}.py") if top(name) != "nanovlm"}
    assert {top(name) for name in others} <= sys.stdlib_module_names | {"torch"}


JUDGE = [path for path in modules("compat") if "child" not in path.relative_to(ROOT).parts]
CHILD = [path for path in modules("compat") if "child" in path.relative_to(ROOT).parts]


@pytest.mark.parametrize("path", JUDGE, ids=name_of)
def test_the_judge_itself_imports_no_torch_and_no_model(path):
    assert not {name for name in imports_of(path) if inside(name, "torch", "transformers", "nanovlm")}


@pytest.mark.parametrize("path", CHILD, ids=name_of)
def test_the_child_imports_nothing_of_the_judge_and_models_only_in_adapters(path):
    names = imports_of(path)
    assert not {name for name in names if inside(name, "compat") and not inside(name, "compat.child")}
    if "adapters" not in path.parts:
        assert not {name for name in names if inside(name, "nanovlm")}


@pytest.mark.parametrize("command", ["compat.cli", "nanovlm"])
def test_a_command_that_only_reads_loads_neither_torch_nor_transformers(command):
    ask = f"import {command}, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr


def test_every_package_imported_is_declared_and_the_reverse():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = [*project["dependencies"], *extras]
    names = {re.match(r"[\w-]+", line)[0] for line in declared}
    declared = {IMPORTED_AS.get(name, name) for name in names}
    used = {top(name) for path in modules("nanovlm") + modules("compat") for name in imports_of(path)}
    needed = used - sys.stdlib_module_names - {"nanovlm", "compat"} - MAY_BE_MISSING
    assert needed == declared
