"""Several documents in one row, activations computed twice, and a loss that keeps no logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from compat.child.memory import LiveBytes
from nanovlm import VisionLanguageModel, preset
from nanovlm import loss as losses
from nanovlm.errors import ConfigError, PromptError
from nanovlm.generate import position_ids
from nanovlm.loss import linear_cross_entropy
from nanovlm.recompute import MODES
from tests.model.helpers import prompt, scale, tiles, tiny_model

PACKABLE = (
    "tiny", "tiny_siglip2_gemma", "tiny_dinov2_smollm", "tiny_dinov3_smollm", "tiny_dinov3_gemma",
    "tiny_granite_docling",
)  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def built(name: str, **changes) -> VisionLanguageModel:
    return scale(VisionLanguageModel(preset(name, **changes), load_backbone=False))


@pytest.mark.parametrize("name", PACKABLE)
def test_a_document_in_a_pack_gets_the_logits_it_has_alone(name):
    model = built(name)
    # 30 words are more than Gemma's tiny window; the second document has two pictures, the third none
    documents = [(prompt(model.cfg, 30, images=1, seed=1), 1), (prompt(model.cfg, 9, images=2, seed=2), 2),
                 (prompt(model.cfg, 40, seed=3), 0)]  # fmt: skip
    pictures = tiles(model.cfg, 3)
    ids = [2, 2] + [i for words, _ in documents for i in words] + [2]
    numbers = [0, 0] + [n for n, (words, _) in enumerate(documents, 1) for _ in words] + [0]
    with torch.inference_mode():
        packed, _ = model(torch.tensor([ids]), [[pictures]], torch.tensor([numbers]))
        start, tile = 2, 0
        for words, count in documents:
            mine = [[pictures[tile : tile + count]]] if count else None
            alone, _ = model(torch.tensor([words]), mine)
            torch.testing.assert_close(packed[:, start : start + len(words)], alone, **CLOSE)
            start, tile = start + len(words), tile + count


def test_without_the_numbers_a_document_does_see_the_one_before():
    model = tiny_model()
    first, second = prompt(model.cfg, 10, seed=1), prompt(model.cfg, 10, seed=2)
    ones = torch.ones(1, 20, dtype=torch.long)
    with torch.inference_mode():
        together, _ = model(torch.tensor([first + second]), None, ones)
        alone, _ = model(torch.tensor([second]), None)
    assert (together[:, 10:] - alone).abs().max() > 0.1


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_positions_restart_with_each_document(lengths, before, behind):
    numbers = [0] * before + [n for n, length in enumerate(lengths, 1) for _ in range(length)] + [0] * behind
    found = position_ids(torch.empty(1, len(numbers), 1), torch.tensor([numbers]))[0].tolist()
    assert found[before : before + sum(lengths)] == [i for length in lengths for i in range(length)]


def test_numbers_that_fall_and_rows_that_cannot_be_packed_are_refused():
    model = tiny_model()
    ids = torch.tensor([prompt(model.cfg, 4)])
    with pytest.raises(PromptError, match=r"number a row's documents from left to right; these numbers, 1 to 2"):
        model(ids, None, torch.tensor([[2, 2, 1, 1]]))
    with pytest.raises(PromptError, match="these numbers, -1 to 1"):
        model(ids, None, torch.tensor([[-1, 1, 1, 1]]))
    with pytest.raises(PromptError, match="numbers 2 documents in a row; give each a row of its own"):
        model.generate(ids, None, torch.tensor([[1, 1, 2, 2]]))
    old = tiny_model("v0.1")
    with pytest.raises(PromptError, match="puts features in front of a row"):
        old(ids, tiles(old.cfg, 1), torch.tensor([[1, 1, 2, 2]]))
    assert old(ids, None, torch.tensor([[1, 1, 2, 2]]))[0].isfinite().all()


@pytest.mark.parametrize(("mode", "share"), [("elementwise", 0.8), ("blocks", 0.4)])
@pytest.mark.parametrize("name", [*PACKABLE, "tiny_original_small"])
def test_activations_made_again_give_the_same_gradients_in_less_memory(name, mode, share):
    model = built(name).train()
    ids = torch.tensor([prompt(model.cfg, 12, images=1)])
    targets = torch.randint(3, 200, ids.shape)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)  # DINOv3 moves its positions in training
        model.zero_grad()
        model(ids, [[tiles(model.cfg, 1)]], None, targets)[1].backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain, kept = gradients(), saved_bytes(model, ids, targets)
    model.recompute_activations(mode)
    again = gradients()
    assert len(plain) == len(again) > 20
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(other, one, **CLOSE)
    assert saved_bytes(model, ids, targets) < share * kept


def test_under_autocast_too_and_twice_over_one_graph():
    model = tiny_model().train()
    ids = torch.tensor([prompt(model.cfg, 12, images=1)])
    found = {}
    for mode in MODES:
        model.recompute_activations(mode)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, [[tiles(model.cfg, 1)]], None, ids)[1]
        first = torch.autograd.grad(loss, model.parameters(), retain_graph=True, allow_unused=True)
        found[mode] = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
        for one, other in zip(first, found[mode], strict=True):
            assert one is other is None or torch.equal(one, other)
    for mode in MODES:
        for one, other in zip(found["nothing"], found[mode], strict=True):
            assert one is other is None or (one - other).norm() < 0.05 * one.norm() + 1e-6, mode


@pytest.mark.parametrize("mode", ["elementwise", "blocks"])
def test_autocast_keeps_no_copy_of_the_weights_that_are_cast_again(mode):
    model = tiny_model().train()
    ids = torch.tensor([prompt(model.cfg, 3)])
    copies = sum(2 * p.numel() for p in model.decoder.blocks.parameters() if p.dim() == 2)

    def held(mode: str) -> int:
        model.recompute_activations(mode)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live, torch.autocast("cpu", torch.bfloat16):
            before = live.live
            loss = model(ids, None, None, ids, want_logits=False)[1]
            return live.live - before if loss.requires_grad else 0

    kept, made_again = held("nothing"), held(mode)
    assert kept > copies > 10_000 and 0 < made_again < kept - copies


class Exact(torch.nn.Linear):
    """An adapter's part that stays in float32."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(x.float(), self.weight)


