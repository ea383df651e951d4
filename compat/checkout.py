"""A git ref as a folder, without touching the repository it comes from.

Unusual: git never checks anything out here. A private bare repository in the cache borrows the source's
objects through ``objects/info/alternates`` (nothing is copied, nothing is written into the source), and
files are written from ``cat-file --batch``. So no hook, filter, fsmonitor, attribute or submodule of the
target ever runs, and a blob that is missing (partial clone, pruned asset) costs that one file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


class CheckoutError(Exception):
    """A ref cannot be turned into a folder. ``exit_code`` is 2 for a wrong argument, 3 otherwise."""

    def __init__(self, message: str, exit_code: int = 3):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Checkout:
    """Files of one commit in the cache. ``missing`` are paths whose blob the source does not have."""

    folder: Path
    commit: str
    missing: tuple[str, ...]


def cache_folder() -> Path:
    """Where private clones and extracted trees live: $COMPAT_CACHE, else the user's cache folder."""
    explicit = os.environ.get("COMPAT_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanovlm-compat"


def checkout(folder: Path, ref: str) -> Checkout:
    """Files of ``ref`` of the repository around ``folder``, at the same sub-folder, in the cache.

    Raises CheckoutError: ref begins with '-', no repository, no such commit (naming fetch-depth when the
    clone is shallow), a tree that cannot be read.
    """
    if ref.startswith("-") or not ref:
        raise CheckoutError(f"'{ref}' is not a ref: a ref may not be empty or begin with '-'", 2)
    common = repository(folder)
    if common is None:
        raise CheckoutError(f"{folder} is not inside a git repository, so '@{ref}' names nothing", 2)
    bare = _git(folder, "rev-parse", "--is-inside-work-tree", check=False).strip() != "true"
    prefix = "" if bare else _git(folder, "rev-parse", "--show-prefix").rstrip("\n")
    commit = resolve_commit(folder, ref)
    try:
        root, missing = _files_of(_private_clone(common), commit)
    except OSError as error:
        raise CheckoutError(
            f"the files of {commit[:12]} cannot be written below {cache_folder()}: "
            f"{error.strerror or error}; "
            "set COMPAT_CACHE to a folder that can hold them"
        ) from None
    if prefix and not (root / prefix).is_dir():
        raise CheckoutError(f"commit {commit[:12]} has no folder {prefix.rstrip('/')}")
    return Checkout(root / prefix if prefix else root, commit, missing)


def _files_of(private: Path, commit: str) -> tuple[Path, tuple[str, ...]]:
    """(folder, missing paths) of a commit's files in the cache."""
    tree = _git(private, "rev-parse", "--verify", f"{commit}^{{tree}}").strip()
    target = cache_folder() / "trees" / tree
    if _touched(target):
        shutil.rmtree(target)
    if not (target / ".complete").exists():
        _extract(private, commit, target)
    missing = _read_missing(target)
    if missing:  # the source may have fetched them since
        entries = [entry for entry in _listing(private, commit) if entry[2] in missing]
        missing = _write_files(private, entries, target / "files")
        _write_missing(target, missing)
    return target / "files", missing


def _touched(target: Path) -> bool:
    """Whether a target that ran there before wrote into its own files: the next run gets the commit's."""
    try:
        written = (target / ".complete").stat().st_ctime_ns  # always written last
    except FileNotFoundError:
        return False
    every = (Path(at, name) for at, folders, files in os.walk(target / "files") for name in [".", *folders, *files])
    return any(path.lstat().st_ctime_ns > written for path in every)


def repository(folder: Path) -> Path | None:
    """The common git directory around ``folder``, or None."""
    found = _git(folder, "rev-parse", "--git-common-dir", check=False).rstrip("\n")
    return (folder / found).resolve() if found else None


def resolve_commit(folder: Path, ref: str) -> str:
    """The full commit hash of ``ref``. Raises CheckoutError when it is not there."""
    found = _git(
        folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}", check=False
    )
    if found.strip():
        return found.strip()
    if _git(folder, "rev-parse", "--is-shallow-repository", check=False).strip() == "true":
        raise CheckoutError(
            f"'{ref}' is not in this shallow clone; fetch more history (in CI set fetch-depth: 0, "
            f"or run git fetch --unshallow)"
        )
    raise CheckoutError(f"'{ref}' names no commit of {folder}; git branch -a and git tag list what exists", 2)


def top(folder: Path) -> Path:
    """The root of the checkout around ``folder``; the folder itself outside git and in a bare repository."""
    found = _git(folder, "rev-parse", "--show-cdup", check=False).rstrip("\n")
    return (folder / found).resolve()


