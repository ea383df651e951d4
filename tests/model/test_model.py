"""The whole model's forward pass: layouts of three generations, padding, loss, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm import VisionLanguageModel, preset
from nanovlm.errors import ImageError, ImageTokenMismatch, NanoVLMError, NoLabels, PromptError, PromptTooLong
from nanovlm.layers import RMSNorm
from nanovlm.loss import cross_entropy
from nanovlm.presets import PRESETS
from nanovlm.projector import pixel_shuffle
from nanovlm.vlm import splice
from tests.model.helpers import pad, prompt, tiles, tiny_config, tiny_model

GENERATIONS = ["v0.1", "v0.2", "main"]
SAME = 1e-5  # logits are of order 1


def batch_of_three(cfg):
    """Rows with one, two and no picture, and what each of them sees."""
    rows = [prompt(cfg, 5, 1, seed=1), prompt(cfg, 9, 2, seed=2), prompt(cfg, 7, 0, seed=3)]
    return rows, [[tiles(cfg, 1, seed=1)], [tiles(cfg, 2, seed=2)], []]


@pytest.fixture(scope="module", params=GENERATIONS)
def model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_in_a_mixed_batch_equals_the_row_alone(model, side):
    rows, images = batch_of_three(model.cfg)
    ids, mask = pad(rows, side)
    logits, loss = model(ids, images, mask)
    assert logits.shape == (*ids.shape, model.cfg.lm_vocab_size) and loss is None
    for number, row in enumerate(rows):
        alone, _ = model(torch.tensor([row]), images[number])
        assert (logits[number][mask[number].bool()] - alone[0]).abs().max() < SAME


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
@torch.no_grad()
def test_batch_size_order_and_padding_never_change_a_row(lengths, side, data):
    model = tiny_model()
    counts = [data.draw(st.integers(0, 2)) for _ in lengths]
    rows = [prompt(model.cfg, n, k, seed=i) for i, (n, k) in enumerate(zip(lengths, counts, strict=True))]
    images = [[tiles(model.cfg, k, seed=i)] if k else [] for i, k in enumerate(counts)]
    order = data.draw(st.permutations(range(len(rows))))
    ids, mask = pad([rows[i] for i in order], side)
    logits, _ = model(ids, [images[i] for i in order], mask)
    for place, i in enumerate(order):
        alone, _ = model(torch.tensor([rows[i]]), images[i])
        assert (logits[place][mask[place].bool()] - alone[0]).abs().max() < SAME


@torch.no_grad()
def test_all_forms_of_images_mean_the_same(model):
    cfg = model.cfg
    one, two = tiles(cfg, 1, seed=1), tiles(cfg, 1, seed=2)
    ids = torch.tensor([prompt(cfg, 6, 1, seed=1), prompt(cfg, 6, 1, seed=2)])
    want, _ = model(ids, torch.cat((one, two)))
    for images in (
        [[one], [two]],
        [one, two],
        [one[0], two[0]],
        [[one[0]], [two[0]]],
        torch.stack((one, two)),
    ):
        assert torch.equal(model(ids, images)[0], want)


@torch.no_grad()
def test_no_picture_can_be_said_in_three_ways(model):
    ids = torch.tensor([prompt(model.cfg, 6)])
    assert all(torch.equal(model(ids, None)[0], model(ids, images)[0]) for images in ([], [[]], [None]))


@torch.no_grad()
def test_pictures_and_their_order_reach_the_logits(model):
    cfg = model.cfg
    ids = torch.tensor([prompt(cfg, 6, 2)])
    pair = tiles(cfg, 2)
    first, swapped = model(ids, [[pair]])[0], model(ids, [[pair.flip(0)]])[0]
    assert (first - swapped)[:, -1].abs().max() > 1e-3


@torch.no_grad()
def test_features_in_front_of_the_text_are_features_in_the_text():
    front, inside = tiny_model("v0.1"), tiny_model("v0.2")
    shared = {
        key: value
        for key, value in front.state_dict().items()
        if "token_embedding" not in key and "head" not in key
    }
    inside.load_state_dict(shared, strict=False)
    inside.decoder.token_embedding.weight[:259].copy_(front.decoder.token_embedding.weight)
    pixels, text = tiles(front.cfg, 1), prompt(front.cfg, 8)
    in_text = torch.tensor([[inside.cfg.image_token_id] * 4 + text])
    logits = inside(in_text, pixels)[0][:, 4:, :259]
    assert (front(torch.tensor([text]), pixels)[0] - logits).abs().max() < SAME


@torch.no_grad()
def test_the_future_is_not_seen(model):
    cfg = model.cfg
    row = prompt(cfg, 10, 1)
    changed = [*row[:-1], row[-1] % 200 + 3]
    a, b = (model(torch.tensor([ids]), tiles(cfg, 1))[0] for ids in (row, changed))
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])


def labelled(model):
    rows, images = batch_of_three(model.cfg)
    ids, mask = pad(rows)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    targets[(mask == 0) | (ids >= 259)] = -100
    return ids, images, mask, targets


def test_the_loss_is_cross_entropy_at_the_labels_and_logits_are_theirs(model):
    ids, images, mask, targets = labelled(model)
    every, _ = model(ids, images, mask)
    logits, loss = model(ids, images, mask, targets)
    counts = targets != -100
    assert logits.shape == (int(counts.sum()), model.cfg.lm_vocab_size)
    assert (logits - every[counts]).abs().max() < SAME
    want = F.cross_entropy(every.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert abs(loss.item() - want.item()) < 1e-6 * want.item()


def test_a_loss_in_chunks_has_the_value_and_the_gradient_of_one_piece():
    logits = torch.randn(2500, 40, requires_grad=True)
    labels = torch.randint(0, 40, (2500,))
    chunked = torch.autograd.grad(cross_entropy(logits, labels), logits)[0]
    whole = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0]
    assert torch.allclose(chunked, whole, atol=1e-9) and whole.abs().max() > 1e-4


def test_every_parameter_gets_a_gradient(model):
    ids, images, mask, targets = labelled(model)
    model.zero_grad(set_to_none=True)
    model(ids, images, mask, targets)[1].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_a_few_steps_on_one_batch_bring_the_loss_down():
    model = tiny_model()
    ids, images, mask, targets = labelled(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, images, mask, targets)[1]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


def test_a_batch_without_a_label_is_refused(model):
    ids, images, mask, targets = labelled(model)
    with pytest.raises(NoLabels, match="nothing to learn"):
        model(ids, images, mask, torch.full_like(targets, -100))


def test_dropout_acts_in_training_only():
    model = tiny_model("main", lm_dropout=0.3, vit_dropout=0.3)
    ids, pixels = torch.tensor([prompt(model.cfg, 8, 1)]), tiles(model.cfg, 1)
    assert torch.equal(model(ids, pixels)[0], model(ids, pixels)[0])
    model.train()
    assert not torch.equal(model(ids, pixels)[0], model(ids, pixels)[0])


BAD_IMAGES = {
    "vit_img_size=64": lambda t: torch.rand(1, 3, 32, 32),
    "(1, 1, 64, 64)": lambda t: t[:, :1],
    "torch.uint8": lambda t: (t * 255).to(torch.uint8),
    "1 pixels are NaN": lambda t: t.clone().index_put_((torch.tensor(0),) * 4, torch.tensor(float("nan"))),
    "got str": lambda t: "cat.png",
    "expected tensors, got str": lambda t: ["cat.png"],
    "2 lists for 1 rows": lambda t: [[t], [t]],
    "(64, 64)": lambda t: [t[0, 0]],
    "32, 32": lambda t: [[t, torch.rand(1, 3, 32, 32)]],
}


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_pixels_of_the_wrong_kind_are_refused_by_what_is_wrong(model, message):
    cfg = model.cfg
    with pytest.raises(ImageError) as caught:
        model(torch.tensor([prompt(cfg, 4, 1)]), BAD_IMAGES[message](tiles(cfg, 1)))
    assert message in str(caught.value)


@pytest.mark.parametrize("generation", ["v0.2", "main"])
def test_image_tokens_must_match_the_pictures(generation):
    model = tiny_model(generation)
    cfg = model.cfg
    one = torch.tensor([prompt(cfg, 4, 1)])
    with pytest.raises(ImageTokenMismatch, match="4 image tokens, 0 tiles make 0 features"):
        model(one, None)
    with pytest.raises(ImageTokenMismatch, match="4 image tokens, 2 tiles make 8 features"):
        model(one, tiles(cfg, 2))
    ids, mask = pad([prompt(cfg, 4, 2), prompt(cfg, 4, 0)])
    with pytest.raises(ImageTokenMismatch, match="row 0 has 8 image tokens, its 1 tiles make 4"):
        model(ids, [[tiles(cfg, 1)], [tiles(cfg, 1)]], mask)


def test_pictures_in_front_must_be_assigned_to_rows():
    model = tiny_model("v0.1")
    ids = torch.tensor([prompt(model.cfg, 4), prompt(model.cfg, 4)])
    with pytest.raises(ImageTokenMismatch, match="3 pictures for 2 rows"):
        model(ids, tiles(model.cfg, 3))


BAD_IDS = {
    "expected whole numbers": lambda ids: ids.float(),
    "(B, T), got torch.int64 (4,)": lambda ids: ids[0],
    "id -1 is outside": lambda ids: torch.full_like(ids, -1),
    "id 4000 is outside": lambda ids: torch.full_like(ids, 4000),
    "got torch.int64 (1, 0)": lambda ids: ids[:, :0],
}


@pytest.mark.parametrize("message", BAD_IDS)
def test_ids_of_the_wrong_kind_are_refused(model, message):
    with pytest.raises(PromptError) as caught:
        model(BAD_IDS[message](torch.tensor([prompt(model.cfg, 4)])), None)
    assert message in str(caught.value)


def test_a_mask_or_targets_of_another_shape_are_refused(model):
    ids = torch.tensor([prompt(model.cfg, 4)])
    with pytest.raises(PromptError, match=r"attention_mask has shape \(1, 5\), expected \(1, 4\)"):
        model(ids, None, torch.ones(1, 5))
    with pytest.raises(PromptError, match=r"targets have shape \(1, 3\), expected \(1, 4\)"):
        model(ids, None, None, ids[:, :3])


def test_a_sequence_beyond_the_positions_is_refused_with_both_numbers(model):
    limit = model.cfg.lm_max_position_embeddings
    assert model(torch.tensor([prompt(model.cfg, limit)]), None)[0].shape[1] == limit
    with pytest.raises(PromptTooLong, match="1025 positions, but lm_max_position_embeddings=1024"):
        model(torch.tensor([prompt(model.cfg, limit + 1)]), None)


def test_a_refusal_can_be_caught_as_one_family(model):
    with pytest.raises(NanoVLMError):
        model(torch.tensor([[1, 2]]), [torch.zeros(3)])


@given(side=st.integers(1, 6), factor=st.integers(1, 4), width=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_pixel_shuffle_moves_every_number_and_loses_none(side, factor, width):
    side *= factor
    x = torch.arange(2 * side * side * width).float().view(2, side * side, width)
    out = pixel_shuffle(x, factor)
    assert out.shape == (2, (side // factor) ** 2, width * factor**2)
    assert torch.equal(out.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    square = x.view(2, side, side, width)
    first = square[:, :factor, :factor].reshape(2, -1)  # rows of the first square, from top to bottom
    assert torch.equal(out[:, 0], first)


def test_pixel_shuffle_refuses_what_is_no_square():
    with pytest.raises(ValueError, match="12 patches"):
        pixel_shuffle(torch.zeros(1, 12, 4), 2)


def test_splice_makes_a_new_tensor_and_fills_in_order():
    embeds = torch.zeros(2, 3, 2)
    slots = torch.tensor([[False, True, True], [True, False, False]])
    features = torch.arange(6.0).view(3, 1, 2) + 1
    out = splice(embeds, slots, features)
    assert out[slots].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert embeds.abs().sum() == 0 and out[~slots].abs().sum() == 0


def test_rms_norm_is_the_formula():
    norm, x = RMSNorm(8, 1e-5), torch.randn(3, 8)
    norm.weight.data.uniform_(0.5, 2)
    want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.allclose(norm(x), want, atol=1e-6)


def test_casting_the_model_keeps_rotary_frequencies_in_float32():
    model = tiny_model("main")
    before = model.decoder.rotary_embd.inv_freq.clone()
    model.bfloat16().float()
    assert torch.equal(model.decoder.rotary_embd.inv_freq, before)
    half = model.bfloat16()
    assert half.decoder.rotary_embd.inv_freq.dtype == torch.float32
    logits, _ = half(torch.tensor([prompt(model.cfg, 6, 1)]), tiles(model.cfg, 1))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_the_tokenizer_is_no_part_of_the_state():
    model = tiny_model("main")
    keys = set(model.state_dict())
    assert model.tokenizer is model.tokenizer
    assert set(model.state_dict()) == keys and "tokenizer" not in dict(model.named_modules())


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny")])
def test_a_tiny_model_builds_in_less_than_50_ms(name):
    import time

    def once():
        start = time.perf_counter()
        VisionLanguageModel(preset(name))
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 0.05


def test_configs_of_all_generations_make_models_of_one_class():
    assert {type(VisionLanguageModel(tiny_config(g), load_backbone=False)) for g in GENERATIONS} == {
        VisionLanguageModel
    }
