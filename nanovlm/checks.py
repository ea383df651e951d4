"""What a config is held to: types, sizes, and values that must agree. Standard library only.

Unusual: everything here runs before anything is allocated, so a typo of a few zeros costs a sentence and
no memory. Every function takes a config and raises ConfigError naming the field, both values and the way out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nanovlm.errors import ConfigError
from nanovlm.registry import ANY_GRID, WITH_CLS

# Fields that one backbone alone reads: with another, a value that is not the default is a mistake.
READ_BY = {
    "vit_position_grid": "dinov2", "vit_n_registers": "dinov3", "vit_gated_mlp": "dinov3",
    "vit_rope_base": "dinov3", "vit_rope_shift": "dinov3", "vit_rope_jitter": "dinov3",
    "vit_rope_rescale": "dinov3", "lm_re_base_local": "gemma", "lm_sliding_window": "gemma",
    "lm_sliding_window_pattern": "gemma", "lm_query_pre_attn_scalar": "gemma",
}  # fmt: skip
# Ways to have fewer image tokens, and the fields that each reads besides pool_at.
POOLINGS = {
    "none": (), "pool_avg": ("pool_factor",), "pool_max": ("pool_factor",), "pool_adaptive": ("pool_factor",),
    "drop_norm": ("keep_ratio",),
}  # fmt: skip
POOL_AT = ("vision", "projector")
# Largest values accepted; each is far above any model this code could run.
_AT_MOST = {
    "vit_hidden_dim": 16384, "vit_inter_dim": 65536, "vit_patch_size": 256, "vit_img_size": 4096,
    "vit_n_heads": 512, "vit_n_blocks": 256, "lm_hidden_dim": 32768, "lm_inter_dim": 131072,
    "lm_max_position_embeddings": 1 << 22, "lm_base_vocab_size": 1 << 22, "lm_vocab_size": 1 << 22,
    "lm_n_heads": 512, "lm_n_kv_heads": 512, "lm_head_dim": 4096, "lm_n_blocks": 512,
    "lm_sliding_window": 1 << 22, "lm_sliding_window_pattern": 512, "lm_query_pre_attn_scalar": 1 << 16,
    "lm_re_base_local": 10**12, "lm_max_length": 1 << 22,
    "mp_pixel_shuffle_factor": 64, "mp_image_token_length": 1 << 18, "max_img_size": 1 << 15,
    "lm_re_base": 10**12,
}  # fmt: skip
_MULTIPLES = (
    ("vit_img_size", "vit_patch_size"), ("vit_hidden_dim", "vit_n_heads"),
    ("lm_hidden_dim", "lm_n_heads"), ("lm_n_heads", "lm_n_kv_heads"),
)  # fmt: skip
_MAX_PARAMETERS = 5 * 10**10

_KINDS: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "dict[str, str]": dict,
    "tuple[str, ...]": tuple,
    "tuple[float, ...]": tuple,
}


def check_types(cfg: Any) -> None:
    """Each value has its field's type; 2.0 counts as 2 and 1 as 1.0, as JSON does not tell them apart."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        name, _, none = f.type.partition(" | ")
        kind = _KINDS["str" if name.startswith("Literal[") else name]
        if value is None and none:
            continue
        if kind is tuple and isinstance(value, list):  # JSON and TOML know no tuples
            value = tuple(value)
        twin = {int: float, float: int}.get(kind)
        if type(value) is twin and abs(value) < 1 << 53 and value % 1 == 0:
            object.__setattr__(cfg, f.name, kind(value))
        elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ConfigError(f"{f.name}={value!r}: expected {f.type}, got {type(value).__name__}")
        elif kind in (dict, tuple):
            object.__setattr__(cfg, f.name, kind(value))  # a frozen config shares no dict with its maker
            if name == "tuple[float, ...]":
                if not all(type(number) in (int, float) for number in value):
                    raise ConfigError(f"{f.name}: expected numbers, got {value!r}")
                continue
            texts = [*value, *value.values()] if kind is dict else value
            if not all(isinstance(text, str) and text for text in texts):
                raise ConfigError(f"{f.name}: expected text that is not empty, got {value!r}")


