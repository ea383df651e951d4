"""Predicted memory: two published tables, the shorter way equal to the long one, and what the command says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from nanovlm import cli, preset
from nanovlm.errors import ConfigError
from nanovlm.measure import published, trace, vram
from nanovlm.measure.gpus import GPUS, gpu, parse_size
from nanovlm.vlm import VisionLanguageModel

H100 = gpu("h100-80gb")


def predictor(name="tiny", seq_len=32, training=None, **changes):
    cfg = preset(name, **changes)
    with torch.device("meta"):
        model = VisionLanguageModel(cfg, load_backbone=False)
    return vram.Predictor(model, lambda n: vram.make_batch(cfg, n, seq_len), training or vram.Training(), H100)


@pytest.mark.slow
@pytest.mark.parametrize("table", ["v0.1", "v0.2"])
def test_a_published_table_is_reproduced_within_5_percent_and_oom_where_it_was(table):
    cfg = published.config(table)
    with torch.device("meta"):
        model = published.Published(cfg)
    predict = vram.Predictor(model, lambda n: published.batch(cfg, n), published.TRAINING, H100).predict
    for rows, peak in published.PEAKS[table].items():
        found = predict(rows)
        assert found.fits == (peak is not None), rows
        expected = published.BEFORE_OOM[table] if peak is None else peak
        assert found.peak / vram.MIB == pytest.approx(expected, rel=0.05), rows
        assert round(found.loaded / vram.MIB, 2) == published.LOADED[table]
        assert sum(found.parts.values()) == found.peak and min(found.parts.values()) >= 0


@pytest.mark.parametrize("name", ["tiny_original_small", "tiny_dinov3_gemma"])
def test_the_line_through_two_batch_sizes_is_the_long_way(name):
    short, long = predictor(name), predictor(name)
    for rows in (2, 3):
        short.predict(rows)
    for rows in (4, 20):
        assert short.rehearsal(rows).events == vram.rehearse(long.model, long.batch(rows), long.training, H100).events
        assert short.predict(rows) == long.predict(rows)
    assert sorted(short.rehearsals) == [2, 3], "the others were not traced"


def test_steps_that_differ_between_batch_sizes_give_no_line():
    two, three = (predictor(seq_len=length).rehearsal(2) for length in (32, 40))
    assert vram.line(two, three, (2, 3), 4) is not None
    three.events.pop()
    assert vram.line(two, three, (2, 3), 4) is None


def test_remembering_shapes_changes_no_event(monkeypatch):
    fast = predictor("tiny_dinov3_gemma").rehearsal(3)
    monkeypatch.setattr(trace, "_remembered", lambda func, args, kwargs: func(*args, **kwargs))
    assert predictor("tiny_dinov3_gemma").rehearsal(3) == fast


def test_the_trace_allocates_what_real_tensors_do():
    """Without autocast, every storage that training on a CPU makes: the same sizes, as many, the same at most."""
    cfg = preset("tiny_original_small")
    model = VisionLanguageModel(cfg, load_backbone=False)
    batch = vram.make_batch(cfg, 3, 32)
    training = vram.Training("fp32", "sgd")
    with torch.device("meta"):
        meta = VisionLanguageModel(cfg, load_backbone=False)
    rehearsed = vram.rehearse(meta, batch, training, H100)
    kept = sum(e.size for e in rehearsed.events if e.size and rehearsed.kinds.get(e.key) == "gradients")
    model(*batch[:1], torch.rand(batch[1].shape), None, batch[2])[1].backward()
    gradients = {p.grad.untyped_storage()._cdata: p.grad.untyped_storage().nbytes() for p in model.parameters()}
    assert kept == vram.ITERATIONS * sum(gradients.values())


def test_states_gradients_and_parameters_are_as_many_bytes_as_they_hold():
    found = predictor("original_small", seq_len=128).predict(1)
    parameters = sum(p.numel() for p in predictor("original_small").model.parameters()) * 4
    assert found.parts["gradients"] == parameters
    assert found.parts["optimizer temporaries"] == pytest.approx(parameters, rel=0.001)  # a root for each parameter
    assert found.parts["optimizer states"] == pytest.approx(2 * parameters, rel=0.001)
    assert found.parts["cuBLAS workspaces"] == 64 * vram.MIB


def test_each_way_to_save_memory_does():
    plain = predictor(seq_len=128).predict(32)
    again = predictor(seq_len=128)
    again.model.recompute_activations("blocks")
    assert again.predict(32).parts["activations"] < plain.parts["activations"] / 2
    peaks = {name: predictor("original_small", 128, vram.Training(optimizer=name)).predict(1).peak
             for name in vram.OPTIMIZERS}  # fmt: skip
    assert peaks["sgd"] < peaks["adamw-fused"] < peaks["adamw"] == peaks["adam"]
    assert predictor(seq_len=128, training=vram.Training("fp32")).predict(32).parts["autocast copies"] == 0


def test_the_cast_lists_are_those_of_torch():
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    if not header.is_file():
        pytest.skip("this torch was installed without its headers")
    text = header.read_text()

    def listed(macro):
        body = re.search(rf"#define {macro}\(_\)(.*?)\n\n", text, re.DOTALL)[1]
        return set(re.findall(r"_\((\w+)", body))

    assert listed("AT_FORALL_LOWER_PRECISION_FP") >= trace.LOWER
    assert listed("AT_FORALL_FP32") >= trace.FLOAT32
    assert trace.FLOAT32_RESULT <= listed("AT_FORALL_FP32_SET_OPT_DTYPE")
    # what the lists name and we do not has no caller in a model here
    assert {"linear", "matmul", "conv2d"} <= trace.LOWER and {"layer_norm", "rms_norm", "pow"} <= trace.FLOAT32


def test_autocast_casts_a_parameter_once_and_an_activation_each_time():
    weight = torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    x, seen = torch.empty(5, 8, device="meta"), trace.Trace()
    with trace.traced(seen, torch.bfloat16):
        torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, weight)
        assert torch.nn.functional.layer_norm(x.bfloat16(), (8,)).dtype == torch.float32
    sizes = [e.size for e in seen.events if e.operator == "_to_copy"]
    assert sizes.count(8 * 8 * 2) == 1 and sizes.count(5 * 8 * 2) == 3


def test_the_largest_batch_fits_and_one_more_does_not():
    asked = predictor(seq_len=64)
    limit = 64 * vram.MIB + 2 * H100.workspace
    found = asked.largest(limit)
    assert found > 1
    assert asked.predict(found, limit).fits and not asked.predict(found + 1, limit).fits
    assert asked.largest(vram.MIB) == 0


def command(capsys, *arguments):
    code = cli.main(["vram", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.slow
def test_the_command_goes_on_after_oom(capsys):
    line = ["--use_preset", "tiny", "--seq_len", 1024, "--gpu", "t4-16gb"]
    code, out, _ = command(capsys, *line, "--batch_sizes", "2,60000,3", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and [row["fits"] for row in rows] == [True, False, True]
    assert 0 < rows[1]["peak"] <= gpu("t4-16gb").usable


def test_the_command_prints_the_table_and_takes_a_checkpoint(tmp_path, capsys):
    model = VisionLanguageModel(preset("tiny"), load_backbone=False)
    model.save_pretrained(tmp_path)
    same = [command(capsys, *source, "--batch_sizes", "1 2")[1:] for source in
            (("--vlm_checkpoint_path", tmp_path), ("--use_preset", "tiny"))]  # fmt: skip
    assert same[0] == same[1]
    assert "VRAM allocated after loading model to device" in same[0][0] and "predicted for h100-80gb" in same[0][0]


def test_the_command_finds_the_largest_batch(capsys):
    code, out, _ = command(capsys, "--use_preset", "tiny", "--seq_len", 64, "--fits", "256mb", "--json")
    assert code == 0 and json.loads(out)["largest_batch_size"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_sizes", "1 x"], "--batch_sizes"),
        (["--batch_sizes", ""], "--batch_sizes"),
        (["--batch_sizes", "0"], "--batch_sizes"),
        (["--gpu", "h100"], "did you mean 'h100-80gb'?"),
        (["--fits", "lots"], "24gb"),
        (["--use_preset", "tiny", "--seq_len", "3"], "no room for text"),
        (["--use_preset", "tiny", "--seq_len", "4096"], "lm_max_position_embeddings=1024"),
        (["--use_preset", "tiny", "--dtype", "int8"], "bf16"),
        (["--use_preset", "tiny", "--optimizer", "lion"], "adamw"),
        (["--vlm_checkpoint_path", "/nowhere"], "no such folder"),
        (["--published", "v0.1", "--seq_len", "200"], "one setting"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, capsys):
    code, out, err = command(capsys, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and message in err


def test_sizes_of_memory_are_read_in_units_of_1024():
    assert parse_size("24gb") == 24 << 30 and parse_size("0.5 GiB") == parse_size("512mb") == 512 << 20
    with pytest.raises(ConfigError):
        parse_size("0gb")
    assert all(card.usable < card.capacity and card.name == name for name, card in GPUS.items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny", "original_small"])
def test_what_is_predicted_is_measured(name):
    cfg = preset(name)
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability()
    card = next((c for c in GPUS.values() if c.compute == capability), H100)
    with device:
        model = VisionLanguageModel(cfg, load_backbone=False)
    measured = vram.measure(model, vram.make_batch(cfg, 8, 128), vram.Training(), device)
    with torch.device("meta"):
        meta = VisionLanguageModel(cfg, load_backbone=False)
    found = vram.Predictor(meta, lambda n: vram.make_batch(cfg, n, 128), vram.Training(), card).predict(8)
    assert found.peak == pytest.approx(measured.peak, rel=0.03 if name == "original_small" else 0.5)
