"""What may be judged: a folder, FOLDER@REF, package.module:Class, file.py:Class.

Nothing here imports or runs the target; the child finds the model inside the folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from compat.checkout import CheckoutError, checkout, head_commit

_NAME = r"[A-Za-z_]\w*"
_DOTTED = re.compile(rf"({_NAME}(?:\.{_NAME})*):({_NAME})")
_FILE = re.compile(rf"(.+\.py):({_NAME})")


class TargetError(Exception):
    """TARGET cannot be resolved. ``exit_code`` is 2 for a wrong argument, 3 when it could not be read."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Target:
    """A resolved target.

    label: as the user wrote it. folder: the checkout, the child's working directory. module, cls: set
    when the user named the class. file: set for file.py:Class. commit, dirty: None outside git.
    missing: files of a ref whose blob the repository does not have. source: the folder a ref was asked of.
    """

    label: str
    folder: Path
    module: str | None = None
    cls: str | None = None
    file: Path | None = None
    ref: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    missing: tuple[str, ...] = ()
    source: Path | None = None

    def as_dict(self) -> dict:
        """What the child needs to find the model."""
        return {
            "folder": str(self.folder),
            "module": self.module,
            "cls": self.cls,
            "file": str(self.file) if self.file else None,
            "missing": list(self.missing),
        }


def resolve(text: str) -> Target:
    """The Target that ``text`` names. Raises TargetError with one sentence."""
    folder = Path(text)
    if text and folder.is_dir():  # an empty text would be the current folder: more likely an unset variable
        return _with_commit(text, folder.resolve())
    if match := _FILE.fullmatch(text):
        file = Path(match[1])
        if not file.is_file():
            raise TargetError(f"{file} is not a file; file.py:Class needs an existing Python file")
        return _with_commit(text, _project_of(file.resolve()), file=file.resolve(), cls=match[2])
    if match := _DOTTED.fullmatch(text):
        return _with_commit(text, Path.cwd(), module=match[1], cls=match[2])
    # A ref may hold '@' itself (HEAD@{1}), so the folder is the longest prefix that exists.
    for at in reversed([i for i, c in enumerate(text) if c == "@"]):
        folder = Path(text[:at] or ".")
        if folder.is_dir():
            return _at_ref(text, folder.resolve(), text[at + 1 :])
    raise TargetError(
        f"'{text}' is no target: give a folder, FOLDER@REF, package.module:Class or file.py:Class"
        + ("" if "/" not in text and "." not in text else " that exists here")
    )


def at_commit(target: Target, ref: str) -> Target:
    """The same target in another commit of its repository. Raises TargetError."""
    name = target.label.removesuffix(f"@{target.ref}") if target.ref else target.label
    found = _at_ref(f"{name}@{ref}", target.source or target.folder, ref)
    file = target.file and found.folder / target.file.relative_to(target.folder)
    return replace(found, module=target.module, cls=target.cls, file=file)


def _project_of(file: Path) -> Path:
    """The folder a file's imports may reach up to: its checkout, else the current folder, else its own."""
    checkouts = [parent for parent in file.parents if (parent / ".git").exists()]
    around = [parent for parent in file.parents if parent == Path.cwd()]
    return next(iter(checkouts or around), file.parent)


def _at_ref(label: str, folder: Path, ref: str) -> Target:
    try:
        found = checkout(folder, ref)
    except CheckoutError as error:
        raise TargetError(str(error), error.exit_code) from None
    return Target(label, found.folder, None, None, None, ref, found.commit, False, found.missing, folder)


def _with_commit(label: str, folder: Path, **named) -> Target:
    try:
        commit, dirty = head_commit(folder)
    except CheckoutError:  # git absent or silent: the folder itself can still be judged
        commit, dirty = None, None
    return Target(label, folder, commit=commit, dirty=dirty, **named)
