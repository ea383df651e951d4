"""What every target is probed with: weights drawn by key name, pictures drawn by number.

Unusual: nothing depends on the order of modules or of calls, so a moved or renamed module keeps the
numbers of the others, and two versions of a model get the same weights under the same names.
"""

from __future__ import annotations

import functools
import hashlib
import math

import torch

SMALL = 1 << 15  # elements of a tensor that is kept


def generator(name):
    """A CPU generator seeded by a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def seed(number):
    """torch.manual_seed, whose notes for devices that are not in use take a millisecond a call."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def draw(name, shape):
    """A float32 tensor for the parameter ``name``, scaled so that activations and logits stay of order 1."""
    shape = tuple(shape)
    return _kept(name, shape) if math.prod(shape) <= SMALL else _drawn(name, shape)


@functools.lru_cache(maxsize=1024)  # a tiny model is filled a hundred times
def _kept(name, shape):
    return _drawn(name, shape)


def _drawn(name, shape):
    noise = torch.randn(shape, generator=generator(name))
    if len(shape) < 2:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise
    if len(shape) == 2 and "pos" not in name and ("emb" in name or "head" in name.split(".")[-2:][0]):
        return 0.05 * noise  # larger, and a tied head repeats the last token, whatever the layers say
    if "emb" in name:
        return 0.3 * noise
    fan_in = noise[0].numel()
    return noise / fan_in**0.5


@torch.no_grad()
def fill(model):
    """Overwrite every parameter of ``model`` by ``draw``; buffers stay as the model computed them.

    A parameter that goes by other names in the state dict (one that joins several) is filled by those names.
    """
    state = model.state_dict()
    named = dict(model.named_parameters(remove_duplicate=False))
    if not named.keys() <= state.keys():
        known = named.keys() | {name for name, _ in model.named_buffers(remove_duplicate=False)}
        others = {name: draw(name, tensor.shape) for name, tensor in state.items() if name not in known}
        model.load_state_dict(others, strict=False)
    filled = set()
    for name, parameter in named.items():
        parameter.grad = None
        if id(parameter) not in filled and parameter.is_floating_point() and name in state:
            filled.add(id(parameter))  # by the first of its names, where it is tied
            parameter.copy_(draw(name, parameter.shape))


def picture(number, size):
    """Pixels of picture ``number``: float32 (3, size, size) in [0, 1], smooth shapes plus noise."""
    return _picture(number, size).clone()  # a target may write into what it is given


@functools.lru_cache(maxsize=16)
def _picture(number, size):
    noise = torch.rand((3, size, size), generator=generator(f"picture {number}"))
    ramp = torch.linspace(0, 1, size)
    waves = torch.stack([(ramp[:, None] * (number + c + 1) * 3 + ramp[None] * 2).sin() for c in range(3)])
    return (0.5 + 0.35 * waves + 0.15 * (noise - 0.5)).clamp(0, 1)


def photograph(number, width, height):
    """Picture ``number`` as an RGB PIL image."""
    from PIL import Image

    pixels = picture(number, max(width, height))[:, :height, :width]
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), "RGB")
