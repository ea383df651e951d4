"""One training step, 222M shape, against the same shape out of transformers: time and peak memory.

Both sides: 224 px, 128 positions of which 49 are the picture's, sdpa, AdamW(fused=True), gradients set to None.
Theirs is SiglipVisionModel, a linear layer and LlamaForCausalLM with its own loss. "all": every text token is
labelled; "quarter": a quarter of all positions, as in real data. Memory is what lives at once beyond weights,
gradients and the optimizer's state, counted operator by operator. Ours computes activation functions and norms
again ("elementwise") in speed and memory alike; "recomputed" is the memory with whole blocks computed again.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sides import against, our_model, their_decoder, their_encoder
from compat.child.memory import LiveBytes
from nanovlm import VisionLanguageModel, preset
from nanovlm.projector import pixel_shuffle

TEXT, ROUNDS = 79, 3


class Theirs(nn.Module):
    """The same shape out of transformers' parts, with our weights."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.encoder, self.decoder = their_encoder(model), their_decoder(model)
        self.proj = nn.Linear(model.MP.proj.in_features, model.MP.proj.out_features, bias=False)
        self.proj.load_state_dict(model.MP.proj.state_dict())
        self.factor = model.cfg.mp_pixel_shuffle_factor
        self.requires_grad_(True)

    def loss(self, ids: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        patches = self.encoder(pixel_values=pixels).last_hidden_state
        features = self.proj(pixel_shuffle(patches, self.factor))
        embeds = torch.cat((features, self.decoder.get_input_embeddings()(ids)), dim=1)
        # transformers shifts labels itself
        shifted = torch.full(embeds.shape[:2], -100)
        shifted[:, features.shape[1] + 1 :] = labels[:, :-1]
        return self.decoder(inputs_embeds=embeds, labels=shifted, use_cache=False).loss


def batch(model: VisionLanguageModel, rows: int, labelled: str) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, pixels, labels): the last text position has no label, as there is nothing behind it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.cfg.lm_vocab_size, (rows, TEXT), generator=generator)
    side = model.cfg.vit_img_size
    pixels = torch.rand(rows, 3, side, side, generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    if labelled == "quarter":
        labels[:, : TEXT - 1 - (TEXT + 49) // 4] = -100
    return ids, pixels, labels


class Step:
    """A training step of one side."""

    def __init__(self, module: nn.Module, loss, autocast: bool) -> None:
        self.module, self.loss, self.autocast = module, loss, autocast
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def memory(self) -> int:
        """Bytes at the peak of a step beyond weights and gradients, which are held throughout, and optimizer state."""
        own = list(self.module.parameters())
        for parameter in own:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in own]
        assert self.optimizer.state, "the optimizer's state is not of this step: it was made by the first"
        with LiveBytes([*own, *gradients, *self.module.buffers()]) as live:
            before = live.live
            self()
        return live.peak - before


@pytest.mark.parametrize("labelled", ["all", "quarter"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 8])
def test_step(benchmark, rows, dtype, labelled):
    model = our_model(preset("original_small"), torch.float32).train().requires_grad_(True)
    theirs = Theirs(model).train()
    ids, pixels, labels = batch(model, rows, labelled)
    images = [[tile] for tile in pixels]
    steps = {
        "ours": Step(model, lambda: model(ids, images, None, labels, want_logits=False)[1], dtype == "bf16"),
        "theirs": Step(theirs, lambda: theirs.loss(ids, pixels, labels), dtype == "bf16"),
    }
    first = {name: step() for name, step in steps.items()}
    torch.testing.assert_close(first["ours"], first["theirs"], rtol=1e-4 if dtype == "fp32" else 0.02, atol=0)
    model.recompute_activations("blocks")
    recomputed = steps["ours"].memory()
    model.recompute_activations("elementwise")
    peak = {name: step.memory() for name, step in steps.items()}
    turns = against(benchmark, steps["ours"], ROUNDS, theirs=steps["theirs"])
    benchmark.extra_info.update(
        ours=f"{turns.median('ours'):.2f} s",
        theirs=f"{turns.median('theirs'):.2f} s",
        ratio=f"{turns.median('theirs') / turns.median('ours'):.2f}",
        memory=f"{peak['ours'] / 2**20:.0f} of {peak['theirs'] / 2**20:.0f} MiB",
        share=f"{peak['ours'] / peak['theirs']:.2f}",
        recomputed=f"{recomputed / peak['theirs']:.2f}",
    )
