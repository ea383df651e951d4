"""Vision and language towers of every tree: plain pre-norm transformers, named as the Hub's files name them.

Unusual: positions come from the mask and padding is never attended to, so padded rows equal themselves.
Shapes: B rows, T tokens, D width, H heads, S keys seen so far.
"""

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads, bias):
        super().__init__()
        self.group, self.size = heads // kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias)
        self.out_proj = nn.Linear(width, width, bias)

    def forward(self, x, seen=None, angles=None, past=None):
        q, k, v = (
            p(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if angles is not None:
            q, k = turned(q, angles), turned(k, angles)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        scores = q @ k.repeat_interleave(self.group, 1).mT / self.size**0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -1e9)  # finite: a padding query sees nothing at all
        out = scores.softmax(-1) @ v.repeat_interleave(self.group, 1)
        return self.out_proj(out.transpose(1, 2).flatten(2)), (k, v)


def turned(x, angles):
    """Rotary positions: x (B, H, T, 2N) turned by angles (B, 1, T, N)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


class VisionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.vit_hidden_dim)
        self.self_attn = Attention(cfg.vit_hidden_dim, cfg.vit_n_heads, cfg.vit_n_heads, True)
        self.layer_norm2 = nn.LayerNorm(cfg.vit_hidden_dim)
        self.fc1 = nn.Linear(cfg.vit_hidden_dim, cfg.vit_inter_dim)
        self.fc2 = nn.Linear(cfg.vit_inter_dim, cfg.vit_hidden_dim)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))[0]
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class Vision(nn.Module):
    """Pictures (N, 3, side, side) -> patches (N, P, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, cfg.vit_hidden_dim, cfg.vit_patch_size, cfg.vit_patch_size)
        self.position_embedding = nn.Embedding(
            (cfg.vit_img_size // cfg.vit_patch_size) ** 2, cfg.vit_hidden_dim
        )
        self.layers = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.vit_n_blocks))
        self.post_layernorm = nn.LayerNorm(cfg.vit_hidden_dim)

    def forward(self, pictures):
        x = self.patch_embedding(pictures).flatten(2).mT + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class TextBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.lm_hidden_dim, eps=1e-5)
        self.self_attn = Attention(cfg.lm_hidden_dim, cfg.lm_n_heads, cfg.lm_n_kv_heads, False)
        self.post_attention_layernorm = nn.RMSNorm(cfg.lm_hidden_dim, eps=1e-5)
        self.gate_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, False)
        self.up_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, False)
        self.down_proj = nn.Linear(cfg.lm_inter_dim, cfg.lm_hidden_dim, False)

    def forward(self, x, seen, angles, past):
        out, kept = self.self_attn(self.input_layernorm(x), seen, angles, past)
        x = x + out
        inner = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(inner)) * self.up_proj(inner)), kept


class Text(nn.Module):
    """Embeddings (B, T, D), mask (B, S) -> (hidden states (B, T, D), cache)."""

    def __init__(self, cfg):
        super().__init__()
        self.size = cfg.lm_hidden_dim // cfg.lm_n_heads
        self.embed_tokens = nn.Embedding(cfg.lm_vocab_size, cfg.lm_hidden_dim)
        self.layers = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.lm_n_blocks))
        self.norm = nn.RMSNorm(cfg.lm_hidden_dim, eps=1e-5)
        self.head = nn.Linear(cfg.lm_hidden_dim, cfg.lm_vocab_size, bias=False)
        self.head.weight = self.embed_tokens.weight

    def forward(self, x, mask=None, cache=None):
        new, old = x.shape[1], cache[0][0].shape[2] if cache else 0
        keys = torch.ones(x.shape[0], old + new) if mask is None else mask
        place = (keys.cumsum(1) - 1).clamp(min=0)[:, None, -new:, None]
        angles = place * 10000 ** (-2 * torch.arange(self.size // 2) / self.size)
        seen = torch.ones(new, old + new, dtype=torch.bool).tril(old) & keys[:, None, None].bool()
        kept = []
        for number, layer in enumerate(self.layers):
            x, one = layer(x, seen, angles, cache[number] if cache else None)
            kept.append(one)
        return self.norm(x), kept


class Projector(nn.Module):
    """Patches (N, P, D) -> features (N, P / factor^2, width of the text)."""

    def __init__(self, cfg):
        super().__init__()
        self.factor = cfg.mp_pixel_shuffle_factor
        self.proj = nn.Linear(cfg.vit_hidden_dim * self.factor**2, cfg.lm_hidden_dim, bias=False)

    def forward(self, x):
        side, f = int(x.shape[1] ** 0.5), self.factor
        x = x.unflatten(1, (side // f, f, side // f, f)).transpose(2, 3)
        return self.proj(x.flatten(3).flatten(1, 2))


def load(tower, repository):
    """Fill a tower from a repository's model.safetensors; rows beyond its vocabulary stay as they are."""
    held = tower.state_dict()
    for key, tensor in load_file(hf_hub_download(repository, "model.safetensors")).items():
        for part in ("vision_model.", "embeddings.", "encoder.", "model.", "mlp."):
            key = key.replace(part, "", 1)
        held[key.replace("o_proj", "out_proj")][: tensor.shape[0]].copy_(tensor)


@torch.no_grad()
def write(decoder, embeds, mask, count, pick, cached=True):
    """``count`` new ids (B, count) after ``embeds``: with a cache, or reading everything again each time."""
    ids, cache, fed = [], None, embeds
    for _ in range(count):
        hidden, kept = decoder(fed, mask, cache)
        ids.append(pick(decoder.head(hidden[:, -1])))
        step = decoder.embed_tokens(ids[-1])
        cache, fed = (kept, step) if cached else (None, torch.cat((fed, step), 1))
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return torch.cat(ids, 1) if ids else torch.empty(len(embeds), 0, dtype=torch.long)


def likeliest(logits):
    return logits.argmax(-1, keepdim=True)


def drawn(logits):
    return torch.multinomial(logits.softmax(-1), num_samples=1)


def after_end(ids, end):
    """Everything after the first ``end`` of a row becomes ``end``."""
    ended = (ids == end).cumsum(1) - (ids == end).long() > 0
    return ids.masked_fill(ended, end)


def next_token_loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
