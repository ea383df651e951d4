"""Data sets of the Hub, or of folders that hold its files, through the ``datasets`` library.

Unusual: pictures stay encoded until they are needed, so one that is broken costs its row alone. A part that
cannot be read stops the run: training on the rest would be another run.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from nanovlm.errors import DataError

FILES = ("parquet", "arrow")


def parts(path: str, names: tuple[str, ...]) -> list[str]:
    """Names of the parts that ``--train_dataset_name`` means: themselves, ``all`` there are, or ``shards``.

    Raises DataError.
    """
    if "shards" in names:
        found = sorted(folder.name for folder in Path(path).glob("shard_*") if folder.is_dir())
        if not found:
            raise DataError(f"{path} holds no folders shard_0, shard_1, ...; those are what the name 'shards' reads")
        return sorted(found, key=lambda name: (len(name), name))
    if "all" not in names:
        return list(names)
    if Path(path).is_dir():
        found = sorted(folder.name for folder in Path(path).iterdir() if folder.is_dir() and holds_data(folder))
        return found or ["default"]
    try:
        return _datasets().get_dataset_config_names(path)
    except Exception as error:  # the library and the Hub's client raise what they like
        raise _unreadable(path, None, error) from None


def holds_data(folder: Path) -> bool:
    """Whether a folder holds files that ``datasets`` writes or reads, itself or below."""
    return any(next(folder.rglob(f"*.{kind}"), None) is not None for kind in FILES)


def rows(path: str, names: tuple[str, ...]) -> Any:
    """All parts as one data set with numbered rows."""
    found = [_load(path, name, False) for name in parts(path, names)]
    return found[0] if len(found) == 1 else _datasets().concatenate_datasets(found)


class Stream:
    """All parts as one data set that is read forward; called with the number of an epoch."""

    def __init__(self, path: str, names: tuple[str, ...]) -> None:
        self.path, self.names = path, parts(path, names)
        self._peek()

    def _peek(self) -> None:
        for name in self.names:
            stream = _load(self.path, name, True)
            try:
                first = list(itertools.islice(stream, 1))
            except Exception as error:
                raise _unreadable(self.path, name, error) from None
            if not first:
                raise DataError(f"{self.path}, part {name!r} has no rows")

    def __call__(self, epoch: int) -> Any:
        found = [_load(self.path, name, True) for name in self.names]
        return found[0] if len(found) == 1 else _datasets().concatenate_datasets(found)


def _load(path: str, name: str, streaming: bool) -> Any:
    datasets = _datasets()
    folder = Path(path)
    try:
        if not folder.is_dir():
            made = datasets.load_dataset(path, None if name == "default" else name, split="train", streaming=streaming)
        else:
            within = folder if name == "default" else folder / name
            if not within.is_dir():
                there = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) or "none"
                raise DataError(f"{path} has no part {name!r}; its folders: {there}")
            if (within / "state.json").exists():  # written by save_to_disk
                made = datasets.load_from_disk(str(within))
                made = made.to_iterable_dataset(num_shards=min(64, len(made))) if streaming else made
            else:
                made = _from_files(datasets, within, streaming)
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(path, name, error) from None
    return _encoded(datasets, made)


def _from_files(datasets: Any, folder: Path, streaming: bool) -> Any:
    for kind in FILES:
        files = sorted(str(file) for file in folder.rglob(f"*.{kind}"))
        train = [file for file in files if Path(file).name.startswith("train")] or files
        if train:
            return datasets.load_dataset(kind, data_files=train, split="train", streaming=streaming)
    raise DataError(f"{folder} holds neither parquet nor arrow files, nor what save_to_disk writes")


def _encoded(datasets: Any, made: Any) -> Any:
    """The same with pictures as {"bytes", "path"}."""
    features = made.features or {}
    for column in ("images", "image"):
        kind: Any = features.get(column)
        if isinstance(kind, datasets.Image):
            made = made.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            made = made.cast_column(column, type(kind)(datasets.Image(decode=False)))
    return made


def _unreadable(path: str, name: str | None, error: Exception) -> DataError:
    part = "" if name in (None, "default") else f", part {name!r}"
    said = str(error).strip().splitlines()
    return DataError(
        f"data set {path}{part} cannot be read: {type(error).__name__}: {said[0] if said else 'no reason given'}. "
        "Name a repository of the Hub, a folder with parquet or JSONL files, or synthetic"
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data sets of the Hub need the package datasets: pip install 'nanovlm[train]'. "
            "A folder with a JSONL file, and synthetic, need nothing more"
        ) from None
    datasets.disable_progress_bars()
    return datasets
