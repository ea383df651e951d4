"""A picture and a prompt up to the first answer token, 222M shape, against transformers in the same dtype.

The projector between the two halves is ours on both sides: transformers has none of its kind.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.sides import DTYPES, against, our_model, their_decoder, their_encoder, write_ours
from nanovlm import VisionLanguageModel, preset

TEXT = 32


@torch.inference_mode()
def their_first_ids(encoder, decoder, model: VisionLanguageModel, input_ids: Tensor, pixels: Tensor) -> Tensor:
    """The first ids (B, 1) after features (one tile a row) and text, with the cache filled."""
    side = pixels.shape[-1] // model.cfg.vit_patch_size
    patches = encoder(pixel_values=pixels).last_hidden_state
    text = decoder.get_input_embeddings()(input_ids)
    embeds = torch.cat((model.MP(patches, (side, side)), text), dim=1)
    return decoder(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits.argmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(benchmark, dtype):
    model = our_model(preset("original_small"), DTYPES[dtype])
    decoder, encoder = their_decoder(model), their_encoder(model)
    ids = torch.randint(0, model.cfg.lm_vocab_size, (1, TEXT))
    pixels = torch.rand(1, 3, model.cfg.vit_img_size, model.cfg.vit_img_size).to(DTYPES[dtype])
    turns = against(
        benchmark,
        lambda: write_ours(model, ids, 1, [[pixels]]),
        theirs=lambda: their_first_ids(encoder, decoder, model, ids, pixels),
    )
    if dtype == "fp32":
        wanted = their_first_ids(encoder, decoder, model, ids, pixels)
        assert torch.equal(write_ours(model, ids, 1, [[pixels]]), wanted)
    benchmark.extra_info.update(
        ours=f"{turns.median('ours') * 1e3:.0f} ms",
        theirs=f"{turns.median('theirs') * 1e3:.0f} ms",
        ratio=f"{turns.median('theirs') / turns.median('ours'):.2f}",
    )