def prefix(folder: Path) -> str:
    """Where ``folder`` lies in its repository: "" at the root, else "research/vlm"."""
    return _git(folder, "rev-parse", "--show-prefix", check=False).rstrip("\n").rstrip("/")


def default_branch(folder: Path) -> str | None:
    """What changes are merged into, as a ref: origin's HEAD, else main or master there, else here."""
    named = _git(folder, "symbolic-ref", "--quiet", "--short", "refs/remotes/origin/HEAD", check=False).strip()
    here = [f"refs/heads/{name}" for name in ("main", "master")]
    there = [f"refs/remotes/origin/{name}" for name in ("main", "master")]
    for ref in [*([f"refs/remotes/{named}"] if named else []), *there, *here]:
        if _git(folder, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", check=False).strip():
            return ref.removeprefix("refs/remotes/").removeprefix("refs/heads/")
    return None


def current_branch(folder: Path) -> str | None:
    """The branch that is checked out; None when HEAD is detached."""
    return _git(folder, "symbolic-ref", "--quiet", "--short", "HEAD", check=False).strip() or None


def merge_base(folder: Path, one: str, other: str) -> str | None:
    """The newest commit that both have; None where the repository at hand shows none."""
    return _git(folder, "merge-base", "--end-of-options", one, other, check=False).strip() or None


def is_shallow(folder: Path) -> bool:
    return _git(folder, "rev-parse", "--is-shallow-repository", check=False).strip() == "true"


def between(folder: Path, goods: list[str], bad: str) -> list[str]:
    """Ancestors of ``bad`` that are none of ``goods``, ``bad`` itself among them; the most telling one first."""
    listed = _git(folder, "rev-list", "--bisect-all", bad, *(f"^{good}" for good in goods))
    return [line.split()[0] for line in listed.splitlines()]


def history(folder: Path, good: str, bad: str) -> list[str]:
    """Commits after ``good`` up to ``bad``, parents before children."""
    return _git(folder, "rev-list", "--topo-order", "--reverse", bad, f"^{good}").split()


def is_ancestor(folder: Path, one: str, other: str) -> bool:
    return merge_base(folder, one, other) == one


def subject(folder: Path, commit: str) -> str:
    """ "1a2b3c4d5e (2026-11-21, A. Name) what the commit says of itself"."""
    return _git(folder, "log", "-1", "--no-show-signature", "--format=%h (%as, %an) %s", "--abbrev=10", commit).strip()


def head_commit(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout in ``folder``; (None, None) outside a repository. Runs no hook.

    The log does not count: a run that writes it must not make the next one dirty.
    """
    if repository(folder) is None:
        return None, None
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD", check=False).strip() or None
    # A filter configured in the target's own .git/config would run on every file whose stat changed.
    # Switched off by environment, since `-c name=value` cannot spell a filter whose name holds an '='.
    pattern = r"^filter\..*\.(clean|process|required)$"
    filters = _git(folder, "config", "-z", "--name-only", "--get-regexp", pattern, check=False)
    off = {"GIT_CONFIG_COUNT": "0"}
    for number, name in enumerate(filter(None, filters.split("\0"))):
        off |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": ""}
        off["GIT_CONFIG_COUNT"] = str(number + 1)
    words = ("--porcelain", "--untracked-files=normal", "--ignore-submodules=all")
    try:
        status = _git(folder, "status", *words, "--", ".", ":(exclude)MODIFICATIONS_LOG.md", more=off)
    except CheckoutError:  # a bare repository, or an index that cannot be read
        return commit, None
    return commit, bool(status.strip())


def tags(folder: Path, most: int = 50) -> list[dict]:
    """The newest tags of the repository around ``folder``: name, date, commit, subject; none outside of one."""
    words = ("refname:strip=2", "creatordate:short", "objectname", "*objectname", "contents:subject")
    form = "%00".join(f"%({word})" for word in words)
    try:
        newest = ("--sort=-creatordate", f"--count={most}", f"--format={form}", "refs/tags")
        told = _git(folder, "for-each-ref", *newest, check=False)
    except CheckoutError:
        return []
    found = []
    for line in told.splitlines():
        name, date, tagged, commit, subject = (line.split("\0") + [""] * 5)[:5]
        found.append({"name": name, "date": date, "commit": commit or tagged, "subject": subject[:200]})
    return found


def _private_clone(common: Path) -> Path:
    """A bare repository in the cache that reads the source's objects; one for each place of a source."""
    name = hashlib.sha256(os.fsencode(common)).hexdigest()[:24]
    clone = cache_folder() / "clones" / f"{name}.git"
    alternates = clone / "objects" / "info" / "alternates"
    if not alternates.exists():
        clone.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=clone.parent))
        objects = _git(common, "rev-parse", "--show-object-format", check=False).strip() or "sha1"
        _git(fresh, "init", "--quiet", "--bare", "--template=", f"--object-format={objects}", str(fresh))
        (fresh / "objects" / "info").mkdir(parents=True, exist_ok=True)
        (fresh / "objects" / "info" / "alternates").write_bytes(os.fsencode(common / "objects") + b"\n")
        try:
            fresh.rename(clone)
        except OSError:  # another run made it first
            shutil.rmtree(fresh)
    shallow = common / "shallow"
    if shallow.exists():
        shutil.copyfile(shallow, clone / "shallow")
    return clone


