"""A target's model in other states: in bf16, larger, its embeddings small; and what is measured of any of them."""

from __future__ import annotations

import contextlib
import copy

import torch

from . import probe
from .adapters.calls import TargetFault
from .adapters.configs import config_values, make_config
from .protocol import NotSupported, theirs

SMALL = 1e-3  # embeddings of this size let an epsilon of a norm show


def flat_logits(adapter, batch):
    """All logits of a batch in one row."""
    with torch.no_grad():
        return torch.cat([row.reshape(-1) for row in adapter.logits(batch)])


def rms(tensor):
    return float(tensor.double().pow(2).mean().sqrt())


def top_two_margins(adapter, row, new):
    """Margin of the best over the second logit, of the logits' RMS, where each of the ``new`` ids was chosen."""
    if adapter.image_token_id in new:  # what follows would want a picture
        new = new[: new.index(adapter.image_token_id) + 1]
    if not new:
        return []
    tokens = row["tokens"] + new[:-1]
    with torch.no_grad():
        (logits,) = adapter.logits(adapter.batch([{"tokens": tokens, "images": row.get("images", [])}], "none"))
    logits = logits[-len(new) :].double()
    best = logits.topk(2, dim=-1).values
    return ((best[:, 0] - best[:, 1]) / logits.pow(2).mean().sqrt()).tolist()


def in_bf16(adapter):
    """A copy of the adapter around a second model in bf16: converting back would not restore the buffers."""
    other = copy.copy(adapter)
    with theirs():
        other.model = adapter.build_model(adapter.config).to(adapter.device, torch.bfloat16).eval()
    other.fill(other.model)
    return other


def larger(adapter):
    """A copy of the adapter around a second model: pictures twice the size, as many image tokens, each of more patches.

    A tiny model's squares are so small that their rows, their columns and the shuffle's factor are one number.
    """
    if adapter.combo["scale"] != "tiny":
        raise NotSupported("a second, larger model is built at tiny scale only")
    values = config_values(adapter.config)
    names = ("vit_img_size", "max_img_size", "mp_pixel_shuffle_factor")
    if not all(values.get(name) for name in (names[0], names[2])):
        raise NotSupported("the config has no vit_img_size, or no mp_pixel_shuffle_factor")
    twice = {name: 2 * values[name] for name in names if values.get(name)}
    try:
        config = make_config(type(adapter.config), {**values, **twice})
    except Exception as error:  # of any type: the target's way to say no
        raise NotSupported(f"the config takes no picture of twice the size: {error}") from None
    return remade(adapter, config)


def remade(adapter, config):
    """A copy of the adapter around a second model, of another config, with the first one's weights."""
    other = copy.copy(adapter)
    other.config = config
    with theirs():
        other.model = adapter.build_model(config).to(adapter.device).eval()
    stretch(adapter.model, other.model)
    return other


def stretch(model, larger):
    """Fill another, larger model by a smaller one's weights: those of another shape repeated, under nameless noise.

    So the two are told alike of weights drawn by name and of those that came from another version's checkpoint.
    """
    small = dict(model.named_parameters(remove_duplicate=False))  # a tied one may be untied in the other
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            whole = small.get(name)
            if whole is None or whole.dim() != parameter.dim():
                whole = probe.draw(name, parameter.shape)
            if whole.shape != parameter.shape:
                times = [-(-new // old) for new, old in zip(parameter.shape, whole.shape)]
                whole = whole.repeat(times)[tuple(slice(new) for new in parameter.shape)]
                noise = torch.randn(whole.shape, generator=probe.generator("larger"))
                whole = whole * (1 + 0.3 * noise.to(whole.device))
            parameter.copy_(whole)


def shrink_embeddings(model):
    """Scale every parameter that speaks of embeddings to a size of SMALL."""
    named = [parameter for name, parameter in model.named_parameters() if "emb" in name]
    if not named:
        raise NotSupported("no parameter is named as an embedding")
    with torch.no_grad():
        for parameter in named:
            parameter.mul_(SMALL / parameter.float().square().mean().sqrt().clamp(min=1e-12))


@contextlib.contextmanager
def outputs_of_head(adapter):
    """A list that gets, at each call of the output layer, its logits (B, V) at the last position."""
    seen = []
    try:
        head = adapter.head()
    except TargetFault:  # made by other means
        yield seen
        return
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out[:, -1] if out.dim() == 3 else out))
    try:
        yield seen
    finally:
        hook.remove()


@contextlib.contextmanager
def patched(model, name, function):
    """Give one model another method inside the block."""
    model.__dict__[name] = function
    try:
        yield
    finally:
        del model.__dict__[name]
