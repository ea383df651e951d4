"""Presets: one table of the fields that decide; VLMConfig fills in what follows from them.

A ``tiny`` twin has its big one's architecture at width 32 to 64, the byte tokenizer and random weights:
it builds offline in milliseconds. An empty ``*_model_type`` says that no pretrained backbone exists.
"""

from __future__ import annotations

import difflib
from typing import Any

from nanovlm.config import IMAGE_TOKEN, MAIN_TOKENS, VLMConfig
from nanovlm.errors import ConfigError, UnknownBackbone, UnknownPreset
from nanovlm.registry import canonical

SIGLIP_BASE = {
    "vit_hidden_dim": 768, "vit_inter_dim": 3072, "vit_patch_size": 16, "vit_n_heads": 12, "vit_n_blocks": 12,
}  # fmt: skip
SIGLIP_TINY = {
    "vit_hidden_dim": 32, "vit_inter_dim": 64, "vit_patch_size": 16, "vit_img_size": 64, "vit_n_heads": 2,
    "vit_n_blocks": 2, "vit_model_type": "", "vlm_load_backbone_weights": False,
}  # fmt: skip
# https://huggingface.co/google/siglip2-base-patch16-512, whose pictures are split into tiles
SIGLIP2_512 = {
    **SIGLIP_BASE, "vit_img_size": 512, "vit_model_type": "google/siglip2-base-patch16-512",
    "mp_pixel_shuffle_factor": 4, "max_img_size": 2048, "resize_to_max_side_len": True,
    "vlm_extra_tokens": MAIN_TOKENS,
}  # fmt: skip
# DINOv2 and DINOv3 see a picture whole, in ImageNet's colours; a larger max_img_size lets it keep its shape.
DINO = {
    "vit_cls_flag": True, "vit_img_size": 224, "mp_pixel_shuffle_factor": 2,
    "image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225),
    "vlm_extra_tokens": {**IMAGE_TOKEN, "global_image_token": MAIN_TOKENS["global_image_token"]},
}  # fmt: skip
# https://huggingface.co/facebook/dinov2-small, trained at 518 pixels, 37 patches a side
DINOV2_SMALL = {
    **DINO, "vision_encoder": "dinov2", "vit_hidden_dim": 384, "vit_inter_dim": 1536, "vit_patch_size": 14,
    "vit_n_heads": 6, "vit_n_blocks": 12, "vit_ln_eps": 1e-6, "vit_position_grid": 37,
    "vit_model_type": "facebook/dinov2-small",
}  # fmt: skip
DINOV2 = {
    "small": DINOV2_SMALL,
    "base": {
        **DINOV2_SMALL, "vit_hidden_dim": 768, "vit_inter_dim": 3072, "vit_n_heads": 12,
        "vit_model_type": "facebook/dinov2-base",
    },
}  # fmt: skip
# https://huggingface.co/facebook/dinov3-vitb16-pretrain-lvd1689m
DINOV3_BASE = {
    **DINO, "vision_encoder": "dinov3", "vit_hidden_dim": 768, "vit_inter_dim": 3072, "vit_patch_size": 16,
    "vit_n_heads": 12, "vit_n_blocks": 12, "vit_ln_eps": 1e-5, "vit_n_registers": 4, "vit_gated_mlp": False,
    "vit_rope_base": 100.0, "vit_rope_shift": None, "vit_rope_jitter": None, "vit_rope_rescale": 2.0,
    "vit_model_type": "facebook/dinov3-vitb16-pretrain-lvd1689m",
}  # fmt: skip
DINOV3 = {
    "vits16plus": {
        **DINOV3_BASE, "vit_hidden_dim": 384, "vit_inter_dim": 1536, "vit_n_heads": 6, "vit_gated_mlp": True,
        "vit_model_type": "facebook/dinov3-vits16plus-pretrain-lvd1689m",
    },
    "vitb16": DINOV3_BASE,
    "vitl16": {
        **DINOV3_BASE, "vit_hidden_dim": 1024, "vit_inter_dim": 4096, "vit_n_heads": 16, "vit_n_blocks": 24,
        "vit_model_type": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    },
}  # fmt: skip
DINOV2_TINY = {
    **DINOV2_SMALL, **SIGLIP_TINY, "vit_patch_size": 14, "vit_img_size": 56, "vit_position_grid": 5,
}  # fmt: skip
DINOV3_TINY = {**DINOV3["vits16plus"], **SIGLIP_TINY}
# https://huggingface.co/HuggingFaceTB/SmolLM2-360M-Instruct
SMOLLM_360M = {
    "lm_hidden_dim": 960, "lm_inter_dim": 2560, "lm_n_heads": 15, "lm_n_kv_heads": 5, "lm_n_blocks": 32,
    "lm_max_length": 4096, "lm_base_vocab_size": 49152,
    "lm_model_type": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "lm_tokenizer": "HuggingFaceTB/SmolLM2-360M-Instruct",
}  # fmt: skip
SMOLLM_TINY = {
    "lm_hidden_dim": 64, "lm_inter_dim": 128, "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_n_blocks": 3,
    "lm_max_position_embeddings": 1024, "lm_max_length": 512, "lm_base_vocab_size": 259, "lm_model_type": "",
    "lm_tokenizer": "byte",
}  # fmt: skip
IDEFICS3_PICTURES = {
    "resize_to_max_side_len": True, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
}  # fmt: skip


