"""What is fast gives what is plain, and the benchmarks compare like with like; no timing in here."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from benchmarks.bench_generate import matrix, token_bytes
from benchmarks.bench_images import with_numpy, with_torch
from benchmarks.bench_load import load
from benchmarks.bench_prefill import their_first_ids
from benchmarks.sides import Turns, their_decoder, their_encoder, write_ours, write_theirs
from nanovlm import get_image_processor, layers
from nanovlm.generate import decode_one_token, prefill
from nanovlm.language import llama
from tests.model.helpers import pad, prompt, tiles, tiny_model

COUNT = 12


@pytest.fixture
def model():
    return tiny_model("v0.1").requires_grad_(False)


# -- both sides of the benchmarks -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_both_sides_of_the_decode_benchmark_write_the_same_tokens(model, batch):
    ids = torch.tensor([prompt(model.cfg, 8, seed=seed) for seed in range(batch)])
    ours = write_ours(model, ids, COUNT)
    assert ours.shape == (batch, COUNT) and torch.equal(ours, write_theirs(their_decoder(model), ids, COUNT))


def test_both_sides_of_the_prefill_benchmark_write_the_same_token(model):
    ids, pixels = torch.tensor([prompt(model.cfg, 8, seed=seed) for seed in range(2)]), tiles(model.cfg, 2)
    theirs = their_first_ids(their_encoder(model), their_decoder(model), model, ids, pixels)
    assert torch.equal(write_ours(model, ids, 1, [[pixels[:1]], [pixels[1:]]]), theirs)
    assert not torch.equal(theirs, their_first_ids(their_encoder(model), their_decoder(model), model, ids, -pixels))


@pytest.mark.parametrize("plain", [with_torch, with_numpy])
@pytest.mark.parametrize("size", [(96, 64), (300, 700), (64, 64)])
def test_tiles_are_those_of_the_plain_ways(tiny_config, picture, plain, size):
    side = tiny_config.vit_img_size
    got, (rows, columns) = get_image_processor(tiny_config)(picture(*size))
    assert torch.allclose(got, plain(picture(*size), (columns * side, rows * side), side), atol=1e-6, rtol=0)


def test_a_load_is_measured_in_bytes_of_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    facts = load(tmp_path, torch.bfloat16)
    assert facts["weight_bytes"] == 2 * sum(p.numel() for p in model.parameters())
    assert facts["grown_bytes"] > 0 and facts["seconds"] > 0


def test_the_memory_limit_reads_as_much_as_a_token(model):
    weights = [p for name, p in model.decoder.named_parameters() if p.dim() == 2]
    assert model.decoder.head.weight is model.decoder.token_embedding.weight  # read once
    assert token_bytes(model.decoder) == sum(p.nbytes for p in weights)
    read = matrix(token_bytes(model.decoder), model.cfg.lm_hidden_dim, torch.float32)
    assert read.nbytes == token_bytes(model.decoder)


def test_sides_take_turns():
    calls: list[str] = []
    turns = Turns(one=lambda: calls.append("one"), other=lambda: calls.append("other"))
    turns(), turns()
    assert calls == ["one", "other"] * 2 and turns.median("one") > 0 and len(turns.seconds["other"]) == 2


# -- one token behind a cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [4, 2, 1])
@torch.no_grad()
def test_the_short_way_of_a_token_is_the_blocks_way(heads, padded):
    model = tiny_model("main", lm_n_kv_heads=heads)
    rows = [prompt(model.cfg, 9, 1, 0), prompt(model.cfg, 5 if padded else 9, 1, 1)]
    ids, mask = pad(rows)
    images = [[tiles(model.cfg, 1, 0)], [tiles(model.cfg, 1, 1)]]
    options = {"max_new_tokens": COUNT, "greedy": True, "eos_token_id": -1}
    short = model.generate(ids, images, mask, **options)
    called = []
    model.decoder.blocks[1].mlp.register_forward_hook(lambda *_: called.append(1))
    assert torch.equal(model.generate(ids, images, mask, **options), short)
    assert len(called) == COUNT  # the hook saw every token, so these came by way of the blocks
    assert len(set(short.flatten().tolist())) > 2


def test_a_part_that_was_replaced_is_called_for_every_token(model):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ids = torch.tensor([prompt(model.cfg, 6)])
    before = write_ours(model, ids, COUNT)
    old = model.decoder.blocks[0].attn.v_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.decoder.blocks[0].attn.v_proj = new
    after = write_ours(model, ids, COUNT)
    assert not torch.equal(before, after) and torch.equal(after, write_theirs(their_decoder_doubled(model), ids, COUNT))


def their_decoder_doubled(model):
    theirs = their_decoder(model)
    theirs.model.layers[0].self_attn.v_proj.weight.mul_(2)
    return theirs


def states_of_a_long_answer(model, count):
    """Hidden states (count, B, D) of decoding the same ids behind one prompt, and whether the weights were packed."""
    decoder, ids = model.decoder, torch.tensor([prompt(model.cfg, 9, seed=seed) for seed in range(2)])
    cache = decoder.new_cache(2, ids.shape[1] + count)
    with torch.inference_mode():
        prefill(decoder, decoder.embed(ids), None, cache)
        positions = torch.full((2, 1), ids.shape[1])
        steps = [
            decode_one_token(decoder, ids[:, step % 9], positions + step, None, cache).float()
            for step in range(count)
        ]  # fmt: skip
        return torch.stack(steps), any(layer.out.is_mkldnn for layer in cache.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_what_plain_ones_do_and_are_given_back(monkeypatch, model, dtype):
    model = model.to(dtype)
    found, was_packed = states_of_a_long_answer(model, 20)
    assert was_packed == (dtype == torch.bfloat16 and not layers.SLOW_BF16)
    _, short = states_of_a_long_answer(model, 2 * llama.PACKING_PAYS - 1)
    assert not short
    monkeypatch.setattr(llama, "PACKING_PAYS", 1000)
    plain, again = states_of_a_long_answer(model, 20)
    assert not again and torch.allclose(found, plain, atol=0.05, rtol=0.02)
    monkeypatch.undo()
    with torch.no_grad():
        model.decoder.blocks[0].mlp.down_proj.weight.data.neg_()  # bumps no version: nothing may be kept by it
    after, _ = states_of_a_long_answer(model, 20)
    assert not torch.allclose(after, plain, atol=0.05, rtol=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_tokens_are_the_same_and_nothing_is_compiled_twice(batch):
    model = tiny_model("main").requires_grad_(False)
    rows = [prompt(model.cfg, 9 - 3 * seed, 1, seed) for seed in range(batch)]
    ids, mask = pad(rows)
    images = [[tiles(model.cfg, 1, seed)] for seed in range(batch)]
    options = {"max_new_tokens": COUNT, "greedy": True, "eos_token_id": -1}
    plain = model.generate(ids, images, mask, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.decoder.compile_step()
    assert torch.equal(model.generate(ids, images, mask, **options), plain)
    model.generate(ids, images, mask, **{**options, "max_new_tokens": 40})
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == (1 if batch == 1 else 0)


# -- few rows of float32 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 6, 35])
def test_few_rows_in_parts_is_the_whole_product(monkeypatch, rows, threads, mkl):
    monkeypatch.setattr(layers, "MKL", mkl)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layer = layers.Linear(48, rows, bias=False)
    for shape in ((1, 48), (48,), (1, 1, 48), (8, 48), (3, 2, 48), (9, 48)):
        x = torch.randn(shape)
        want = F.linear(x.double(), layer.weight.double())
        with torch.no_grad():
            got = layer(x)
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-5
    by_column = layer.weight.detach().T.contiguous().T
    assert torch.allclose(layers.few_rows(x, by_column), want.float(), atol=1e-5)
    assert layer(x).requires_grad  # training goes by torch's own product


# -- bfloat16 without arithmetic for it -----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 7, 48), (5, 48), (2, 1, 48)])
def test_a_product_in_pieces_is_the_float32_product_rounded_once(monkeypatch, shape, bias):
    monkeypatch.setattr(layers, "SLOW_BF16", True)
    monkeypatch.setattr(layers, "PIECE", 48 * 10)  # 33 rows: three pieces and a rest
    layer = layers.Linear(48, 33, bias=bias).bfloat16()
    x = torch.randn(shape).bfloat16()
    with torch.no_grad():
        got = layer(x)
        want = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    assert got.dtype == torch.bfloat16 and got.shape == (*shape[:-1], 33)
    assert (got.float() - want).abs().max() <= want.abs().max() * 2**-8


def test_training_and_one_row_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(layers, "SLOW_BF16", True)
    layer = layers.Linear(48, 33).bfloat16()
    x = torch.randn(4, 48).bfloat16()
    plain = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain) and layer(x).requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x[:1]), F.linear(x[:1], layer.weight, layer.bias))


def test_the_decoder_multiplies_by_the_fast_product_everywhere(model):
    kinds = {type(module) for module in model.decoder.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {layers.Linear} and type(model.decoder.blocks[0]) in llama.PLAIN


@pytest.mark.parametrize("activation", [torch.nn.functional.gelu, layers.gelu_tanh])
def test_gelu_in_the_product_is_nearer_to_the_exact_one_and_leaves_hooked_modules_alone(activation):
    torch.manual_seed(0)
    module, x = torch.nn.Linear(96, 200).bfloat16(), torch.randn(3, 50, 96).bfloat16()
    with torch.no_grad():
        exact = activation(torch.nn.functional.linear(x.double(), module.weight.double(), module.bias.double()))
        apart, joined = activation(module(x)).double() - exact, layers.gelu_of(module, x, activation).double() - exact
        assert joined.norm() < (0.8 if layers.PACKS else 1.01) * apart.norm() and apart.norm() < 0.01 * exact.norm()
        module.register_forward_hook(lambda module, args, out: 0 * out)
        assert not layers.gelu_of(module, x, activation).any()
    assert layers.gelu_of(torch.nn.Linear(96, 8), x.float(), activation).requires_grad
