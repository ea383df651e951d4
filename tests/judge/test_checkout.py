"""A ref becomes a folder without touching the repository it comes from, or running anything of it."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compat.checkout import CheckoutError, checkout, head_commit
from compat.target import TargetError, resolve
from tests.judge.trees import fingerprint, put

AUTHOR = {
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **AUTHOR},
    )
    return done.stdout.strip()


def plumbing(folder: Path, command: str, data: bytes) -> str:
    """Output of a git command that reads ``data``."""
    done = subprocess.run(["git", "-C", str(folder), *command.split()], input=data, capture_output=True, check=True)
    return done.stdout.decode().strip()


def commit(folder: Path, files: dict[str, str], message: str = "change") -> str:
    for name, text in files.items():
        put(folder / name, text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COMPAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def repository(tmp_path) -> Path:
    """Two commits: file.txt says one, then two; sub/inner.txt is there from the first."""
    folder = tmp_path / "source"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=trunk")
    commit(folder, {"file.txt": "one\n", "sub/inner.txt": "in\n"})
    git(folder, "tag", "first")
    commit(folder, {"file.txt": "two\n"})
    return folder


def text_at(folder: Path, ref: str, file: str = "file.txt") -> str:
    return (checkout(folder, ref).folder / file).read_text()


def test_branch_tag_hash_and_reflog_name_commits(repository):
    git(repository, "branch", "side", "first")
    short = git(repository, "rev-parse", "--short", "first")
    assert [text_at(repository, ref) for ref in ("trunk", "HEAD", "HEAD~0")] == ["two\n"] * 3
    assert [text_at(repository, ref) for ref in ("first", "side", short, "HEAD~1", "HEAD@{1}")] == ["one\n"] * 5
    assert checkout(repository, "first").commit == git(repository, "rev-parse", "first")


def test_an_annotated_tag_is_its_commit(repository):
    git(repository, "tag", "--annotate", "v1", "first", "--message", "v1")
    assert checkout(repository, "v1").commit == git(repository, "rev-parse", "first")


def test_the_working_tree_and_the_index_do_not_count(repository):
    put(repository / "file.txt", "changed\n")
    git(repository, "add", "file.txt")
    put(repository / "more.txt", "untracked\n")
    found = checkout(repository, "HEAD").folder
    assert (found / "file.txt").read_text() == "two\n" and not (found / "more.txt").exists()


def test_a_sub_folder_is_taken_at_the_same_place(repository):
    found = checkout(repository / "sub", "first").folder
    assert found.name == "sub" and (found / "inner.txt").read_text() == "in\n"
    commit(repository, {"new/file.txt": "x"})
    with pytest.raises(CheckoutError, match="has no folder new") as caught:
        checkout(repository / "new", "first")
    assert caught.value.exit_code == 3


def test_the_source_stays_as_it_was_to_the_byte(repository):
    put(repository / "file.txt", "changed\n")
    os.utime(repository / "sub/inner.txt", (1, 1))  # git status would like to refresh its index
    before = fingerprint(repository)
    checkout(repository, "first")
    resolve(f"{repository}@HEAD")
    resolve(str(repository))
    assert fingerprint(repository) == before


def test_bare_repositories_and_worktrees_have_refs_too(repository, tmp_path):
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "bare.git")
    assert text_at(tmp_path / "bare.git", "first") == "one\n"
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "beside"), "first")
    assert text_at(tmp_path / "beside", "HEAD") == "one\n"
    assert text_at(tmp_path / "beside", "trunk") == "two\n"
    assert text_at(tmp_path / "beside" / "sub", "HEAD", "inner.txt") == "in\n"


def test_objects_borrowed_by_the_source_are_found(repository, tmp_path):
    git(tmp_path, "clone", "--quiet", "--shared", str(repository), "borrower")
    assert text_at(tmp_path / "borrower", "first") == "one\n"


def test_the_second_call_is_served_from_the_cache(repository, cache):
    first = checkout(repository, "first")
    inode = (first.folder / "file.txt").stat().st_ino
    assert checkout(repository, "HEAD~1") == first and (first.folder / "file.txt").stat().st_ino == inode
    clones = [path for path in cache.rglob("*.git") if path.is_dir()]
    assert len(clones) == 1


def test_an_interrupted_extraction_is_not_taken_for_a_whole_one(repository, cache):
    found = checkout(repository, "first")
    (found.folder.parent / ".complete").unlink()
    (found.folder / "file.txt").write_text("half")
    assert text_at(repository, "first") == "one\n"


@pytest.mark.parametrize("damage", ["write", "add", "remove"])
def test_a_target_that_writes_into_its_files_does_not_change_the_next_run(repository, damage):
    files = checkout(repository, "trunk").folder
    time.sleep(0.05)  # the clock of file times ticks every few milliseconds
    if damage == "remove":
        (files / "sub" / "inner.txt").unlink()
    else:
        put(files / ("file.txt" if damage == "write" else "sub/new.txt"), "changed\n")
    again = checkout(repository, "trunk").folder
    assert sorted(str(p.relative_to(again)) for p in again.rglob("*.txt")) == ["file.txt", "sub/inner.txt"]
    assert (again / "file.txt").read_text() == "two\n"


def test_two_at_once_get_the_same_whole_folder(repository):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: checkout(repository, "first"), range(8)))
    assert len(set(found)) == 1
    assert fingerprint(found[0].folder).keys() == {"file.txt", "sub", "sub/inner.txt"}


def test_an_executable_stays_one(repository):
    put(repository / "run.sh", "#!/bin/sh\n")
    (repository / "run.sh").chmod(0o755)
    commit(repository, {})
    found = checkout(repository, "HEAD").folder
    assert os.access(found / "run.sh", os.X_OK) and not os.access(found / "file.txt", os.X_OK)


def test_names_that_are_not_ascii_come_out_as_they_are(repository):
    commit(repository, {"größe/日本 語.txt": "x\n", 'with "quotes".txt': "y\n", "line\nbreak.txt": "z\n"})
    found = checkout(repository, "HEAD").folder
    assert {"größe/日本 語.txt", 'with "quotes".txt', "line\nbreak.txt"} <= fingerprint(found).keys()


# -- what a repository may try -------------------------------------------------------------------------------


@pytest.fixture
def booby_trapped(repository, tmp_path) -> tuple[Path, Path]:
    """(repository, alarm): everything git could be made to run writes into the alarm file."""
    alarm = tmp_path / "alarm"
    script = tmp_path / "bite.sh"
    script.write_text(f'#!/bin/sh\necho "$0 $*" >> {alarm}\ncat\n')
    script.chmod(0o755)
    commit(repository, {".gitattributes": "*.txt filter=bite diff=bite text eol=crlf ident\nsub/* filter=a=b\n"})
    config = {
        "core.fsmonitor": script,
        "core.hooksPath": repository / ".git/hooks",
        "core.pager": script,
        "core.editor": script,
        "core.sshCommand": script,
        "core.attributesFile": repository / ".gitattributes",
        "core.gitProxy": script,
        "filter.bite.smudge": script,
        "filter.bite.clean": script,
        "filter.bite.process": script,
        "filter.bite.required": "true",
        "filter.a=b.clean": script,
        "filter.a=b.smudge": script,
        "diff.bite.textconv": script,
        "diff.bite.command": script,
        "diff.external": script,
        "core.alternateRefsCommand": script,
        "uploadpack.packObjectsHook": script,
        "credential.helper": f"!{script}",
        "gpg.program": script,
        "alias.cat-file": f"!{script}",
        "alias.status": f"!{script}",
        "extensions.partialClone": "origin",
        "remote.origin.url": f"ext::{script}",
        "remote.origin.promisor": "true",
        "protocol.ext.allow": "always",
    }
    for hook in (
        "post-checkout",
        "post-index-change",
        "reference-transaction",
        "pre-auto-gc",
        "post-merge",
        "fsmonitor-watchman",
    ):
        (repository / ".git/hooks").mkdir(exist_ok=True)
        put(repository / f".git/hooks/{hook}", script.read_text())
        (repository / f".git/hooks/{hook}").chmod(0o755)
    for name, value in config.items():
        with open(repository / ".git/config", "a") as stream:
            section, key = name.rsplit(".", 1)
            head, _, sub = section.partition(".")
            stream.write(f'[{head}{f" {chr(34)}{sub}{chr(34)}" if sub else ""}]\n\t{key} = "{value}"\n')
    for name in (
        "file.txt",
        "sub/inner.txt",
    ):  # git must look into them again to know that they are as they were
        os.utime(repository / name, (1, 1))
    return repository, alarm


def test_the_trap_would_bite(booby_trapped):
    repository, alarm = booby_trapped
    subprocess.run(
        ["git", "-C", str(repository), "status"],
        capture_output=True,
        check=False,
        env={**os.environ, **AUTHOR},
    )
    assert alarm.exists()


def test_nothing_a_repository_configures_is_run(booby_trapped):
    repository, alarm = booby_trapped
    before = fingerprint(repository)
    assert text_at(repository, "HEAD") == "two\n"  # neither smudged nor converted
    made = (repository / ".git/refs/heads/trunk").read_text().strip()
    assert head_commit(repository) == (made, False)
    assert resolve(str(repository)).commit and resolve(f"{repository}@first").ref == "first"
    assert not alarm.exists(), alarm.read_text()
    assert fingerprint(repository) == before


def test_a_submodule_is_not_followed(repository, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    commit(other, {"inner.txt": "x"})
    git(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other), "module")
    commit(repository, {})
    found = checkout(repository, "HEAD").folder
    assert not (found / "module").exists() and (found / "file.txt").exists()


def test_links_stay_inside_the_folder(repository):
    for name, destination in {
        "etc": "/etc",
        "up": "..",
        "out": "sub/../../secret",
        "in": "sub/inner.txt",
        "git": ".git/config",
        "sub/home": "../file.txt",
        "sub/out": "../../x",
    }.items():
        (repository / name).symlink_to(destination)
    commit(repository, {})
    found = checkout(repository, "HEAD").folder
    links = {str(p.relative_to(found)): os.readlink(p) for p in found.rglob("*") if p.is_symlink()}
    assert links == {"in": "sub/inner.txt", "sub/home": "../file.txt"}


def test_no_file_is_written_through_a_link(repository, tmp_path):
    # A tree made by hand holds 'a' twice, which git itself would never write: as a link and as a folder.
    (tmp_path / "outside").mkdir()
    blob = plumbing(repository, "hash-object -w --stdin", b"bad")
    link = plumbing(repository, "hash-object -w --stdin", os.fsencode(tmp_path / "outside"))
    inner = plumbing(repository, "mktree", f"100644 blob {blob}\tbad.txt\n".encode())
    outer = plumbing(repository, "mktree", f"120000 blob {link}\ta\n040000 tree {inner}\ta\n".encode())
    found = checkout(repository, git(repository, "commit-tree", outer, "-m", "hand made")).folder
    assert list((tmp_path / "outside").iterdir()) == []
    assert fingerprint(found).keys() == {"a", "a/bad.txt"}


@pytest.mark.parametrize("ref", ["-x", "--upload-pack=touch pwned", "--output=pwned", "", "-"])
def test_a_ref_that_looks_like_an_option_is_refused(repository, ref):
    with pytest.raises(CheckoutError, match="may not be empty or begin with '-'") as caught:
        checkout(repository, ref)
    assert caught.value.exit_code == 2
    with pytest.raises(TargetError) as caught:
        resolve(f"{repository}@{ref}")
    assert caught.value.exit_code == 2
    assert not list(repository.glob("pwned*"))


# -- what is not there ---------------------------------------------------------------------------------------


def test_an_unknown_ref_and_a_tree_are_no_commits(repository):
    for ref in ("nowhere", "HEAD:sub", "HEAD~99", "first..trunk"):
        with pytest.raises(CheckoutError, match="names no commit") as caught:
            checkout(repository, ref)
        assert caught.value.exit_code == 2


def test_a_shallow_clone_without_the_commit_names_fetch_depth(repository, tmp_path):
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", "shallow")
    assert text_at(tmp_path / "shallow", "HEAD") == "two\n"
    with pytest.raises(CheckoutError, match="fetch-depth: 0") as caught:
        checkout(tmp_path / "shallow", git(repository, "rev-parse", "first"))
    assert caught.value.exit_code == 3


def test_a_missing_blob_costs_that_file_alone(repository):
    commit(repository, {"weights.bin": "large\n"})
    blob = git(repository, "rev-parse", "HEAD:weights.bin")
    (repository / ".git/objects" / blob[:2] / blob[2:]).unlink()
    found = checkout(repository, "HEAD")
    assert found.missing == ("weights.bin",)
    assert (found.folder / "file.txt").read_text() == "two\n" and not (found.folder / "weights.bin").exists()
    assert resolve(f"{repository}@HEAD").missing == ("weights.bin",)


def test_a_partial_clone_fetches_nothing(repository, tmp_path):
    git(repository, "config", "uploadpack.allowFilter", "true")
    git(tmp_path, "clone", "--quiet", "--filter=blob:none", "--no-checkout", f"file://{repository}", "partial")
    before = fingerprint(tmp_path / "partial")
    found = checkout(tmp_path / "partial", "HEAD")
    assert set(found.missing) == {"file.txt", "sub/inner.txt"}
    assert fingerprint(tmp_path / "partial") == before


def test_files_that_are_missing_now_are_looked_for_again_later(repository):
    commit(repository, {"weights.bin": "large\n"})
    blob = git(repository, "rev-parse", "HEAD:weights.bin")
    path = repository / ".git/objects" / blob[:2] / blob[2:]
    content = path.read_bytes()
    path.unlink()
    assert checkout(repository, "HEAD").missing == ("weights.bin",)
    path.write_bytes(content)
    found = checkout(repository, "HEAD")
    assert found.missing == () and (found.folder / "weights.bin").read_text() == "large\n"


def test_a_repository_of_another_object_format_works(tmp_path):
    git(tmp_path, "init", "--quiet", "--object-format=sha256", "long")
    made = commit(tmp_path / "long", {"file.txt": "x\n"})
    assert len(made) == 64 and text_at(tmp_path / "long", "HEAD") == "x\n"


def test_a_path_that_is_no_utf_8_does_not_stop_the_others(repository):
    with open(os.fsencode(repository) + b"/caf\xe9.txt", "wb") as stream:
        stream.write(b"x")
    commit(repository, {})
    blob = git(repository, "rev-parse", "HEAD:file.txt")
    (repository / ".git/objects" / blob[:2] / blob[2:]).unlink()
    found = checkout(repository, "HEAD")
    assert os.fsencode(found.folder) + b"/caf\xe9.txt" in [os.fsencode(p) for p in found.folder.iterdir()]
    assert found.missing == ("file.txt",)


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(repository, tmp_path, monkeypatch):
    put(tmp_path / "taken", "a file")
    monkeypatch.setenv("COMPAT_CACHE", str(tmp_path / "taken"))
    with pytest.raises(CheckoutError, match="cannot be written below .*taken: .*; set COMPAT_CACHE") as caught:
        checkout(repository, "first")
    assert caught.value.exit_code == 3


def test_a_tree_with_a_file_below_a_file_is_an_error_not_a_crash(repository):
    blob, inner = git(repository, "rev-parse", "HEAD:file.txt"), git(repository, "rev-parse", "HEAD:sub")
    outer = plumbing(repository, "mktree", f"100644 blob {blob}\tsub\n040000 tree {inner}\tsub\n".encode())
    with pytest.raises(CheckoutError, match="cannot be written"):
        checkout(repository, git(repository, "commit-tree", outer, "-m", "hand made"))


def test_an_unborn_head_names_nothing(tmp_path):
    git(tmp_path, "init", "--quiet", "empty")
    assert head_commit(tmp_path / "empty") == (None, False)
    with pytest.raises(CheckoutError, match="names no commit"):
        checkout(tmp_path / "empty", "HEAD")


def test_outside_a_repository_there_are_no_refs(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    plain = tmp_path / "plain"
    plain.mkdir()
    if git_above(plain):
        pytest.skip("the temporary folder lies inside a git repository")
    with pytest.raises(CheckoutError, match="is not inside a git repository, so '@main' names nothing") as caught:
        checkout(plain, "main")
    assert caught.value.exit_code == 2
    assert head_commit(plain) == (None, None)


def git_above(folder: Path) -> bool:
    return any((parent / ".git").exists() for parent in (folder, *folder.parents))


def test_variables_of_git_do_not_lead_elsewhere(repository, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    commit(other, {"file.txt": "other\n"})
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as inside a hook
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    assert text_at(repository, "first") == "one\n"


def test_without_git_a_ref_says_what_is_missing(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match="git is not installed, and a ref needs it") as caught:
        resolve(f"{repository}@first")
    assert caught.value.exit_code == 3
    assert resolve(str(repository)).commit is None