def check_variant(kind: str, config: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    """Refuse a backbone's config.json that asks for another variant than ``kind`` builds. Raises ConfigError.

    A key that is not there is the variant that is built.
    """
    for name, value in built.items():
        if config.get(name, value) != value:
            raise ConfigError(f"{kind} with {name}={config[name]!r} is not built here, only with {value!r}")


def kept_tokens(count: int, keep_ratio: float) -> int:
    """How many of ``count`` tokens stay where this share of them is kept: at least one."""
    return max(1, round(count * keep_ratio))


def check_sizes(cfg: Any) -> None:
    for name, most in _AT_MOST.items():
        value = getattr(cfg, name)
        if not 1 <= value <= most:
            raise ConfigError(f"{name}={value}: expected 1 to {most:,}")
    if cfg.extra_token_amount < 0:
        raise ConfigError(f"extra_token_amount={cfg.extra_token_amount}: expected 0 or more")
    for name in ("vit_dropout", "lm_dropout"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ConfigError(f"{name}={getattr(cfg, name)}: expected a share from 0 up to, not including, 1")
    for name in ("vit_ln_eps", "lm_rms_eps", "lm_attn_scaling", "vit_rope_base"):
        if not 0 < getattr(cfg, name) < float("inf"):
            raise ConfigError(f"{name}={getattr(cfg, name)}: expected a number above 0")
    if not (cfg.image_mean == cfg.image_std == () or len(cfg.image_mean) == len(cfg.image_std) == 3):
        raise ConfigError(
            f"image_mean={cfg.image_mean}, image_std={cfg.image_std}: expected three numbers in each, or none"
        )
    if not all(0 < deviation < float("inf") for deviation in cfg.image_std):
        raise ConfigError(f"image_std={cfg.image_std}: expected numbers above 0")
    for name, least in (("vit_n_registers", 0), ("vit_position_grid", 1)):
        value = getattr(cfg, name)
        if value is not None and not least <= value <= 1024:
            raise ConfigError(f"{name}={value}: expected {least} to 1024")
    for name, least in (("vit_rope_shift", 0), ("vit_rope_jitter", 1), ("vit_rope_rescale", 1)):
        value = getattr(cfg, name)
        if value is not None and not least <= value < float("inf"):
            raise ConfigError(f"{name}={value}: expected a number from {least} up, or None")
    _check_pooling(cfg)
    vision = cfg.vit_n_blocks * (4 * cfg.vit_hidden_dim**2 + 2 * cfg.vit_hidden_dim * cfg.vit_inter_dim)
    heads = 2 * (cfg.lm_n_heads + cfg.lm_n_kv_heads) * cfg.lm_head_dim
    language = cfg.lm_n_blocks * cfg.lm_hidden_dim * (heads + 3 * cfg.lm_inter_dim)
    total = vision + language + cfg.lm_vocab_size * cfg.lm_hidden_dim
    if total > _MAX_PARAMETERS:
        raise ConfigError(f"these sizes make about {total:,} parameters; at most {_MAX_PARAMETERS:,} will do")


def check_agreement(cfg: Any) -> None:
    for big, small in _MULTIPLES:
        if getattr(cfg, big) % getattr(cfg, small):
            raise ConfigError(f"{big}={getattr(cfg, big)} is not a multiple of {small}={getattr(cfg, small)}")
    if cfg.lm_head_dim % 2:
        raise ConfigError(
            f"lm_head_dim={cfg.lm_head_dim}; rotary positions need an even width (if it is not given, it is "
            f"lm_hidden_dim={cfg.lm_hidden_dim} over lm_n_heads={cfg.lm_n_heads})"
        )
    side, factor = cfg.vit_grid, cfg.mp_pixel_shuffle_factor
    if side % factor:
        fitting = [str(n) for n in range(1, side + 1) if side % n == 0]
        below = cfg.vit_img_size // cfg.token_side * cfg.token_side
        sizes = [str(size) for size in (below, below + cfg.token_side) if size]
        raise ConfigError(
            f"vit_img_size={cfg.vit_img_size} with vit_patch_size={cfg.vit_patch_size} makes {side} patches "
            f"a side, which mp_pixel_shuffle_factor={factor} does not divide; these do: "
            f"{', '.join(fitting)}. Or keep {factor} and set vit_img_size to {' or '.join(sizes)}, "
            f"a multiple of {cfg.token_side}"
        )
    cells = side // factor
    if cfg.pool_window > 1 and cells % cfg.pool_factor:
        fitting = [str(n) for n in range(2, cells + 1) if cells % n == 0]
        larger = -(-cfg.vit_img_size // cfg.token_side) * cfg.token_side
        raise ConfigError(
            f"pool_factor={cfg.pool_factor} does not divide the {cells}x{cells} image tokens of "
            f"vit_img_size={cfg.vit_img_size}; these do: {', '.join(fitting) or 'none'}. "
            f"Or keep {cfg.pool_factor} and set vit_img_size to {larger}, a multiple of {cfg.token_side}"
        )
    tokens = cfg.image_tokens(cfg.vit_img_size, cfg.vit_img_size)
    if cfg.mp_image_token_length != tokens:
        pooled = "" if cfg.pool == "none" else f" and pool={cfg.pool!r}"
        raise ConfigError(
            f"mp_image_token_length={cfg.mp_image_token_length}, but {side} patches a side with "
            f"mp_pixel_shuffle_factor={factor}{pooled} make {tokens} tokens"
        )
    if cfg.lm_vocab_size != cfg.lm_base_vocab_size + cfg.extra_token_amount:
        raise ConfigError(
            f"lm_vocab_size={cfg.lm_vocab_size}, but lm_base_vocab_size={cfg.lm_base_vocab_size} and "
            f"extra_token_amount={cfg.extra_token_amount} do not add up to it"
        )
    _check_tokens(cfg)
    if cfg.lm_use_tokens:
        raise ConfigError("lm_use_tokens=True makes a language model without pictures; here it must be False")
    _check_encoder(cfg)


def _check_pooling(cfg: Any) -> None:
    for name, choices in (("pool", tuple(POOLINGS)), ("pool_at", POOL_AT)):
        if getattr(cfg, name) not in choices:
            raise ConfigError(f"{name}={getattr(cfg, name)!r}: expected {', '.join(choices)}")
    if not 2 <= cfg.pool_factor <= 64:
        raise ConfigError(f"pool_factor={cfg.pool_factor}: expected 2 to 64; pool='none' pools nothing")
    if not 0 < cfg.keep_ratio <= 1:
        raise ConfigError(f"keep_ratio={cfg.keep_ratio}: expected a share above 0, up to 1, of the image tokens")
    defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
    for name in ("pool_factor", "keep_ratio", "pool_at"):
        read = POOLINGS[cfg.pool] if name != "pool_at" or cfg.pool == "none" else (name,)
        if name not in read and getattr(cfg, name) != defaults[name]:
            readers = [pool for pool in POOLINGS if name in POOLINGS[pool] or (name == "pool_at" and pool != "none")]
            raise ConfigError(
                f"{name}={getattr(cfg, name)!r} is read by pool={' or '.join(map(repr, readers))} alone; with "
                f"pool={cfg.pool!r} leave it at {defaults[name]!r}"
            )


def _check_encoder(cfg: Any) -> None:
    encoder = cfg.vision_encoder
    if cfg.vit_cls_flag != (encoder in WITH_CLS):
        has = "a" if encoder in WITH_CLS else "no"
        raise ConfigError(f"vit_cls_flag={cfg.vit_cls_flag}, but {encoder!r} has {has} CLS token")
    defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
    for name, reader in READ_BY.items():
        kind = "vision_encoder" if name.startswith("vit_") else "language_model"
        default = defaults[name]
        if getattr(cfg, kind) != reader and getattr(cfg, name) != default:
            raise ConfigError(
                f"{name}={getattr(cfg, name)} is read by {kind}={reader!r} alone; with "
                f"{getattr(cfg, kind)!r} leave it at {default}"
            )


def _check_tokens(cfg: Any) -> None:
    tokens = cfg.vlm_extra_tokens
    if cfg.lm_image_token_id is not None:
        if not 0 <= cfg.lm_image_token_id < cfg.lm_vocab_size or "image_token" not in tokens:
            raise ConfigError(
                f"lm_image_token_id={cfg.lm_image_token_id}: expected an id below "
                f"lm_vocab_size={cfg.lm_vocab_size}, and an image_token in vlm_extra_tokens"
            )
    elif len(tokens) > cfg.extra_token_amount:
        raise ConfigError(
            f"vlm_extra_tokens has {len(tokens)} tokens, extra_token_amount={cfg.extra_token_amount} is less"
        )
    if len(set(tokens.values())) < len(tokens):
        raise ConfigError("vlm_extra_tokens gives two names to one token")
    if cfg.dynamic and cfg.vision_encoder in ANY_GRID:
        return
    if cfg.generation != "main":
        if cfg.max_img_size != cfg.vit_img_size:
            raise ConfigError(
                f"max_img_size={cfg.max_img_size}, but a {cfg.generation} model sees one square picture of "
                f"vit_img_size={cfg.vit_img_size}; tiles need the extra tokens r1c1, r1c2, ..., a picture "
                f"of its own shape an image_token and vision_encoder {' or '.join(sorted(ANY_GRID))}"
            )
        return
    if cfg.max_img_size % cfg.vit_img_size:
        raise ConfigError(
            f"max_img_size={cfg.max_img_size} is not a multiple of the tile, vit_img_size={cfg.vit_img_size}"
        )
    tiles = cfg.max_img_size // cfg.vit_img_size
    if tiles > 1 or "global_image_token" not in tokens:
        needed = [f"r{row}c{col}" for row in range(1, tiles + 1) for col in range(1, tiles + 1)]
        missing = [name for name in needed if name not in tokens]
        if missing:
            raise ConfigError(
                f"max_img_size={cfg.max_img_size} allows {tiles}x{tiles} tiles of {cfg.vit_img_size}, but "
                f"vlm_extra_tokens has no {missing[0]}; lower max_img_size or add the token"
            )