def test_a_layer_known_twice_a_shared_weight_and_one_of_its_own_kind_stay_as_they_are():
    model = tiny_model().train()
    attention, mlp = model.decoder.blocks[0].attn, model.decoder.blocks[0].mlp
    attention.also = attention.q_proj
    mlp.up_proj.weight = mlp.gate_proj.weight
    exact = Exact(attention.out_proj.in_features, attention.out_proj.out_features, bias=False)
    exact.weight = attention.out_proj.weight
    attention.out_proj = exact
    before, ids, losses = dict(model.named_parameters()), torch.tensor([prompt(model.cfg, 6)]), []
    for mode in MODES:
        model.recompute_activations(mode)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(ids, None, None, ids)[1])
        losses[-1].backward()
    assert max(losses) - min(losses) < 0.01 * losses[0]
    assert all(parameter is before[name] for name, parameter in model.named_parameters()) and len(before) > 20
    assert attention.also.weight is attention.q_proj.weight and attention.q_proj.weight.grad is not None


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="recompute='some': expected one of nothing, elementwise, blocks"):
        tiny_model().recompute_activations("some")


def saved_bytes(model: VisionLanguageModel, ids: torch.Tensor, targets: torch.Tensor) -> int:
    """Bytes that live between forward and backward pass, beyond the model's own."""
    with LiveBytes([*model.parameters(), *model.buffers()]) as tracker:
        before = tracker.live
        loss = model(ids, [[tiles(model.cfg, 1)]], None, targets)[1]
        assert loss.requires_grad
        return tracker.live - before


def test_a_loss_without_logits_is_the_loss_with_them_and_so_are_its_gradients():
    model = tiny_model().train()
    ids = torch.tensor([prompt(model.cfg, 20, images=1)])
    targets = torch.where(torch.rand(ids.shape) < 0.5, torch.randint(3, 200, ids.shape), -100)
    found = {}
    for want_logits in (True, False):
        model.zero_grad()
        logits, loss = model(ids, [[tiles(model.cfg, 1)]], None, targets, want_logits=want_logits)
        assert (logits is None) is not want_logits
        loss.backward()
        found[want_logits] = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(other, one, **CLOSE)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_cross_entropy_is_autograds_whatever_the_chunk(monkeypatch, rows, dtype):
    monkeypatch.setattr(losses, "CHUNK", rows * 50)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (20,), generator=generator)
    found = linear_cross_entropy(hidden, weight, labels)
    wanted = F.cross_entropy((hidden.float() @ weight.float().T), labels)
    tolerance = {"rtol": 0.05, "atol": 0.01} if dtype == torch.bfloat16 else CLOSE
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, **tolerance)
    for one, other in zip(
        torch.autograd.grad(3 * found, (hidden, weight)), torch.autograd.grad(3 * wanted, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, **tolerance)


def test_under_autocast_the_products_are_in_its_dtype_and_gradients_in_the_parameters():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
        wanted = F.cross_entropy((hidden @ weight.T).float(), labels)
    assert loss.dtype == torch.float32 and torch.allclose(loss, wanted, atol=1e-5)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_what_is_frozen_gets_no_gradient_and_a_second_backward_is_refused():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(6, dtype=torch.long))
    loss.backward(retain_graph=True)
    assert hidden.grad is not None and weight.grad is None
    with pytest.raises(RuntimeError, match="differentiated already; call forward again"):
        loss.backward()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, torch.zeros(6, dtype=torch.long)).requires_grad


def test_a_head_that_somebody_replaced_or_hooked_is_called():
    model = tiny_model()
    ids = torch.tensor([prompt(model.cfg, 6)])
    targets = torch.randint(3, 200, ids.shape)
    asked: list[int] = []
    handle = model.decoder.head.register_forward_hook(lambda *_: asked.append(1))
    hooked = model(ids, None, None, targets, want_logits=False)[1]
    handle.remove()
    assert asked == [1]
    torch.testing.assert_close(model(ids, None, None, targets, want_logits=False)[1], hooked, **CLOSE)


