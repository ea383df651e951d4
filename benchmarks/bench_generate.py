"""Greedy decoding of the 222M shape against transformers' generate, and against the machine's memory.

Unusual: the prompt's share is taken out: what counts is (33 tokens - 1 token) / 32. The limit is one product
of a matrix as large as all the weights that a token reads with a vector, in the same dtype, by whichever of
torch.mv and our own product of one row is faster here.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from benchmarks.sides import DTYPES, against, our_model, their_decoder, write_ours, write_theirs
from nanovlm import preset
from nanovlm.layers import few_rows

COUNT = 32


def token_bytes(decoder) -> int:
    """What one token reads of a decoder's weights, tied ones once."""
    return sum(p.numel() * p.element_size() for p in decoder.parameters() if p.dim() == 2)


def matrix(byte_count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """As many rows of ``width`` as make ``byte_count``."""
    return torch.randn(byte_count // (width * dtype.itemsize), width, dtype=dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(benchmark, dtype, batch, compiled):
    if compiled and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    model = our_model(preset("original_small"), DTYPES[dtype])
    theirs = their_decoder(model)
    if compiled:
        model.decoder.compile_step()
    ids = torch.randint(0, model.cfg.lm_vocab_size, (batch, 8))
    weights = matrix(token_bytes(model.decoder), model.cfg.lm_hidden_dim, DTYPES[dtype])
    vector = torch.randn(weights.shape[1], dtype=DTYPES[dtype])
    turns = against(
        benchmark,
        lambda: write_ours(model, ids, COUNT + 1),
        first=lambda: write_ours(model, ids, 1),
        theirs=lambda: write_theirs(theirs, ids, COUNT + 1),
        their_first=lambda: write_theirs(theirs, ids, 1),
        mv=lambda: torch.mv(weights, vector),
        one_row=lambda: few_rows(vector[None], weights),
    )
    if dtype == "fp32":  # bf16 logits of random weights tie too often for argmax to agree
        assert torch.equal(write_ours(model, ids, COUNT), write_theirs(theirs, ids, COUNT))
    our_token = (turns.median("ours") - turns.median("first")) / COUNT
    their_token = (turns.median("theirs") - turns.median("their_first")) / COUNT
    limit = min(turns.median("mv"), turns.median("one_row"))
    benchmark.extra_info.update(
        ours=f"{our_token * 1e3:.1f} ms",
        theirs=f"{their_token * 1e3:.1f} ms",
        ratio=f"{their_token / our_token:.2f}",
        limit=f"{limit * 1e3:.1f} ms",
        of_the_limit=f"{limit / our_token:.0%}",
        mv=f"{turns.median('mv') * 1e3:.1f} ms",
    )
