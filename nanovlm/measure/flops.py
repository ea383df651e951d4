"""Floating-point operations of an answer, counted twice: from the config alone, and as torch dispatches them.

Unusual: a multiplication and an addition are two operations; a causal mask saves nothing and every query head
counts, grouped or not: what is counted is the shape of a product, not what a kernel skips. The model is run on
torch's meta device, which has shapes and no numbers, so 460M parameters and 13 tiles take a second.
What is no product of matrices (norms, activations, rotations) is counted by neither.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.config import VLMConfig
from nanovlm.errors import ConfigError, PromptTooLong
from nanovlm.generate import decode_one_token, prefill
from nanovlm.measure.kernels import CudaKernels
from nanovlm.pooling import REDUCTION
from nanovlm.vlm import VisionLanguageModel

CLASSES = ("convolution", "matmul", "attention")  # of operators, as they are dispatched
PARTS = ("vision", "projector", "prefill", "decode", "head")


@dataclass(frozen=True)
class Row:
    """``flops`` of one kind of product in one part of the model."""

    part: str
    name: str
    operator: str
    flops: int


@dataclass(frozen=True)
class Prompt:
    """Pictures of (height, width) pixels, tiles or whole; all positions, image tokens among them; new tokens."""

    pictures: tuple[tuple[int, int], ...]
    positions: int
    new_tokens: int


# -- from the config ------------------------------------------------------------------------------------------


def analytic(cfg: VLMConfig, prompt: Prompt) -> list[Row]:
    """Every product of matrices of an answer to ``prompt``."""
    rows = Counter()
    for height, width in prompt.pictures:
        rows.update(_vision(cfg, height, width))
    rows.update(_decoder(cfg, "prefill", prompt.positions, prompt.positions))
    for step in range(1, prompt.new_tokens):  # the last new token goes through nothing
        rows.update(_decoder(cfg, "decode", 1, prompt.positions + step))
    rows[("head", "head", "matmul")] = 2 * prompt.new_tokens * cfg.lm_hidden_dim * cfg.lm_vocab_size
    return [Row(*key, flops) for key, flops in rows.items() if flops]


def _vision(cfg: VLMConfig, height: int, width: int) -> dict[tuple[str, str, str], int]:
    """Of one picture or tile of this many pixels."""
    D, layers = cfg.vit_hidden_dim, cfg.vit_n_blocks
    patches = height // cfg.vit_patch_size * (width // cfg.vit_patch_size)
    T = patches + cfg.vit_cls_flag + cfg.vit_n_registers
    matrices = 3 if cfg.vit_gated_mlp else 2
    squares = patches // cfg.mp_pixel_shuffle_factor**2
    first = cfg.pool_at == "vision"  # tokens become fewer in front of the linear layer
    features = cfg.image_tokens(height, width) if first else squares
    seen, inner = (patches, D) if first else (squares, cfg.lm_hidden_dim)
    attention = 2 * seen * 2 * inner * (inner // REDUCTION) if cfg.pool == "pool_adaptive" else 0
    joined = D * cfg.mp_pixel_shuffle_factor**2
    return {
        ("vision", "patch embedding", "convolution"): 2 * patches * 3 * cfg.vit_patch_size**2 * D,
        ("vision", "qkv", "matmul"): layers * 2 * T * D * 3 * D,
        ("vision", "attention", "attention"): layers * 4 * T * T * D,
        ("vision", "attention output", "matmul"): layers * 2 * T * D * D,
        ("vision", "MLP", "matmul"): layers * 2 * T * D * cfg.vit_inter_dim * matrices,
        ("projector", "projector", "matmul"): 2 * features * joined * cfg.lm_hidden_dim,
        ("projector", "pooling", "matmul"): attention,
    }


def _decoder(cfg: VLMConfig, part: str, new: int, seen: int) -> dict[tuple[str, str, str], int]:
    """Of ``new`` positions that see ``seen``, themselves among them."""
    D, layers = cfg.lm_hidden_dim, cfg.lm_n_blocks
    queries, keys = cfg.lm_n_heads * cfg.lm_head_dim, cfg.lm_n_kv_heads * cfg.lm_head_dim
    return {
        (part, "qkv", "matmul"): layers * 2 * new * D * (queries + 2 * keys),
        (part, "attention", "attention"): layers * 4 * new * seen * queries,
        (part, "attention output", "matmul"): layers * 2 * new * queries * D,
        (part, "MLP", "matmul"): layers * 2 * new * D * cfg.lm_inter_dim * 3,
    }


def by_class(rows: Iterable[Row], *parts: str) -> dict[str, int]:
    """{operator class: FLOPs} of the named parts, all when none is named."""
    found = dict.fromkeys(CLASSES, 0)
    for row in rows:
        if not parts or row.part in parts:
            found[row.operator] += row.flops
    return found


# -- as dispatched --------------------------------------------------------------------------------------------


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Scores and weighted sum; torch's own registry has no formula for the CPU's kernel."""
    B, H, T, D = query
    return 2 * B * H * T * key[2] * (D + value[3])


