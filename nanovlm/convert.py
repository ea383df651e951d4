"""A pickled checkpoint (.pth, .pt, .bin) -> a folder with config.json and model.safetensors.

Unusual: a pickle is a program, and this one is not run. torch's weights-only reader knows tensors and plain
containers and stops at every other name; what comes out must be tensors alone, and fit the model that
config.json describes. Until then nothing is written. The file is mapped, so its tensors are not in memory
twice, and each keeps its precision.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm import hub, vlm, weights
from nanovlm.checkpoint import DTYPES
from nanovlm.errors import SourceNotFound, WeightsError

WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name


def convert(
    file: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    key: str | None = None,
) -> weights.LoadReport:
    """Write ``file`` as safetensors, with its config, to ``folder``; what from_pretrained then loads.

    config: the model's config.json; the one beside ``file`` unless given.
    key: the entry of ``file`` that holds the tensors, if they are one entry of several.
    Raises WeightsError naming what is no tensor, does not fit, or would be overwritten; ConfigError.
    """
    file, folder = Path(file), Path(folder)
    config = Path(config) if config is not None else file.parent / "config.json"
    if not file.is_file():
        raise SourceNotFound(f"{file} does not exist, or is no file")
    if not config.is_file():
        raise SourceNotFound(f"{config} does not exist; --config PATH says where the model's config.json is")
    if (folder / hub.WEIGHTS).exists():
        raise WeightsError(f"{folder / hub.WEIGHTS} exists already; remove it, or choose another folder")
    cfg, rules, unused = vlm.read_config(hub.parse_json(config), config.parent)
    stored = Pickled(file, key)
    with torch.device("meta"):
        model = vlm.VisionLanguageModel(cfg, load_backbone=False)
    buffers = {name for name, _ in model.named_buffers()}  # rotary frequencies stay float32 in any model
    kinds = [t.dtype for name, t in stored.tensors.items() if t.is_floating_point() and name not in buffers]
    dtype = reduce(torch.promote_types, kinds) if kinds else None
    report = weights.load(model, stored, rules, ignored=unused, dtype=dtype)
    try:
        model.save_pretrained(folder)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be written: {error.strerror or error}") from None
    return report


class Pickled:
    """The tensors of a pickled file by name. Raises WeightsError for a file that holds anything else."""

    def __init__(self, file: Path, key: str | None = None) -> None:
        self.where = str(file)
        found = _entry(file, _unpickle(file), key)
        for name, value in found.items():
            problem = _not_plain(value)
            if not isinstance(name, str) or problem:
                raise WeightsError(f"{file}: {name!r} is {problem or 'no name'}; expected tensors by name")
        self.tensors: dict[str, Tensor] = _unwrapped(found)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """{name: shape}."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def like(self, name: str) -> Tensor:
        """The tensor's shape and dtype, on the meta device."""
        return torch.empty_like(self.tensors[name], device="meta")

    def read(self, name: str) -> Tensor:
        """The tensor in the file's own dtype."""
        return self.tensors[name].detach()


def _unpickle(file: Path) -> Any:
    """What a file holds, by torch's weights-only reader."""
    try:
        mapped = zipfile.is_zipfile(file)
        if mapped and any(part.compress_type for part in zipfile.ZipFile(file).infolist()):
            raise WeightsError(f"{file} is compressed: it may unpack to any size, and torch.save makes no such")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except WeightsError:
        raise
    except Exception as error:  # a damaged or hostile pickle raises whatever its bytes lead to
        name = re.search(r"(?:GLOBAL|class|type) ([\w.]+)", str(error))
        if name is None:
            reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
            raise WeightsError(f"{file} cannot be read as tensors: {reason}") from None
        raise WeightsError(
            f"{file} holds more than tensors: it asks for {name[1]}, which is not run. "
            "Save model.state_dict() alone, where the file was made"
        ) from None


def _entry(file: Path, found: Any, key: str | None) -> Mapping[Any, Any]:
    """The mapping of tensors: all of the file, or its entry ``key``."""
    entries = found.items() if isinstance(found, Mapping) else ()
    inner = {name: value for name, value in entries if isinstance(value, Mapping)}
    choice = f"; --key NAME picks one of {', '.join(map(repr, inner))}" if inner else ""
    if key is not None:
        if key not in inner:
            raise WeightsError(f"{file} has no entry {key!r} that holds tensors by name{choice}")
        return inner[key]
    if inner:
        raise WeightsError(f"{file}: {next(iter(inner))!r} is a dict, no tensor{choice}")
    if not isinstance(found, Mapping) or not found:
        raise WeightsError(f"{file} holds {_named(found)}; expected tensors by name")
    return found


def _not_plain(value: Any) -> str:
    """What keeps a value from being written as safetensors, or nothing."""
    if type(value) not in (Tensor, nn.Parameter):
        return _named(value)
    if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES.values():
        return f"a tensor of {value.dtype}, {value.layout}, on {value.device}"
    return ""


def _named(value: Any) -> str:
    return f"a {type(value).__name__}"


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without what wrapping a model put before all of them."""
    names = list(tensors)
    while wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in names)), None):
        names = [name.removeprefix(wrapper) for name in names]
    return dict(zip(names, tensors.values(), strict=True))
