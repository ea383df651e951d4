"""The checks: each module is one, its CHECK the title it has in the table and in the log.

Titles are read from the source, not by importing it, so that listing them costs no numpy and no pytest.
A new file test_NAME.py with a docstring and a CHECK is all that a new check needs.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
# The order people know from their logs; a check that is not named here follows by file name.
FAMILIAR = (
    "config",
    "signature",
    "forward",
    "generate",
    "backward",
    "save_load",
    "tokenizer",
    "train_config",
    "state_dict",
    "edge_cases",
    "data",
    "backbones",
    "vram",
)


class UnknownSuite(ValueError):
    """A --suite name that no module answers to; the message lists those that exist."""


@dataclass(frozen=True)
class Suite:
    """name: "save_load". title: "Save Load Methods". about: the first line of the module's docstring."""

    name: str
    title: str
    about: str
    path: Path


def catalogue(folder: Path = FOLDER) -> list[Suite]:
    """Every check in the order it is run. Raises ValueError for a module without CHECK or docstring."""
    suites = [_read(path) for path in folder.glob("test_*.py")]
    known = {name: place for place, name in enumerate(FAMILIAR)}
    return sorted(suites, key=lambda suite: (known.get(suite.name, len(known)), suite.name))


def choose(names: list[str] | None, folder: Path = FOLDER) -> list[Suite]:
    """The suites named by module name or title (case and punctuation aside); all of them without names."""
    suites = catalogue(folder)
    if not names:
        return suites
    wanted = {_key(name) for name in names}
    unknown = [
        name
        for name in names
        if _key(name) not in {_key(s.name) for s in suites} | {_key(s.title) for s in suites}
    ]
    if unknown:
        there = ", ".join(suite.name for suite in suites)
        raise UnknownSuite(f"no suite named {', '.join(map(repr, unknown))}; there are: {there}")
    return [suite for suite in suites if wanted & {_key(suite.name), _key(suite.title)}]


def _key(name: str) -> str:
    return "".join(c for c in name.lower().removeprefix("test_").removesuffix(".py") if c.isalnum())


def _read(path: Path) -> Suite:
    tree = ast.parse(path.read_bytes())
    about = (ast.get_docstring(tree) or "").partition("\n")[0]
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["CHECK"]:
            title = ast.literal_eval(node.value)
            break
    else:
        raise ValueError(f'{path.name} has no CHECK = "Title" line')
    if not about:
        raise ValueError(f"{path.name} has no docstring saying what it checks")
    return Suite(path.stem.removeprefix("test_"), title, about, path)