def _extract(private: Path, commit: str, target: Path) -> None:
    """Write the commit's files below ``target``/files; list what is missing in ``target``/.complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent))
    (fresh / "files").mkdir()
    _write_missing(fresh, _write_files(private, _listing(private, commit), fresh / "files"))
    try:
        fresh.rename(target)
    except OSError:  # another run made it first, or one was cleared away by half
        if (target / ".complete").exists():
            shutil.rmtree(fresh)
        else:
            shutil.rmtree(target)
            fresh.rename(target)


def _listing(private: Path, commit: str) -> list[tuple[str, str, str]]:
    """(mode, hash, path) of every file of the commit. Submodules ('commit' entries) are never followed."""
    entries = []
    for line in filter(None, _git(private, "ls-tree", "-r", "-z", "--full-tree", commit).split("\0")):
        meta, path = line.split("\t", 1)
        mode, kind, sha = meta.split()
        if kind == "blob" and _inside(path):
            entries.append((mode, sha, path))
    return entries


def _write_files(private: Path, entries: list[tuple[str, str, str]], root: Path) -> tuple[str, ...]:
    """Write entries below ``root``. The paths whose blob the source does not have come back."""
    missing, links = [], []
    command = [*_GIT, "-C", str(private), "cat-file", "--batch"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
    ) as git:
        for mode, sha, path in entries:
            git.stdin.write(sha.encode() + b"\n")
            git.stdin.flush()
            header = git.stdout.readline().split()
            if len(header) != 3:
                missing.append(path)
                continue
            content = git.stdout.read(int(header[2]))
            git.stdout.read(1)
            if mode == "120000":
                links.append((path, os.fsdecode(content)))
                continue
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            if mode == "100755":
                file.chmod(0o755)
        git.stdin.close()
    for path, destination in links:  # last, so that no file is ever written through a link
        file = root / path
        resolved = os.path.normpath(os.path.join(os.path.dirname(path), destination))
        if not os.path.isabs(destination) and _inside(resolved) and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(destination)
    return tuple(missing)


def _write_missing(target: Path, missing: tuple[str, ...]) -> None:
    (target / ".complete").write_bytes(os.fsencode("\0".join(missing)))


def _read_missing(target: Path) -> tuple[str, ...]:
    return tuple(filter(None, os.fsdecode((target / ".complete").read_bytes()).split("\0")))


def _inside(path: str) -> bool:
    parts = Path(path).parts
    return bool(parts) and not os.path.isabs(path) and ".." not in parts and parts[0] != ".git"


# What a repository's own configuration could make git run is switched off on the command line, which
# has the last word; safe.directory because a checkout may belong to another user.
_GIT = [
    "git",
    "-c", "core.hooksPath=/dev/null",
    "-c", "core.fsmonitor=false",
    "-c", "core.untrackedCache=false",
    "-c", "core.attributesFile=/dev/null",
    "-c", "submodule.recurse=false",
    "-c", "safe.directory=*",
    "-c", "core.quotePath=false",
]  # fmt: skip


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "SYSTEMROOT") if name in os.environ}
    return kept | {
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",  # outranks the protocols the target's configuration allows
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_OPTIONAL_LOCKS": "0",  # git status would refresh the index of the target
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C.UTF-8",
    }


def _git(folder: Path, *arguments: str, check: bool = True, more: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            [*_GIT, "-C", str(folder), *arguments],
            capture_output=True,
            env=_environment() | (more or {}),
            timeout=120,
            check=False,
        )
    except FileNotFoundError:
        raise CheckoutError("git is not installed, and a ref needs it") from None
    except subprocess.TimeoutExpired:
        raise CheckoutError(f"git {arguments[0]} did not answer within 120 s in {folder}") from None
    if done.returncode and check:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise CheckoutError(
            f"git {arguments[0]} failed in {folder}: {reason[-1] if reason else done.returncode}"
        )
    return done.stdout.decode(errors="surrogateescape") if not done.returncode else ""
