"""Granite-Docling, SmolVLM and Idefics3: their checkpoints, tiles and image strings over SigLIP and Llama.

Unusual: there is no module here, only another spelling. The picture is always blown up to ``max_img_size``,
in two Lanczos steps that each round to 8 bits; the global view comes last, a third step from the second;
every tile is announced by a token and its place, every row of tiles ends a line. The tokens of all that are
in the vocabulary already. Video and undivided pictures (``do_image_splitting: false``) are not built.

transformers finds a patch's position by its fraction of the picture, for pictures padded into a tile. No
tile is padded here, so positions are 0, 1, 2, ... as with SigLIP. transformers 5 finds the same at every
published side (26, 27 and 32 patches; at some others, as 19 or 25, rounding moves a few); 4.56 and 4.57
read 0, 0, 1, 2, ... and give other numbers.

Source: https://arxiv.org/abs/2408.12637; parity-checked against transformers 5.

N tiles (global view included), S side of a tile.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from nanovlm import checkpoint, hub, weights
from nanovlm.config import VLMConfig
from nanovlm.errors import ConfigError, ImageTokenMismatch
from nanovlm.images import to_rgb, to_tensor
from nanovlm.language.llama import Llama
from nanovlm.presets import idefics3_tokens
from nanovlm.vision.siglip import Siglip
from nanovlm.weights import Rule

if TYPE_CHECKING:
    from nanovlm.vlm import VisionLanguageModel

MAX_SIDE = 4096  # the image processor of transformers goes no further, whatever its size says
MAX_TILES = 6  # rows and columns that its processor has tokens for
LANCZOS = Image.Resampling.LANCZOS
# What a config.json leaves out is the default of Idefics3Config and its parts.
VISION_DEFAULTS = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
# The one value of a field that the modules here compute with; a file may leave the field out.
VISION_BUILT = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
TEXT_BUILT = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
PICTURE_BUILT = {
    "do_resize": True, "do_rescale": True, "do_image_splitting": True, "resample": int(LANCZOS),
    "rescale_factor": 1 / 255,
}  # fmt: skip


def _within(rule: Rule, source: Callable[[str], str], target: str) -> Rule:
    """The rule of a part as one of the whole: names in the file through ``source``, ours below ``target``."""
    names = tuple(source(name) for name in rule.sources)
    return Rule(names if len(names) > 1 else names[0], target + rule.target, rule.join)


def _in_vision_model(name: str) -> str:
    return "model.vision_model." + name


def _in_text_model(name: str) -> str:
    return name.replace("model.", "model.text_model.", 1)  # lm_head stays where it is


class Idefics3:
    """How checkpoints of ``model_type`` idefics3 and smolvlm become a VisionLanguageModel, and back."""

    IGNORED = ("model.vision_model.embeddings.position_ids", "*rotary_emb.inv_freq")
    RULES = (
        *(_within(rule, _in_vision_model, "vision_encoder.") for rule in Siglip.RULES),
        Rule("model.connector.modality_projection.proj.weight", "MP.proj.weight"),
        *(_within(rule, _in_text_model, "decoder.") for rule in Llama.RULES),
    )

    @staticmethod
    def config(found: Mapping[str, Any], source: str | os.PathLike, revision: str | None = None) -> VLMConfig:
        """The VLMConfig of a folder or repository with this config.json, read with its image settings.

        Raises ConfigError for a variant that is not built here, naming the field and both values.
        """
        vision = {**VISION_DEFAULTS, **_part(found, "vision_config")}
        text = _part(found, "text_config")
        pictures = _picture_settings(source, revision)
        _only(VISION_BUILT, vision, "vision_config.")
        _only(TEXT_BUILT, text, "text_config.")
        _only(PICTURE_BUILT, pictures, "the image processor's ")
        _plain_rotary(text)
        language = Llama.hub_fields(text)
        side = vision["image_size"]
        tile = _longest(pictures, "max_image_size", side)
        longest = _longest(pictures, "size", 4 * tile)
        if tile != side or tile < 1:
            raise ConfigError(f"vision_config.image_size={side}, but max_image_size says tiles of {tile}")
        if longest > MAX_SIDE:
            raise ConfigError(f"the image processor's size is {longest}; at most {MAX_SIDE} is built here")
        normal = pictures.get("do_normalize", True)
        return VLMConfig.from_values({
            **Siglip.hub_fields(vision), **language, "lm_head_dim": text.get("head_dim", 0),
            # transformers asks the outer config alone
            "lm_tie_weights": found.get("tie_word_embeddings", False),
            "lm_max_length": language["lm_max_position_embeddings"], "extra_token_amount": 0,
            "lm_image_token_id": found.get("image_token_id", 128257),
            "vlm_extra_tokens": idefics3_tokens(min(longest // tile, MAX_TILES)),
            "mp_pixel_shuffle_factor": found.get("scale_factor", 2),
            "max_img_size": longest, "resize_to_max_side_len": True,
            "image_mean": pictures.get("image_mean", [0.5] * 3) if normal else [],
            "image_std": pictures.get("image_std", [0.5] * 3) if normal else [],
            "lm_tokenizer": os.fspath(source), "lm_chat_template": "",
            "vit_model_type": "", "lm_model_type": "", "vlm_load_backbone_weights": False,
        })  # fmt: skip

    @staticmethod
    def hub_config(cfg: VLMConfig) -> dict[str, Any]:
        """The config.json of Idefics3Config for a model of this config. Raises ConfigError if it is none."""
        parts = (cfg.vision_encoder, cfg.language_model)
        if "fake_image_token" not in cfg.vlm_extra_tokens or parts != ("siglip", "smollm"):
            raise ConfigError(
                f"{' and '.join(parts)} with {len(cfg.vlm_extra_tokens)} extra tokens are no Idefics3, which "
                "is siglip and smollm with the extra token fake_image_token"
            )
        if cfg.pool != "none":
            raise ConfigError(f"pool={cfg.pool!r}: transformers' Idefics3 has pool='none' alone; use save_pretrained")
        return {
            "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3",
            "image_token_id": cfg.image_token_id, "scale_factor": cfg.mp_pixel_shuffle_factor,
            "tie_word_embeddings": cfg.lm_tie_weights, "vocab_size": cfg.lm_vocab_size,
            "vision_config": {
                **VISION_BUILT, "model_type": "idefics3_vision", "hidden_size": cfg.vit_hidden_dim,
                "intermediate_size": cfg.vit_inter_dim, "num_hidden_layers": cfg.vit_n_blocks,
                "num_attention_heads": cfg.vit_n_heads, "image_size": cfg.vit_img_size,
                "patch_size": cfg.vit_patch_size, "layer_norm_eps": cfg.vit_ln_eps,
            },
            "text_config": {
                **TEXT_BUILT, "architectures": ["LlamaForCausalLM"], "hidden_size": cfg.lm_hidden_dim,
                "intermediate_size": cfg.lm_inter_dim, "num_hidden_layers": cfg.lm_n_blocks,
                "num_attention_heads": cfg.lm_n_heads, "num_key_value_heads": cfg.lm_n_kv_heads,
                "head_dim": cfg.lm_head_dim, "max_position_embeddings": cfg.lm_max_position_embeddings,
                "rms_norm_eps": cfg.lm_rms_eps, "rope_theta": float(cfg.lm_re_base),
                "vocab_size": cfg.lm_vocab_size, "tie_word_embeddings": cfg.lm_tie_weights,
            },
        }  # fmt: skip


def save_for_transformers(model: VisionLanguageModel, folder: str | os.PathLike) -> None:
    """Write config, weights and image settings as transformers' Idefics3 model and processor read them.

    The tokenizer is not written: copy the one that ``cfg.lm_tokenizer`` names. Raises ConfigError where the
    model is no Idefics3.
    """
    cfg, folder = model.cfg, Path(folder)
    config = Idefics3.hub_config(cfg)
    settings = {
        **PICTURE_BUILT, "do_convert_rgb": True, "do_pad": True, "do_normalize": bool(cfg.image_mean),
        "image_mean": cfg.image_mean or None, "image_std": cfg.image_std or None,
        "size": {"longest_edge": cfg.max_img_size}, "max_image_size": {"longest_edge": cfg.vit_img_size},
        "image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor",
    }  # fmt: skip
    contents = {
        "preprocessor_config.json": settings,
        "processor_config.json": {
            "processor_class": "Idefics3Processor",
            "image_seq_len": cfg.mp_image_token_length,
        },
        "config.json": config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tensors(folder / hub.WEIGHTS, weights.to_hub(model, Idefics3.RULES), {"format": "pt"})
    for name, content in contents.items():
        checkpoint.write_text(folder / name, json.dumps(content, indent=2))


@dataclasses.dataclass(frozen=True)
class SplitPicture:
    """picture -> (tiles in reading order and then a global view (N, 3, S, S) in [0, 1], (rows, columns))."""

    side: int
    max_side: int
    always_to_max: bool = True

    @classmethod
    def of(cls, cfg: VLMConfig) -> SplitPicture:
        """The cutter that a config describes."""
        return cls(cfg.vit_img_size, cfg.max_img_size, cfg.resize_to_max_side_len)

    def __call__(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        picture = to_rgb(picture)
        for size in self.resized_sizes(*picture.size):
            picture = picture.resize(size, LANCZOS)
        columns, rows = picture.width // self.side, picture.height // self.side
        tiles = to_tensor(picture).view(3, rows, self.side, columns, self.side).permute(1, 3, 0, 2, 4)
        tiles = tiles.reshape(rows * columns, 3, self.side, self.side)
        if len(tiles) > 1:
            tiles = torch.cat((tiles, to_tensor(picture.resize((self.side, self.side), LANCZOS))[None]))
        return tiles, (rows, columns)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of a picture of this size."""
        width, height = self.resized_sizes(width, height)[-1]
        return height // self.side, width // self.side

    def resized_sizes(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) after each of the two steps: the long side as wanted, then multiples of the tile.

        The order of float operations is that of transformers, so that ties round the same way.
        """
        target = self.max_side if self.always_to_max else min(self.max_side, self._up(max(width, height)))
        aspect = width / height
        if width >= height:
            first = (target, max(1, _even(int(target / aspect))))
        else:
            first = (max(1, _even(int(target * aspect))), target)
        width, height = first
        aspect = width / height
        if width >= height:
            width = self._up(width)
            height = self._up(int(width / aspect))
        else:
            height = self._up(height)
            width = self._up(int(height * aspect))
        return first, (width, height)

    def _up(self, length: int) -> int:
        """The next multiple of the tile."""
        return math.ceil(length / self.side) * self.side

    @staticmethod
    def image_string(names: Mapping[str, str], grids: Sequence[tuple[int, int]], tokens_per_tile: int) -> str:
        """What stands for pictures in the text; ``names`` are the extra tokens. Raises ImageTokenMismatch."""
        around, features = names["fake_image_token"], names["image_token"] * tokens_per_tile
        out = []
        for rows, columns in grids:
            if rows * columns > 1:
                for row in range(1, rows + 1):
                    for column in range(1, columns + 1):
                        if f"r{row}c{column}" not in names:
                            raise ImageTokenMismatch(
                                f"a grid of {rows}x{columns} tiles, but there is no extra token "
                                f"r{row}c{column}; use a smaller max_img_size"
                            )
                        out.append(around + names[f"r{row}c{column}"] + features)
                    out.append("\n")
                out.append("\n")
            out.append(around + names["global_image_token"] + features + around)
        return "".join(out)


def _even(length: int) -> int:
    return length + length % 2


def _part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a config.json without its empty fields."""
    part = config.get(name) or {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"{name} is a {type(part).__name__}, expected an object")
    return {key: value for key, value in part.items() if value is not None}


