"""A folder of pictures and a JSONL file whose lines are rows; pictures are named relative to the folder.

Unusual: only where each line begins is kept in memory, so a file may be larger than that. A line that is no
row is a BadRow in its place.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovlm.errors import BadRow, DataError


def jsonl_files(folder: Path) -> list[Path]:
    """The JSONL files of a folder, by name. Raises DataError if it may not be read."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".jsonl")
    except PermissionError:
        raise DataError(f"{folder} may not be read: permission denied; chmod u+rx it") from None


class LocalRows:
    """Rows of the JSONL files of a folder, one after the other."""

    def __init__(self, folder: str | os.PathLike, files: list[Path] | None = None) -> None:
        self.folder = Path(folder)
        self.files = jsonl_files(self.folder) if files is None else files
        self.starts = array("q")
        self.ends_of_files: list[int] = []
        for path in self.files:
            try:
                with path.open("rb") as file:
                    at = 0
                    for line in file:
                        if line.strip():
                            self.starts.append(at)
                        at += len(line)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None
            self.ends_of_files.append(len(self.starts))
        if not self.starts:
            raise DataError(
                f"{self.folder} has no row: expected a .jsonl file with lines such as "
                '{"images": ["cat.png"], "texts": [{"user": "What is this?", "assistant": "A cat."}]}'
            )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        path = next(path for path, end in zip(self.files, self.ends_of_files, strict=True) if number < end)
        try:
            with path.open("rb") as file:
                file.seek(self.starts[number])
                row = json.loads(file.readline())
        except (OSError, ValueError) as error:
            raise BadRow("no JSON", f"{path.name}, row {number}: {error}") from None
        if not isinstance(row, Mapping):
            raise BadRow("no JSON", f"{path.name}, row {number}: a {type(row).__name__}, expected an object")
        return {key: self._placed(value) if key in ("images", "image") else value for key, value in row.items()}

    def _placed(self, pictures: Any) -> Any:
        if isinstance(pictures, str):
            return self.folder / pictures
        return [self._placed(picture) for picture in pictures] if isinstance(pictures, list) else pictures
