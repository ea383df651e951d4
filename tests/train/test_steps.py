"""One optimizer step: what it computes, what stays frozen, and what is not applied."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from nanovlm.errors import ConfigError, NoLabels, NonFiniteLoss
from nanovlm.train.flops import Flops
from nanovlm.train.loop import Trainer, autocast_dtype, compile_parts
from nanovlm.train.metrics import read
from nanovlm.train.optimizer import learning_rate
from tests.train.rows import CPU, Held, Rows, config, make_model, poisoned, run


def trainer(tmp_path, cfg, model=None, **loader) -> Trainer:
    model = model or make_model()
    rows = Rows(model.cfg, cfg.batch_size, **loader)
    return Trainer(model, cfg, CPU, tmp_path, (rows, Held(model.cfg)))


def gradients(ours: Trainer) -> dict[str, torch.Tensor]:
    """As they were applied in the first step: AdamW keeps a tenth of them."""
    return {name: 10 * ours.optimizer.state[p]["exp_avg"] for name, p in ours.model.named_parameters()}


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("without", [{}, {1: "image", 2: "image"}], ids=["pictures", "some text alone"])
def test_accumulated_batches_equal_one_large_batch(tmp_path, without):
    small = trainer(tmp_path, config(batch_size=1, gradient_accumulation_steps=6), without=without)
    large = trainer(tmp_path, config(batch_size=6, gradient_accumulation_steps=1), without=without)
    told = [each.one_step([]) for each in (small, large)]
    assert told[0]["labels"] == told[1]["labels"] and told[0]["tokens"] == told[1]["tokens"]
    assert told[0]["loss"] == pytest.approx(told[1]["loss"], abs=1e-5)
    assert told[0]["grad_norm"] == pytest.approx(told[1]["grad_norm"], rel=1e-5)
    assert 1e-3 < max(g.abs().max() for g in gradients(large).values()) < 1
    for name, gradient in gradients(small).items():
        assert float((gradient - gradients(large)[name]).abs().max()) < 1e-5, name


def test_a_step_is_that_of_a_loop_written_the_plain_way(tmp_path):
    cfg = config(batch_size=4, gradient_accumulation_steps=1, lr_vision_backbone=1e-4, weight_decay=0.1)
    plain, batch = make_model(), next(Rows(make_model().cfg, 4))
    rates = {"MP": 1e-3, "vision_encoder": 1e-4, "decoder": 1e-3}
    groups = [{"params": list(getattr(plain, part).parameters()), "lr": rate} for part, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    logits, _ = plain(batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), cfg.max_grad_norm)
    assert norm > cfg.max_grad_norm
    optimizer.step()
    ours = trainer(tmp_path, cfg)
    told = ours.one_step([])
    assert told["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert told["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert largest_difference(ours.model, plain) < 1e-5


def test_the_schedule_rises_in_a_line_and_falls_in_half_a_cosine():
    cfg = config(max_training_steps=100, warmup_ratio=0.1, min_lr_ratio=0.2)
    rates = [learning_rate(step, 1.0, cfg) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.6) and rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_each_part_has_its_own_peak_on_the_same_schedule(tmp_path):
    told = trainer(tmp_path, config(lr_mp=1e-2, lr_vision_backbone=1e-4, warmup_ratio=0.5)).one_step([])
    assert [told[f"lr_{part}"] for part in ("MP", "vision_encoder", "decoder")] == pytest.approx([5e-3, 5e-5, 5e-4])


@pytest.mark.parametrize(
    "change, frozen",
    [
        ({"freeze_vision_encoder": True}, {"vision_encoder"}),
        ({"lr_backbones": 0}, {"vision_encoder", "decoder"}),
        ({"lr_mp": 0, "lr_language_backbone": 0}, {"MP", "decoder"}),
    ],
)
def test_a_rate_of_zero_freezes_its_part_and_it_alone(tmp_path, change, frozen):
    before = make_model(vit_dropout=0.1, lm_dropout=0.1)
    ours = trainer(tmp_path, config(**change), copy.deepcopy(before))
    ours.run_all()
    for part in ("MP", "vision_encoder", "decoder"):
        moved = largest_difference(getattr(ours.model, part), getattr(before, part))
        parameters = list(getattr(ours.model, part).parameters())
        assert (moved == 0) == (part in frozen)
        assert all(p.requires_grad == (part not in frozen) for p in parameters)
        assert not (part in frozen and any(p in ours.optimizer.state for p in parameters))
        assert getattr(ours.model, part).training == (part not in frozen), "no dropout in what is frozen"


def test_everything_frozen_is_refused():
    with pytest.raises(ConfigError, match="every learning rate is 0"):
        config(lr_mp=0, lr_backbones=0)


@pytest.mark.parametrize("mode", ["elementwise", "blocks"])
def test_recomputed_activations_change_no_number(tmp_path, mode):
    kept, recomputed = (
        trainer(tmp_path, config(activation_checkpointing=again), make_model()) for again in ("nothing", mode)
    )
    assert kept.one_step([])["loss"] == recomputed.one_step([])["loss"]
    for name, gradient in gradients(kept).items():
        assert float((gradient - gradients(recomputed)[name]).abs().max()) < 1e-6, name


def test_recomputation_keeps_less(tmp_path):
    def kept_bytes(again: str) -> int:
        ours = trainer(tmp_path, config(activation_checkpointing=again), make_model(lm_n_blocks=4, vit_n_blocks=4))
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = next(ours.train_loader)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours.step({**batch, "n_labels": 1})
        own = {p.untyped_storage().data_ptr() for p in ours.model.parameters()}
        return sum(size for place, size in sizes.items() if place not in own)

    assert kept_bytes("blocks") < kept_bytes("nothing") / 2


def test_autocast_computes_in_bfloat16_where_it_is_asked_for(tmp_path):
    assert autocast_dtype(config(), torch.device("cpu")) is None
    exact, rounded = (trainer(tmp_path, config(autocast=kind)).one_step([]) for kind in ("float32", "bfloat16"))
    assert exact["loss"] != rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_a_step_of_nan_is_not_applied_and_counted(tmp_path):
    ours = trainer(tmp_path, config(batch_size=1), poisoned(make_model()), without={2: "sense"})
    ours.one_step([])
    before, state = copy.deepcopy(ours.model), copy.deepcopy(ours.optimizer.state_dict()["state"])
    told = ours.one_step([])
    assert math.isnan(told["loss"]) and told["skipped"] == 1 and told["step"] == 2
    assert largest_difference(ours.model, before) == 0
    after = ours.optimizer.state_dict()["state"]
    assert all(torch.equal(after[n][key], state[n][key]) for n in state for key in state[n])
    told = ours.one_step([])
    assert math.isfinite(told["loss"]) and largest_difference(ours.model, before) > 0
    assert ours.counts.skipped == 1 and ours.counts.skipped_in_a_row == 0


def test_too_many_in_a_row_end_the_run_with_the_samples_at_fault(tmp_path):
    without = {number: "sense" for number in (2, 5, 6)}  # steps 2, 3 and 4, a row each
    cfg = config(batch_size=1, max_nonfinite_steps=3, max_training_steps=9)
    with pytest.raises(NonFiniteLoss, match="3 steps in a row.* step 4 with the samples row 6. ") as caught:
        run(tmp_path, cfg, poisoned(make_model()), without=without)
    assert "row 7" not in str(caught.value), "its micro-batch was finite"


def test_a_gradient_that_is_not_finite_counts_too(tmp_path):
    model = make_model()
    model.MP.proj.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match="row 0, row 1, row 2, row 3"):
        run(tmp_path, config(max_nonfinite_steps=1), model)


def test_a_batch_without_a_label_ends_the_run_with_the_reason(tmp_path):
    with pytest.raises(NoLabels, match="samples row 4, row 5: nothing to learn.*max_sample_length"):
        run(tmp_path, config(), without={4: "labels", 5: "labels"})


def test_one_row_without_a_label_beside_others_is_fine(tmp_path):
    assert run(tmp_path, config(max_training_steps=1), without={1: "labels"}).counts.step == 1


@pytest.mark.parametrize(
    "change, decoder, encoder",
    [({}, 3, 3), ({"lr_vision_backbone": 0}, 3, 1), ({"lr_language_backbone": 0}, 2, 3), ({"lr_backbones": 0}, 2, 1)],
)
def test_arithmetic_is_counted_once_for_each_pass_that_is_needed(tmp_path, change, decoder, encoder):
    ours = trainer(tmp_path, config(**change))
    model, flops = ours.model, Flops(ours.model)
    batch = next(Rows(model.cfg, 1))
    tokens, labels = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    layers = sum(n for name, n in sizes.items() if name.startswith("decoder.blocks"))
    pairs = decoder * model.cfg.lm_n_heads * model.cfg.lm_head_dim * 2 * tokens**2
    assert flops.of({"images": [[]]}, [tokens], 0) == 2 * decoder * layers * tokens + pairs
    head = model.decoder.head.weight.numel()
    assert flops.of({"images": [[]]}, [], labels) == 2 * decoder * head * labels
    inside = sum(n for name, n in sizes.items() if name.startswith("vision_encoder") and "position" not in name)
    projector = 2 * model.MP.proj.weight.numel() * 4 * (2 + (encoder == 3))
    attention = 4 * encoder * model.cfg.vit_hidden_dim * 16**2
    assert flops.of(batch, [], 0) == 2 * encoder * inside * 16 + attention + projector


def test_the_share_of_the_peak_is_told_where_the_peak_is_known(tmp_path):
    ours = trainer(tmp_path, config())
    assert ours.one_step([])["mfu"] is None
    ours.peak = 1e12
    told = ours.one_step([])
    assert 0 < told["mfu"] < 1 and told["mfu"] * told["seconds"] * 1e12 > 2 * told["labels"] * 64 * 325


@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_again_for_every_batch(tmp_path):
    """Rows of one length, as packing makes them, with ever other numbers of tiles, image tokens and labels."""
    ours = trainer(tmp_path, config(), make_model())
    compile_parts(ours.model, backend="eager")
    cfg = ours.model.cfg

    def batch(tiles: int) -> dict:
        ids = torch.full((2, 48), 2)
        ids[0, -12 * 3 :] = torch.arange(3, 39)
        ids[1, -tiles * cfg.mp_image_token_length :] = cfg.image_token_id
        labels = torch.full((2, 48), -100)
        labels[0, -tiles - 2 :] = 7
        mask = (ids != 2).long()
        images = [[], [torch.rand(tiles, 3, 64, 64)]]
        return dict(input_ids=ids, labels=labels, attention_mask=mask, images=images, n_labels=tiles + 2)

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tiles in (2, 3, 5):
        ours.step(batch(tiles)).backward()
    warm = graphs()
    assert warm >= 2, "encoder and decoder"
    for tiles in (4, 6, 7, 8, 9, 10):
        ours.step(batch(tiles)).backward()
    assert graphs() == warm


def test_benchmarks_are_asked_at_each_evaluation_in_eval_mode_and_told(tmp_path):
    asked = []

    def benchmark(model) -> dict[str, float]:
        asked.append(any(module.training for module in model.modules()))
        return {"mmstar": 0.25}

    ours = trainer(tmp_path, config(eval_interval=2))
    ours.benchmark = benchmark
    ours.run_all()
    assert asked == [False, False] and ours.model.training
    told = [(record["step"], record["mmstar"]) for record in read(tmp_path) if "mmstar" in record]
    assert told == [(2, 0.25), (4, 0.25)]
