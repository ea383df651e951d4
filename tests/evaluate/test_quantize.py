"""Int8 weights of the language model: fewer bytes, close logits, the same answers nearly always."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from nanovlm import VisionLanguageModel, cli, preset
from nanovlm.errors import ConfigError
from nanovlm.quantize import quantize_int8, stored_bytes
from tests.model.helpers import scale

NEEDS = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@NEEDS
@pytest.mark.parametrize("name", ["tiny", "tiny_siglip2_gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_fall_and_logits_stay_close(name, tied, picture):
    model = scale(VisionLanguageModel(preset(name, lm_tie_weights=tied), load_backbone=False))
    ids, images = model.prepare(picture(), "What is this?")
    with torch.no_grad():
        before, bytes_before = model(ids, images)[0], stored_bytes(model.decoder)
        matrices = sum(m.weight.numel() for m in model.decoder.modules() if isinstance(m, torch.nn.Linear))
        matrices -= model.decoder.head.weight.numel() if tied else 0
        rows = sum(m.out_features for m in model.decoder.modules() if isinstance(m, torch.nn.Linear))
        rows -= model.decoder.head.out_features if tied else 0
        after = quantize_int8(model)(ids, images)[0]
    saved = bytes_before - stored_bytes(model.decoder)
    assert 3 * matrices - 9 * rows <= saved <= 3 * matrices - 4 * rows, "a byte for four, and a scale for each row"
    assert (after - before).norm() / before.norm() < 0.05
    assert not torch.equal(after, before)
    embedding = model.decoder.token_embedding.weight
    assert type(embedding) is torch.nn.Parameter and embedding.dtype == torch.float32
    assert model.generate(ids, images, max_new_tokens=3, greedy=True).shape[1] >= 1


@NEEDS
def test_evaluate_quantizes(tiny_folder, capsys):
    words = ["--tasks", "synthetic", "--max-samples", "2", "--output", "", "--int8", "--json"]
    assert cli.main(["evaluate", "--model", str(tiny_folder), *words]) == 0
    assert '"quantization": "int8"' in capsys.readouterr().out


def test_without_torchao_a_sentence_says_what_to_install(monkeypatch):
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"nanovlm\[quantize\]"):
        quantize_int8(VisionLanguageModel(preset("tiny"), load_backbone=False))