def _only(built: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    for name, value in built.items():
        if found.get(name, value) != value:
            raise ConfigError(f"{where}{name}={found[name]!r} is not built here, only {name}={value!r}")


def _plain_rotary(text: Mapping[str, Any]) -> None:
    """transformers 4 writes rope_scaling, 5 writes rope_parameters."""
    for name in ("rope_scaling", "rope_parameters"):
        scaling = _part(text, name)
        kind = scaling.get("rope_type", scaling.get("type", "default"))  # older files say type
        if kind != "default":
            raise ConfigError(f"text_config.{name} of type {kind!r} is not built here, only 'default'")


def _picture_settings(source: str | os.PathLike, revision: str | None) -> dict[str, Any]:
    """The image processor's file, or its part of the processor's, as transformers 5 writes it; {} without."""
    path = hub.find(source, "preprocessor_config.json", revision=revision)
    if path is not None:
        found = hub.parse_json(path)
    else:
        path = hub.find(source, "processor_config.json", revision=revision)
        found = hub.parse_json(path) if path is not None else {}
        found = found.get("image_processor", {}) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} holds a {type(found).__name__}, expected an object")
    return dict(found)


def _longest(settings: Mapping[str, Any], name: str, default: int) -> int:
    """The ``longest_edge`` of a size, the one way in which Idefics3 gives sizes."""
    size = settings.get(name, {"longest_edge": default})
    if not isinstance(size, Mapping) or type(size.get("longest_edge")) is not int:
        raise ConfigError(f"the image processor's {name}={size!r}; expected {{'longest_edge': N}}")
    return size["longest_edge"]