def idefics3_tokens(tiles: int) -> dict[str, str]:
    """What Idefics3 calls its tokens, for at most ``tiles`` rows and columns: {attribute: token}."""
    places = {
        f"r{row}c{col}": f"<row_{row}_col_{col}>"
        for row in range(1, tiles + 1)
        for col in range(1, tiles + 1)
    }
    around = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    return {"image_token": "<image>", **around, **places}


# https://huggingface.co/google/gemma-3-270m-it; an empty template is the tokenizer's own
GEMMA_270M = {
    "language_model": "gemma", "lm_hidden_dim": 640, "lm_inter_dim": 2048, "lm_n_blocks": 18,
    "lm_n_heads": 4, "lm_n_kv_heads": 1, "lm_head_dim": 256, "lm_query_pre_attn_scalar": 256, "lm_rms_eps": 1e-6,
    "lm_sliding_window": 512, "lm_sliding_window_pattern": 6, "lm_re_base": 1000000, "lm_re_base_local": 10000,
    "lm_max_position_embeddings": 32768, "lm_max_length": 4096, "lm_base_vocab_size": 262144,
    "lm_model_type": "google/gemma-3-270m-it", "lm_tokenizer": "google/gemma-3-270m-it",
    "lm_chat_template": "",
}  # fmt: skip
GEMMA_TINY = {
    **GEMMA_270M, **SMOLLM_TINY, "lm_n_kv_heads": 1, "lm_head_dim": 32, "lm_query_pre_attn_scalar": 32,
    "lm_sliding_window": 16, "lm_sliding_window_pattern": 3,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # https://huggingface.co/lusxvr/nanoVLM-460M-8k
    "default": {**SIGLIP2_512, **SMOLLM_360M},
    # https://huggingface.co/lusxvr/nanoVLM-222M
    "original_small": {
        **SIGLIP_BASE, "vit_img_size": 224, "vit_model_type": "google/siglip-base-patch16-224",
        "lm_hidden_dim": 576, "lm_inter_dim": 1536, "lm_n_heads": 9, "lm_n_kv_heads": 3, "lm_n_blocks": 30,
        "lm_max_length": 79, "lm_vocab_size": 49152, "lm_eos_token_id": 0,
        "lm_model_type": "HuggingFaceTB/SmolLM2-135M", "lm_tokenizer": "HuggingFaceTB/cosmo2-tokenizer",
        "mp_pixel_shuffle_factor": 2, "vlm_checkpoint_path": "checkpoints/nanoVLM-222M",
    },
    "siglip2_gemma": {**SIGLIP2_512, **GEMMA_270M},
    "dinov2_smollm": {**DINOV2_SMALL, **SMOLLM_360M},
    "dinov3_smollm": {**DINOV3["vits16plus"], **SMOLLM_360M},
    "dinov3_gemma": {**DINOV3["vits16plus"], **GEMMA_270M},
    # https://huggingface.co/ibm-granite/granite-docling-258M, whose own chat template is used
    "granite_docling": {
        **SIGLIP_BASE, "vit_img_size": 512, "vit_model_type": "",
        "lm_hidden_dim": 576, "lm_inter_dim": 1536, "lm_n_heads": 9, "lm_n_kv_heads": 3, "lm_n_blocks": 30,
        "lm_max_length": 8192, "lm_base_vocab_size": 100352, "extra_token_amount": 0,
        "lm_image_token_id": 100270, "lm_model_type": "", "lm_tokenizer": "ibm-granite/granite-docling-258M",
        "lm_chat_template": "",
        "mp_pixel_shuffle_factor": 4, **IDEFICS3_PICTURES, "max_img_size": 2048,
        "vlm_extra_tokens": idefics3_tokens(4), "vlm_load_backbone_weights": False,
    },
    "tiny": {
        **SIGLIP_TINY, **SMOLLM_TINY, "mp_pixel_shuffle_factor": 2, "max_img_size": 128,
        "resize_to_max_side_len": True, "vlm_extra_tokens": MAIN_TOKENS,
    },
    "tiny_granite_docling": {
        **SIGLIP_TINY, **SMOLLM_TINY, "mp_pixel_shuffle_factor": 2, **IDEFICS3_PICTURES, "max_img_size": 128,
        "vlm_extra_tokens": idefics3_tokens(2),
    },
    "tiny_siglip2_gemma": {
        **SIGLIP_TINY, **GEMMA_TINY, "mp_pixel_shuffle_factor": 2, "max_img_size": 128,
        "resize_to_max_side_len": True, "vlm_extra_tokens": MAIN_TOKENS,
    },
    # 64 image tokens from one tile, as the default has: a grid of resolutions and poolings (docs/slimming.md) fits
    "tiny_slim": {
        **SIGLIP_TINY, **SMOLLM_TINY, "vit_patch_size": 8, "vit_img_size": 128, "mp_pixel_shuffle_factor": 2,
        "max_img_size": 128, "resize_to_max_side_len": True, "vlm_extra_tokens": MAIN_TOKENS,
    },
    "tiny_dinov2_smollm": {**DINOV2_TINY, **SMOLLM_TINY},
    "tiny_dinov3_smollm": {**DINOV3_TINY, **SMOLLM_TINY},
    "tiny_dinov3_gemma": {**DINOV3_TINY, **GEMMA_TINY},
    "tiny_original_small": {**SIGLIP_TINY, **SMOLLM_TINY, "mp_pixel_shuffle_factor": 2, "lm_eos_token_id": 0},
}  # fmt: skip

