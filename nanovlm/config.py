"""The configs: flat and frozen, checked when they are made, with upstream nanoVLM's field names.

Unusual: three generations of nanoVLM share VLMConfig, told apart by their extra tokens alone.

- ``v0.1``  no image token; image features stand in front of the text.
- ``v0.2``  one image token inside the text, one square picture.
- ``main``  a picture is split into tiles, each announced by a token of its own, after a global view.

Upstream does not have the dynamic models: with an encoder for any grid, no tokens for tiles and max_img_size
above vit_img_size, a picture keeps its shape and has as many image tokens as that asks for.

``to_json_dict`` writes the fields that the config's own generation of upstream knows, and another field
only where its value is not what upstream implies; so a config.json goes back and forth between the two.
Sizes are bounded here, before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanovlm.checks import POOLINGS, READ_BY, check_agreement, check_sizes, check_types, kept_tokens
from nanovlm.errors import ConfigError
from nanovlm.registry import WITH_CLS, canonical
from nanovlm.train_config import TrainConfig as TrainConfig

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE_TOKEN = {"image_token": "<|image|>"}
TILE_TOKENS = {f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)}
MAIN_TOKENS = {**IMAGE_TOKEN, "global_image_token": "<|global_image|>", **TILE_TOKENS}

# Fields that not every generation of upstream writes.
_WRITTEN_BY = {
    "lm_base_vocab_size": ("v0.2", "main"),
    "extra_token_amount": ("v0.2", "main"),
    "lm_eos_token_id": ("v0.1", "v0.2"),
    "lm_chat_template": ("main",),
    "mp_image_token_length": ("v0.2", "main"),
    "max_img_size": ("main",),
    "resize_to_max_side_len": ("main",),
    "vlm_extra_tokens": ("v0.2", "main"),
    "hf_repo_name": ("v0.2", "main"),
    "vision_encoder": (),
    "language_model": (),
    "lm_image_token_id": (),
    "image_mean": (),
    "image_std": (),
    **dict.fromkeys(READ_BY, ()),
    "lm_head_dim": (),
    "pool": (),
    "pool_factor": (),
    "keep_ratio": (),
    "pool_at": (),
}
# Without these a config.json says too little: any default would be a guess about the weights.
_DECISIVE = (
    "vit_hidden_dim", "vit_inter_dim", "vit_patch_size", "vit_img_size", "vit_n_heads", "vit_n_blocks",
    "lm_hidden_dim", "lm_inter_dim", "lm_vocab_size", "lm_n_heads", "lm_n_kv_heads", "lm_n_blocks",
    "lm_tokenizer", "mp_pixel_shuffle_factor",
)  # fmt: skip
# Fields computed from others: (field, what it follows).
_FOLLOWS = {
    "mp_image_token_length": (
        "vit_img_size", "vit_patch_size", "mp_pixel_shuffle_factor", "pool", "pool_factor", "keep_ratio",
    ),
    "lm_vocab_size": ("lm_base_vocab_size", "extra_token_amount"),
    "lm_head_dim": ("lm_hidden_dim", "lm_n_heads"),
    "vit_cls_flag": ("vision_encoder",),
}
@dataclass(frozen=True)
class VLMConfig:
    """Architecture of a vision-language model; the defaults are upstream main's 460M model.

    Raises ConfigError when a value has the wrong type or size, or two values contradict each other.
    """

    vit_hidden_dim: int = 768
    vit_inter_dim: int = 3072
    vit_patch_size: int = 16
    vit_img_size: int = 512
    vit_n_heads: int = 12
    vit_dropout: float = 0.0
    vit_n_blocks: int = 12
    vit_ln_eps: float = 1e-6
    vit_cls_flag: bool = False
    vit_model_type: str = "google/siglip2-base-patch16-512"

    lm_hidden_dim: int = 960
    lm_inter_dim: int = 2560
    lm_rms_eps: float = 1e-5
    lm_re_base: int = 100000
    lm_max_position_embeddings: int = 8192
    lm_base_vocab_size: int = 49152
    extra_token_amount: int = 66
    lm_vocab_size: int = 49218
    lm_n_heads: int = 15
    lm_n_kv_heads: int = 5
    lm_dropout: float = 0.0
    lm_n_blocks: int = 32
    lm_attn_scaling: float = 1.0
    lm_max_length: int = 4096
    lm_use_tokens: bool = False
    lm_tie_weights: bool = True
    lm_model_type: str = "HuggingFaceTB/SmolLM2-360M-Instruct"
    lm_tokenizer: str = "HuggingFaceTB/SmolLM2-360M-Instruct"
    lm_chat_template: str = CHATML
    lm_eos_token_id: int | None = None  # kept for v0.1 and v0.2 files; their code, too, asks the tokenizer

    mp_pixel_shuffle_factor: int = 4
    mp_image_token_length: int = 64

    max_img_size: int = 2048
    resize_to_max_side_len: bool = True

    vlm_extra_tokens: dict[str, str] = field(default_factory=lambda: dict(MAIN_TOKENS))
    vlm_load_backbone_weights: bool = True
    vlm_checkpoint_path: str = "checkpoints"
    hf_repo_name: str = "nanoVLM"

    vision_encoder: str = "siglip"
    language_model: str = "smollm"
    lm_image_token_id: int | None = None  # where the vocabulary has the tokens of vlm_extra_tokens already
    image_mean: tuple[float, ...] = ()  # of red, green and blue; upstream's models were trained without
    image_std: tuple[float, ...] = ()

    vit_position_grid: int | None = None  # patches a side of DINOv2's position table; None is vit_grid
    vit_n_registers: int = 0
    vit_gated_mlp: bool = False
    vit_rope_base: float = 100.0
    # DINOv3 in training: centres move by up to this; each axis, and both, scale by up to this either way
    vit_rope_shift: float | None = None
    vit_rope_jitter: float | None = None
    vit_rope_rescale: float | None = None

    lm_head_dim: int = 0  # 0 becomes lm_hidden_dim / lm_n_heads
    # Gemma 3 alone: its sliding layers, one full layer closing each pattern, and the scale of its queries
    lm_re_base_local: int = 10000
    lm_sliding_window: int = 512
    lm_sliding_window_pattern: int = 6
    lm_query_pre_attn_scalar: int = 256

    # Fewer image tokens: squares of pool_factor x pool_factor become one, or keep_ratio of the tokens stays
    pool: Literal["none", "pool_avg", "pool_max", "pool_adaptive", "drop_norm"] = "none"
    pool_factor: int = 2
    keep_ratio: float = 0.5
    pool_at: Literal["vision", "projector"] = "vision"  # in front of the projector, or behind it

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vision_encoder", "language_model", "vit_model_type"):
            object.__setattr__(self, name, canonical(getattr(self, name)))
        if self.lm_head_dim == 0 and self.lm_n_heads > 0:
            object.__setattr__(self, "lm_head_dim", self.lm_hidden_dim // self.lm_n_heads)
        check_sizes(self)
        check_agreement(self)

    # -- derived ----------------------------------------------------------------------------------------

    @property
    def generation(self) -> str:
        """ "v0.1", "v0.2" or "main": which upstream pipeline this model belongs to."""
        return generation_of(self.vlm_extra_tokens)

    @property
    def vit_grid(self) -> int:
        """Patches along one side of a tile."""
        return self.vit_img_size // self.vit_patch_size

    @property
    def dynamic(self) -> bool:
        """Whether pictures keep their shape; the image processor's grid then counts tokens, not tiles."""
        split = "image_token" not in self.vlm_extra_tokens or "r1c1" in self.vlm_extra_tokens
        return not split and self.max_img_size > self.vit_img_size

    @property
    def pool_window(self) -> int:
        """Image tokens along one side of the square that pooling makes one; 1 where it makes none."""
        return self.pool_factor if "pool_factor" in POOLINGS[self.pool] else 1

    @property
    def token_side(self) -> int:
        """Pixels along one side of the square that becomes one image token, if it is not dropped."""
        return self.vit_patch_size * self.mp_pixel_shuffle_factor * self.pool_window

    @property
    def token_share(self) -> float:
        """Share of the image tokens that stays where some are dropped; else 1."""
        return self.keep_ratio if self.pool == "drop_norm" else 1.0

    def image_tokens(self, height: int, width: int) -> int:
        """Image tokens of a tile or a picture of this many pixels."""
        return kept_tokens(height // self.token_side * (width // self.token_side), self.token_share)

    @property
    def tokens_per_cell(self) -> int:
        """Image tokens of one cell of the image processor's grid."""
        return 1 if self.dynamic else self.mp_image_token_length

    @property
    def image_token_id(self) -> int | None:
        """Id of the image token: extra tokens follow the base vocabulary in order. None in v0.1."""
        if self.lm_image_token_id is not None:
            return self.lm_image_token_id
        names = list(self.vlm_extra_tokens)
        return self.lm_base_vocab_size + names.index("image_token") if "image_token" in names else None

    # -- making others ----------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> VLMConfig:
        """A changed copy. Image token length, vocabulary size and head width follow unless they are given."""
        _check_names(changes)
        values = {**_as_dict(self), **changes}
        for name, sources in _FOLLOWS.items():
            others = {other: value for other, value in _as_dict(self).items() if other != name}
            followed = _completed(others)[name] == getattr(self, name)
            if name not in changes and followed and any(source in changes for source in sources):
                del values[name]
        return VLMConfig(**_completed(values))

    def slimmed(
        self,
        resolution: int | None = None,
        pool: str | None = None,
        pool_factor: int | None = None,
        keep_ratio: float | None = None,
        pool_at: str | None = None,
    ) -> VLMConfig:
        """A copy for tiles of ``resolution`` pixels and with fewer image tokens; None leaves a thing as it is.

        A picture keeps its number of tiles: max_img_size shrinks in proportion, and so does a dynamic one.
        Raises ConfigError for a size or factor that does not fit, and for a model that is pooled otherwise.
        """
        wanted = {"pool": pool, "pool_factor": pool_factor, "keep_ratio": keep_ratio, "pool_at": pool_at}
        changes: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        for name, value in changes.items():
            if self.pool != "none" and value != getattr(self, name):
                raise ConfigError(
                    f"{name}={value!r} is asked of a model with pool={self.pool!r}, "
                    f"{name}={getattr(self, name)!r}; it works as it was pooled alone: leave the option out, "
                    "or start from a model that is not pooled"
                )
        if resolution is not None and resolution != self.vit_img_size:
            side = self.vit_patch_size * self.mp_pixel_shuffle_factor
            if POOLINGS.get(changes.get("pool", self.pool)) == ("pool_factor",):
                side *= changes.get("pool_factor", self.pool_factor)
            if resolution < side or resolution % side:
                below, above = (resolution // side * side, (resolution // side + 1) * side)
                sizes = [str(size) for size in (below, above) if size]
                raise ConfigError(
                    f"resolution={resolution} is no multiple of {side}, the side of the square of pixels that "
                    f"becomes one image token; near it are {' and '.join(sizes)}"
                )
            changes["vit_img_size"] = resolution
            changes["max_img_size"] = -(-self.max_img_size * resolution // self.vit_img_size)
            if self.vision_encoder == "dinov2" and self.vit_position_grid is None:
                changes["vit_position_grid"] = self.vit_grid  # its table is interpolated to each picture
        return self.replace(**changes)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> VLMConfig:
        """A config from the fields that decide; what follows from them, or from the generation, is filled in.

        Raises ConfigError for an unknown or a missing field.
        """
        _check_names(values)
        missing = [name for name in _DECISIVE if name not in values and name != "lm_vocab_size"]
        if missing or not {"lm_vocab_size", "lm_base_vocab_size"} & set(values):
            raise ConfigError(
                f"the config does not say {', '.join(missing) or 'lm_vocab_size'}; there is no safe default"
            )
        return cls(**_completed(values))

    # -- JSON -------------------------------------------------------------------------------------------

    @classmethod
    def from_json_dict(cls, values: Mapping[str, Any]) -> tuple[VLMConfig, tuple[str, ...]]:
        """(config, names of ignored fields) of a config.json, by whichever generation it was written.

        Raises ConfigError if it is of another kind of model, lacks a decisive field or contradicts itself.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a config.json holds one object, not {type(values).__name__}")
        for name in ("model_type", "architectures"):
            if name in values:
                raise ConfigError(
                    f"this config.json says {name}={values[name]!r}: it is a transformers model's; "
                    f"nanoVLM's own has fields such as vit_hidden_dim and lm_hidden_dim"
                )
        known = {f.name for f in dataclasses.fields(cls)}
        cfg = cls.from_values({name: value for name, value in values.items() if name in known})
        derived = ("vit_grid", "image_token_id")
        for name in derived:
            if values.get(name) not in (None, getattr(cfg, name)):
                raise ConfigError(
                    f"config.json says {name}={values[name]!r}, its other fields make it {getattr(cfg, name)}"
                )
        return cfg, tuple(sorted(set(values) - known - set(derived)))

    def to_json_dict(self) -> dict[str, Any]:
        """What config.json holds: upstream's fields of this generation, others where they add something."""
        values = _as_dict(self)
        mine = {
            name: value
            for name, value in values.items()
            if self.generation in _WRITTEN_BY.get(name, (self.generation,))
        }
        implied = {**{f.name: f.default for f in dataclasses.fields(self)}, **_completed(mine)}
        return {name: value for name, value in values.items() if name in mine or implied[name] != value}


def _as_dict(cfg: VLMConfig) -> dict[str, Any]:
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return {**values, "vlm_extra_tokens": dict(cfg.vlm_extra_tokens)}


def generation_of(tokens: Mapping[str, str]) -> str:
    """ "v0.1", "v0.2" or "main", by the extra tokens {attribute: token} alone."""
    if "image_token" not in tokens:
        return "v0.1"
    return "main" if "global_image_token" in tokens or "r1c1" in tokens else "v0.2"


def _completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with what they imply for the fields that their generation does not write."""
    values = dict(values)
    tokens = values.setdefault("vlm_extra_tokens", {})
    if not isinstance(tokens, Mapping):
        return values  # the type check names it
    values.setdefault("extra_token_amount", len(tokens))
    values.setdefault("lm_chat_template", CHATML if generation_of(tokens) == "main" else "")
    values.setdefault("resize_to_max_side_len", False)
    values.setdefault("vit_cls_flag", canonical(str(values.get("vision_encoder"))) in WITH_CLS)
    numbers = {name: value for name, value in values.items() if isinstance(value, int)}
    try:
        extra = numbers["extra_token_amount"]
        if "lm_vocab_size" in numbers:
            values.setdefault("lm_base_vocab_size", numbers["lm_vocab_size"] - extra)
        else:
            values["lm_vocab_size"] = numbers["lm_base_vocab_size"] + extra
        values.setdefault("max_img_size", numbers["vit_img_size"])
        square, share = numbers["vit_patch_size"] * numbers["mp_pixel_shuffle_factor"], 1.0
        pool, ratio = str(values.get("pool", "none")), values.get("keep_ratio", VLMConfig.keep_ratio)
        if "pool_factor" in POOLINGS.get(pool, ()):
            square *= numbers.get("pool_factor", VLMConfig.pool_factor)
        elif pool == "drop_norm" and isinstance(ratio, int | float) and 0 < ratio <= 1:
            share = ratio
        cells = (numbers["vit_img_size"] // max(1, square)) ** 2
        values.setdefault("mp_image_token_length", kept_tokens(cells, share))
        if not values.get("lm_head_dim"):
            values["lm_head_dim"] = numbers["lm_hidden_dim"] // max(1, numbers["lm_n_heads"])
    except KeyError as error:
        raise ConfigError(f"{error.args[0]}={values.get(error.args[0])!r}: expected a whole number") from None
    return values


def _check_names(values: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(VLMConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"VLMConfig has no field {unknown[0]!r}{hint}")
