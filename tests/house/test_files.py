"""Properties of the tree itself: nothing of one machine in it, links that lead somewhere, pins that hold."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.house.tree import ROOT, files

# Written in pieces, so that this file does not contain what it looks for.
OF_ONE_MACHINE = [
    r"(?<![\w.])/" + folder + r"/\w" for folder in ("work", "root", "home", "Users", "tmp", "private", "mnt")
] + [r"py" + r"pi\.org", r"python" + r"hosted", r"download\.py" + r"torch\.org"]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")


def text_of(path):
    data = (ROOT / path).read_bytes()
    return "" if b"\0" in data else data.decode("utf-8")


@pytest.mark.parametrize("pattern", OF_ONE_MACHINE)
def test_no_file_names_a_place_of_one_machine(pattern):
    looked = [path for path in files() if path.suffix != ".ipynb"]
    assert len(looked) > 20
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in looked
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found


def test_the_patterns_find_what_they_are_for():
    line = "cd /" + "work/main && ls /" + "tmp/x; https://" + "py" + "pi.org"
    assert sum(bool(re.search(pattern, line)) for pattern in OF_ONE_MACHINE) == 3


def test_every_link_between_documents_leads_somewhere():
    pages = [path for path in files() if path.suffix == ".md" and path.name != "MODIFICATIONS_LOG.md"]
    links = [(page, link) for page in pages for link, _ in LINK.findall(text_of(page)) if "://" not in link]
    assert links
    assert not [f"{page}: {link}" for page, link in links if not (ROOT / page.parent / link).exists()]


def test_every_page_in_docs_is_reached_from_its_index():
    index = {link for link, _ in LINK.findall(text_of("docs/index.md"))}
    pages = {path.name for path in files() if path.parts[0] == "docs" and path.suffix == ".md"} - {"index.md"}
    assert pages <= index


def pins() -> dict[str, str]:
    lines = [line for line in text_of("constraints.txt").splitlines() if not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_every_direct_dependency_is_pinned_to_one_plain_version():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} <= set(pins())
    assert not [version for version in pins().values() if not re.fullmatch(r"[\d.]+", version)]


def test_a_pin_is_never_below_the_lower_bound():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name, bound = line.split(">=")
        numbers = [[int(part) for part in version.split(".")] for version in (pins()[name], bound)]
        assert numbers[0] >= numbers[1], line


def test_workflow_actions_are_pinned_by_commit_and_the_token_only_reads():
    workflow = text_of(".github/workflows/ci.yml")
    uses = re.findall(r"uses: *(\S+)", workflow)
    assert uses and all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action) for action in uses)
    assert "permissions:\n  contents: read\n" in workflow
    assert "bash .ci/run" in workflow
