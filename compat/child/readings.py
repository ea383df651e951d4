"""What can be read off a model, a tokenizer or a saved file, in terms that travel as JSON."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import struct
from json import loads  # bound now: the target may put another into the module

from .protocol import NotSupported


def version(package):
    """The installed version of a package, or None, without importing it."""
    import importlib.metadata

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def need(value, reason):
    """``value``, or NotSupported with the reason when it is None."""
    if value is None:
        raise NotSupported(reason)
    return value


def encode(tokenizer, text):
    """Ids of a text from a tokenizer of any make."""
    out = tokenizer.encode(text)
    return getattr(out, "ids", out)


def same_vocabulary(tokenizer, reference, texts):
    """Whether ids mean the same to both: a tokenizer of the target's own has no file to be compared with."""
    try:
        return all(tokenizer.decode(reference.encode(text).ids) == text for text in texts)
    except Exception:  # ids it never heard of
        return False


def special_ids(tokenizer):
    """Ids that are no ordinary text."""
    ids = set(getattr(tokenizer, "all_special_ids", None) or ())
    for name in ("image_token_id", "global_image_token_id", "eos_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            ids.add(int(value))
    return ids


def signatures(cls):
    """{method: [{"name", "kind", "default" if any}]} of the public calls."""
    found = {}
    for method in ("__init__", "forward", "generate", "from_pretrained", "save_pretrained"):
        if hasattr(cls, method):
            found[method] = [
                {
                    "name": p.name,
                    "kind": p.kind.name.lower(),
                    **({} if p.default is p.empty else {"default": jsonable(p.default)}),
                }
                for p in inspect.signature(getattr(cls, method)).parameters.values()
                if p.name not in ("self", "cls")
            ]
    return found


def fingerprints(model):
    """{name in the state dict: text that changes with its numbers}; far smaller than a second copy of the weights."""
    import torch

    found = {}
    for name, tensor in model.state_dict().items():
        values = tensor.detach()
        if not values.is_floating_point():
            values = values.double()
        size = torch.linalg.vector_norm(values, dtype=torch.float64)
        found[name] = f"{tuple(tensor.shape)} {tensor.dtype} {values.sum(dtype=torch.float64).item()!r} {size.item()!r}"
    return found


def shared_storage(model):
    """Groups of parameter names that are one tensor."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            groups.setdefault((parameter.data_ptr(), tuple(parameter.shape)), []).append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def saved_keys(folder, files):
    """(keys, aliases) of the safetensors files among ``files``, read from their headers alone."""
    keys, aliases = [], []
    for file in files:
        if file.endswith(".safetensors"):
            with open(os.path.join(folder, file), "rb") as stream:
                header = loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
            aliases += list(header.pop("__metadata__", {}))
            keys += list(header)
    return keys, aliases


def contains(held, tensor):
    """Whether a model's tensor holds a file's tensor: equal, a block of its rows, or the same numbers reshaped."""
    import torch

    tensor = tensor.to(held.dtype)
    if held.numel() == tensor.numel():
        return bool(torch.equal(held.reshape(-1), tensor.reshape(-1)))
    if held.dim() != tensor.dim() or held.shape[1:] != tensor.shape[1:] or held.shape[0] < tensor.shape[0]:
        return False
    rows = tensor.shape[0]
    starts = range(0, held.shape[0] - rows + 1, rows if held.shape[0] % rows == 0 else max(1, held.shape[0] - rows))
    return any(bool(torch.equal(held[start : start + rows], tensor)) for start in starts)


def jsonable(value):
    """A value as JSON can hold it; what it cannot hold becomes its repr."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    return repr(value)[:500]