# How a twin is trained from random weights within minutes; TrainConfig's own defaults are for pretrained backbones.
TINY_RECIPE: dict[str, Any] = {
    "batch_size": 32, "gradient_accumulation_steps": 1, "lr_mp": 0.002, "lr_backbones": 0.002,
    "adam_beta2": 0.95, "warmup_ratio": 0.08, "min_lr_ratio": 0.02, "max_training_steps": 1200, "pack": False,
    "validation_batches": 8, "num_workers": 1,
    "max_threads": 1,  # waking a second one costs more than its half of the work
}  # fmt: skip
# Preset -> fields of TrainConfig in which its training starts from another value than the default.
RECIPES: dict[str, dict[str, Any]] = {
    name: TINY_RECIPE
    for name in (
        "tiny", "tiny_granite_docling", "tiny_siglip2_gemma", "tiny_dinov2_smollm", "tiny_dinov3_smollm",
        "tiny_dinov3_gemma", "tiny_original_small", "tiny_slim",
    )
}  # fmt: skip

# What ``mix`` chooses from, by the names of the registry.
VISION = {"siglip": SIGLIP2_512, "dinov2": DINOV2_SMALL, "dinov3": DINOV3["vits16plus"]}
LANGUAGE = {"smollm": SMOLLM_360M, "gemma": GEMMA_270M}


def preset(name: str, **overrides: Any) -> VLMConfig:
    """The config of a preset with some fields changed. Raises UnknownPreset, ConfigError."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UnknownPreset(f"no preset {name!r}{hint} There are: {', '.join(PRESETS)}")
    return VLMConfig.from_values({**PRESETS[name], **overrides})


def mix(
    vision_encoder: str = "siglip",
    language_model: str = "smollm",
    dinov3_model: str | None = None,
    **overrides: Any,
) -> VLMConfig:
    """The config of any encoder with any language model; ``dinov3_model`` is a key of DINOV3.

    Their sizes are those of the published weights. Raises UnknownBackbone, ConfigError.
    """
    parts: dict[str, Any] = {}
    choices = [("vision_encoder", vision_encoder, VISION), ("language_model", language_model, LANGUAGE)]
    if dinov3_model is not None:
        if canonical(vision_encoder) != "dinov3":
            raise ConfigError(
                f"dinov3_model={dinov3_model!r} goes with vision_encoder='dinov3', not {vision_encoder!r}"
            )
        choices.append(("dinov3_model", dinov3_model, DINOV3))
    for field, name, table in choices:
        part = table.get(canonical(name))
        if part is None:
            raise UnknownBackbone(f"no {field} {name!r}; there are: {', '.join(table)}")
        parts.update(part)
    return VLMConfig.from_values({**parts, **overrides})
