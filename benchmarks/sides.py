"""What the timings against transformers share: the same weights on both sides, and taking turns.

Unusual: the other side runs before every timed round of ours, so both see the same machine, and a ratio of
two medians is worth more than either of them on a machine that does other things, too.
`python benchmarks/sides.py` prints the last saved timings as the table of docs/performance.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from nanovlm import VisionLanguageModel, VLMConfig
from nanovlm.weights import to_hub

ROUNDS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def our_model(cfg: VLMConfig, dtype: torch.dtype) -> VisionLanguageModel:
    """Random weights, ready to generate."""
    torch.manual_seed(0)
    return VisionLanguageModel(cfg, load_backbone=False).to(dtype).eval().requires_grad_(False)


def their_decoder(model: VisionLanguageModel) -> LlamaForCausalLM:
    """transformers' Llama with the weights of our decoder."""
    cfg = model.cfg
    config = LlamaConfig(
        vocab_size=cfg.lm_vocab_size, hidden_size=cfg.lm_hidden_dim, intermediate_size=cfg.lm_inter_dim,
        num_hidden_layers=cfg.lm_n_blocks, num_attention_heads=cfg.lm_n_heads,
        num_key_value_heads=cfg.lm_n_kv_heads, max_position_embeddings=cfg.lm_max_position_embeddings,
        rms_norm_eps=cfg.lm_rms_eps, rope_theta=float(cfg.lm_re_base), tie_word_embeddings=cfg.lm_tie_weights,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).to(model.MP.proj.weight.dtype).eval().requires_grad_(False)
    state = to_hub(model.decoder, model.decoder.RULES)
    theirs.load_state_dict({"lm_head.weight": model.decoder.head.weight, **state})
    theirs.generation_config.eos_token_id = None  # random weights write it sooner or later
    theirs.generation_config.pad_token_id = 0
    return theirs


def their_encoder(model: VisionLanguageModel) -> SiglipVisionModel:
    """transformers' SigLIP with the weights of our vision encoder."""
    cfg = model.cfg
    config = SiglipVisionConfig(
        hidden_size=cfg.vit_hidden_dim, intermediate_size=cfg.vit_inter_dim, num_hidden_layers=cfg.vit_n_blocks,
        num_attention_heads=cfg.vit_n_heads, image_size=cfg.vit_img_size, patch_size=cfg.vit_patch_size,
        layer_norm_eps=cfg.vit_ln_eps, vision_use_head=False, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = SiglipVisionModel(config).to(model.MP.proj.weight.dtype).eval().requires_grad_(False)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in theirs.state_dict()) else ""
    theirs.load_state_dict(to_hub(model.vision_encoder, model.vision_encoder.RULES, prefix))
    return theirs


def write_ours(model: VisionLanguageModel, input_ids: Tensor, count: int, images: Any = None) -> Tensor:
    """``count`` greedy ids (B, count)."""
    return model.generate(input_ids, images, max_new_tokens=count, greedy=True, eos_token_id=())


@torch.inference_mode()
def write_theirs(decoder: LlamaForCausalLM, input_ids: Tensor, count: int) -> Tensor:
    """The same by transformers' generate, with its own growing cache."""
    seen = torch.ones_like(input_ids)
    ids = decoder.generate(input_ids, attention_mask=seen, max_new_tokens=count, do_sample=False)
    return ids[:, input_ids.shape[1] :]


class Turns:
    """Seconds of several functions, which run one after the other in every round."""

    def __init__(self, **sides: Callable[[], Any]) -> None:
        self.sides = sides
        self.seconds: dict[str, list[float]] = {name: [] for name in sides}

    def __call__(self) -> None:
        for name, side in self.sides.items():
            start = time.perf_counter()
            side()
            self.seconds[name].append(time.perf_counter() - start)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def against(benchmark, ours: Callable[[], Any], rounds: int = ROUNDS, **others: Callable[[], Any]) -> Turns:
    """Time ``ours`` as the benchmark and ``others`` before each of its rounds; medians, with "ours" in them."""
    turns = Turns(**others)
    ours()
    turns()  # warm: first calls take memory and choose algorithms
    turns.seconds = {name: [] for name in others}
    benchmark.pedantic(ours, setup=turns, rounds=rounds)
    turns.seconds["ours"] = list(benchmark.stats.stats.data)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    return turns


def table(saved: dict[str, Any]) -> str:
    """Markdown of a file that pytest-benchmark saved."""
    machine = saved["machine_info"]
    lines = [f"{machine['cpu'].get('brand_raw', '')}, commit {saved['commit_info']['id'][:7]}", ""]
    lines += ["| what | ours | theirs | ratio | more |", "|---|---|---|---|---|"]
    for row in saved["benchmarks"]:
        info = dict(row["extra_info"])
        if "ratio" not in info:
            continue
        cells = [row["name"].removeprefix("test_"), info.pop("ours"), info.pop("theirs"), info.pop("ratio")]
        cells.append(", ".join(f"{name} {value}" for name, value in info.items()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    last = max(Path(".benchmarks").rglob("*.json"), key=lambda path: path.stat().st_mtime)
    print(table(json.loads(last.read_text())))
