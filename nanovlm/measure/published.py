"""Two tables of measured memory that upstream nanoVLM published, and the model they were measured on.

Unusual: that model has this project's parameters and other operators: norms spelled out, queries and keys rotated
one by one, a mask for every row, logits of every position. They keep much more, so a prediction can be held against
the tables only on them. Sources: README.md at https://github.com/huggingface/nanoVLM/tree/1eed257 (v0.1: SigLIP at 224
pixels, 49 image tokens in front of 79 of text) and at .../tree/91a3b93 (v0.2: SigLIP 2 at 256 pixels, 64 image tokens
among 128), SmolLM2-135M, AdamW, bf16 autocast, two steps, an H100 of 80 GB.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config import IMAGE_TOKEN, VLMConfig
from nanovlm.language.llama import Attention, Llama, RMSNorm
from nanovlm.layers import rotate
from nanovlm.measure.vram import Batch, Training
from nanovlm.presets import preset
from nanovlm.projector import ModalityProjector
from nanovlm.vision.siglip import Siglip

LOADED = {"v0.1": 870.53, "v0.2": 871.44}  # MB of 1024**2 bytes
PEAKS = {
    "v0.1": {1: 4439.02, 2: 4461.05, 4: 4515.27, 8: 5062.60, 16: 6989.32, 32: 10880.09, 64: 18584.00, 128: 34043.34,
             256: 64944.37, 512: None},
    "v0.2": {1: 4448.58, 2: 4465.39, 4: 4532.29, 8: 5373.46, 16: 7604.36, 32: 12074.31, 64: 20995.06, 128: 38834.19,
             256: 74561.08, 512: None},
}  # fmt: skip
BEFORE_OOM = {"v0.1": 80228.30, "v0.2": 80247.67}


def config(table: str) -> VLMConfig:
    """The config of a table's model."""
    if table == "v0.1":
        return preset("original_small")
    changes: dict[str, Any] = {"vit_img_size": 256, "lm_base_vocab_size": 49152, "lm_max_length": 128}
    return preset("original_small", **changes, lm_vocab_size=49153, vlm_extra_tokens=IMAGE_TOKEN)


class Published(nn.Module):
    """Upstream's model of that time, operator by operator."""

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.vision_encoder, self.decoder, self.MP = Siglip(cfg), Llama(cfg), ModalityProjector(cfg)
        for block in self.decoder.blocks:  # the order in which weights are loaded decides how buffers are cut
            block._modules = {name: block._modules[name] for name in ("mlp", "attn", "norm1", "norm2")}

    def forward(self, input_ids: Tensor, images: Tensor, attention_mask: Tensor, targets: Tensor) -> tuple:
        """input_ids (B, T), images (B, 3, S, S) -> (logits, loss), of every position of the text."""
        decoder, features = self.decoder, self.MP(self.vision_encoder(images))
        B, K, _ = features.shape
        text = decoder.token_embedding(input_ids)
        if self.cfg.generation == "v0.1":
            x = torch.cat((features, text), dim=1)
            seen = torch.ones(B, K, dtype=attention_mask.dtype, device=attention_mask.device)
            attention_mask = torch.cat((seen, attention_mask), dim=1)
        else:
            x = text.clone()
            rows = torch.arange(B, device=input_ids.device)[:, None].expand(B, K)
            first = (input_ids == self.cfg.image_token_id).int().argmax(1)
            x[rows, first[:, None] + torch.arange(K, device=input_ids.device)] = features.to(x.dtype)
        cos, sin = self._rotation(x.shape[1], x.device)
        held: list[tuple[Tensor, Tensor]] = []  # v0.2 returns keys and values to whoever calls the decoder
        for block in decoder.blocks:
            x = x + _attention(block.attn, _norm(block.norm1, x), cos, sin, attention_mask, held)
            x = x + block.mlp(_norm(block.norm2, x))
        if self.cfg.generation == "v0.1":
            held.clear()
        logits = decoder.head(_norm(decoder.norm, x))
        logits = logits[:, -targets.shape[1] :]
        return logits, F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100)

    @torch.no_grad()
    def _rotation(self, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angles = torch.arange(T, device=device).float()[None, None, :, None] * self.decoder.rotary_embd.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    inverse = torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + norm.eps)
    return x * inverse * norm.weight


def _attention(attn: Attention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, held: list) -> Tensor:
    B, T, _ = x.shape
    q, k, v = (p(x).view(B, T, -1, attn.head_dim).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    held.append((k, v))
    groups = attn.n_heads // attn.n_kv_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    bias = (1.0 - mask[:, None, None].float()) * torch.finfo(q.dtype).min
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=True)
    return attn.out_proj(x.transpose(1, 2).contiguous().view(B, T, -1))


def batch(cfg: VLMConfig, rows: int) -> Batch:
    """What upstream's collator made: text padded to 128 positions, pictures among them, with a mask."""
    front = cfg.mp_image_token_length
    input_ids = torch.zeros(rows, 128 - front if cfg.generation == "v0.1" else 128, dtype=torch.long)
    if cfg.generation != "v0.1":
        input_ids[:, :front] = cfg.image_token_id
    side = cfg.vit_img_size
    return input_ids, torch.empty(rows, 3, side, side, device="meta"), input_ids.clone(), torch.ones_like(input_ids)


TRAINING = Training(forward=lambda model, *batch: model(*batch))
