"""Safetensors files: read one tensor at a time after the header was checked, written atomically.

Unusual: the reader is our own. Everything the header claims is compared with the file before memory is
taken, errors name the entry, and tensors are read into place: nothing is mapped, so resident memory grows
by what is kept. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovlm.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # torch's own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor of one file; ``start`` counts bytes from the file's beginning."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class Checkpoint:
    """All tensors of one or several safetensors files, read when asked for.

    Raises WeightsError for a file that is no safetensors file, whose entries overlap, leave gaps, lie about
    their size or appear twice, or that is shorter or longer than its header says.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.where = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} shards)"
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            entries, metadata = read_header(path)
            for name, entry in entries.items():
                if name in self.entries:
                    raise WeightsError(f"{name} is in two files: {self.entries[name].path.name} and {path.name}")
                self.entries[name] = entry
            self.metadata.update(metadata)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """{name: shape}."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def like(self, name: str) -> Tensor:
        """The tensor's shape and dtype, on the meta device."""
        entry = self.entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """The tensor in the file's own dtype, in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            view = tensor.view(torch.uint8).numpy().data
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise WeightsError(
                        f"{entry.path}: {name} ends after {done} of {len(view)} bytes; did the file change?"
                    )
                done += count
        return tensor.view(entry.shape)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries, metadata) of one file, checked against its size."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise WeightsError(f"{path}: {size} bytes with a header of {length}: truncated, or no safetensors file")
            raw = file.read(length)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number without end
        raise WeightsError(f"{path}: the header is no JSON ({error}); is this a safetensors file?") from None
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the header is a {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path}: __metadata__ holds other things than text")
    first = 8 + length
    entries, ends = {}, {}
    for name, claim in header.items():
        dtype, shape, begin, end = _claim(path, name, claim)
        wanted = math.prod(shape) * dtype.itemsize
        if end - begin != wanted:
            raise WeightsError(
                f"{path}: {name} claims {end - begin} bytes, but {tuple(shape)} of {dtype} takes {wanted}"
            )
        entries[name], ends[name] = Entry(path, dtype, tuple(shape), first + begin), first + end
    at, last = first, "the header"
    for name in sorted(entries, key=lambda n: (entries[n].start, ends[n])):
        if entries[name].start != at:
            what = "overlaps" if entries[name].start < at else "leaves a gap after"
            raise WeightsError(
                f"{path}: {name} begins at byte {entries[name].start} and {what} {last}, which ends at {at}"
            )
        at, last = ends[name], name
    if at != size:
        raise WeightsError(f"{path}: the header describes {at} bytes, the file has {size}; was the download cut off?")
    return entries, metadata


def _claim(path: Path, name: str, claim: Any) -> tuple[torch.dtype, list[int], int, int]:
    """(dtype, shape, begin, end) of a header's entry."""
    try:
        code, shape, (begin, end) = claim["dtype"], claim["shape"], claim["data_offsets"]
        # the product of a hundred million sizes would take hours, so they are counted first
        whole = isinstance(code, str) and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        whole = whole and all(type(n) is int and 0 <= n < 1 << 62 for n in [*shape, begin, end])
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise WeightsError(f"{path}: the entry of {name} is malformed; expected dtype, shape and data_offsets")
    if code not in DTYPES:
        raise WeightsError(f"{path}: {name} has dtype {code}; these can be read: {', '.join(DTYPES)}")
    return DTYPES[code], shape, begin, end


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise WeightsError(f"{path}: {next(n for n in names if names.count(n) > 1)} appears twice in the header")
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; whatever happens, ``path`` holds the old file or the whole new one."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata=dict(metadata) or None,
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file as atomically as write_tensors."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class replacing:
    """A temporary file beside ``path`` that takes its place when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        with open(self.temporary, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        self.temporary.chmod(0o666 & ~mask)  # mkstemp's 0600 would keep a shared checkpoint to its writer
        os.replace(self.temporary, self.path)