def _linear(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    """A product with what follows it in one operator, as bfloat16 has it on a CPU."""
    return 2 * math.prod(x) * weight[0]


FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear


def dispatched(run: Callable[[], Any]) -> dict[str, int]:
    """{operator class: FLOPs} of ``run()``, on meta tensors or real ones."""
    with CudaKernels(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    found = dict.fromkeys(CLASSES, 0)
    for operator, flops in counter.get_flop_counts().get("Global", {}).items():
        name = operator.__name__
        kind = "attention" if "attention" in name else "convolution" if "convolution" in name else "matmul"
        found[kind] += int(flops)
    return found


def counted(model: VisionLanguageModel, prompt: Prompt) -> dict[str, dict[str, int]]:
    """{part: {operator class: FLOPs}} of an answer, from a model on the meta device."""
    device = model.MP.proj.weight.device
    decoder, found = model.decoder, {}
    features: list[tuple[Tensor, tuple[int, int]]] = []
    patch = model.cfg.vit_patch_size

    def look() -> None:
        for (height, width), count in Counter(prompt.pictures).items():
            pixels = torch.empty(count, 3, height, width, device=device)
            features.append((model.vision_encoder(pixels), (height // patch, width // patch)))

    with torch.no_grad():
        found["vision"] = dispatched(look)
        found["projector"] = dispatched(lambda: [model.MP(x, grid) for x, grid in features])
        T = prompt.positions
        cache = decoder.new_cache(1, T + prompt.new_tokens)
        hidden: list[Tensor] = []
        embeds = torch.empty(1, T, model.cfg.lm_hidden_dim, device=device)
        found["prefill"] = dispatched(lambda: hidden.append(prefill(decoder, embeds, None, cache)))
        ids = torch.zeros(1, dtype=torch.long, device=device)

        def decode() -> None:
            for step in range(prompt.new_tokens - 1):
                positions = torch.full((1, 1), T + step, device=device)
                hidden.append(decode_one_token(decoder, ids, positions, None, cache))

        found["decode"] = dispatched(decode)
        found["head"] = dispatched(lambda: [decoder.head(x) for x in hidden])
    return found


def published(model: VisionLanguageModel, prompt: Prompt, global_views: int) -> dict[str, int]:
    """The vision part as the nanoVLM-Lite document counts it, two ways that each leave something out.

    "manual" leaves out the global views; "counter" has them all, and not the attention, which torch's registry
    does not know on a CPU.
    """
    tiles = prompt.pictures[global_views:]  # all of one size where there are any
    by_hand = sum(by_class(analytic(model.cfg, Prompt(tiles, 1, 1)), "vision").values())
    counter = counted(model, Prompt(prompt.pictures, 1, 1))["vision"]
    return {"manual": by_hand, "counter": sum(counter.values()) - counter["attention"]}


def report(model: VisionLanguageModel, prompt: Prompt, global_views: int) -> dict[str, Any]:
    """Everything about one answer, in FLOPs, ready for JSON.

    A generation is counted twice on one model, without and with one before it: the two are equal where a model
    keeps nothing from a call to the next.
    """
    rows = analytic(model.cfg, prompt)
    without, warm = counted(model, prompt), counted(model, prompt)
    ours, theirs = by_class(rows), {name: sum(part[name] for part in without.values()) for name in CLASSES}
    by_hand = published(model, prompt, global_views)
    return {
        "tiles": len(prompt.pictures),
        "prompt_tokens": prompt.positions,
        "new_tokens": prompt.new_tokens,
        "analytic": [asdict(row) for row in rows],
        "counted": without,
        "by_class": {name: [ours[name], theirs[name]] for name in CLASSES},
        "total": sum(ours.values()),
        "generation_without_warmup": sum(theirs.values()),
        "generation_with_warmup": sum(sum(part.values()) for part in warm.values()),
        "vit_manual": by_hand["manual"],
        "vit_counter": by_hand["counter"],
    }


def meta_model(cfg: VLMConfig) -> VisionLanguageModel:
    """A model of this config without a number in it."""
    with torch.device("meta"):
        return VisionLanguageModel(cfg, load_backbone=False).eval()


def prompt_of(cfg: VLMConfig, pictures: Sequence[Tensor], text_tokens: int, new_tokens: int) -> Prompt:
    """The prompt of pictures (n, 3, H, W) and ``text_tokens`` positions that are no image feature.

    Raises ConfigError, PromptTooLong.
    """
    if text_tokens < 1 or new_tokens < 1:
        raise ConfigError(f"text_tokens={text_tokens}, new_tokens={new_tokens}: expected at least 1 of each")
    sizes = tuple(tuple(stack.shape[2:]) for stack in pictures for _ in range(len(stack)))
    images = sum(cfg.image_tokens(height, width) for height, width in sizes)
    if images + text_tokens + new_tokens > cfg.lm_max_position_embeddings:
        raise PromptTooLong(
            f"{images} image tokens, {text_tokens} of text and {new_tokens} new ones are more than "
            f"lm_max_position_embeddings={cfg.lm_max_position_embeddings}; use smaller pictures"
        )
    return Prompt(sizes, images + text_tokens, new_tokens)
