"""What a run tells: one JSON line a step, a bar or lines, wandb when asked, and a picture of the loss."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
from PIL import Image

from nanovlm.errors import ConfigError
from nanovlm.train import metrics
from nanovlm.train.curve import HEIGHT, STRONG, VALIDATION, WIDTH, smooth, ticks, write_curve
from tests.train.rows import config, make_model, poisoned, run

RECORD = {
    "step": 3, "loss": 2.5, "tokens_per_s": 1234.5, "data_wait": 0.25, "mfu": None, "skipped": 0, "seconds": 0.5,
}  # fmt: skip


def test_every_step_and_validation_is_one_line_of_strict_json(tmp_path):
    cfg = config(eval_interval=2, stats_log_interval=3, max_nonfinite_steps=9)
    run(tmp_path, cfg, poisoned(make_model()), without={5: "sense"})  # step 2

    def strict(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=strict) for line in lines]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert steps[1]["loss"] is None and steps[1]["skipped"] == 1 and math.isfinite(steps[2]["loss"])
    assert [record["step"] for record in records if "val_loss" in record] == [2, 4]
    (data,) = [record for record in records if "data/rows" in record]
    assert data == {"step": 3, "data/rows": 12, "data/skipped/broken": 1, "data/utilisation": 0.5}
    for record in steps:
        assert record["tokens_per_s"] > 0 and 0 <= record["data_wait"] <= 1 and record["grad_norm"] != 0
    assert steps[3]["tokens"] > steps[2]["tokens"] > steps[0]["tokens"]


def test_the_time_a_loader_takes_is_told_as_data_wait(tmp_path):
    import time

    from nanovlm.train.loop import Trainer
    from tests.train.rows import CPU, Held, Rows

    class Slow(Rows):
        def __next__(self):
            time.sleep(0.1)
            return super().__next__()

    model = make_model()
    told = Trainer(model, config(), CPU, tmp_path, (Slow(model.cfg), Held(model.cfg))).one_step([])
    assert told["data_wait"] == pytest.approx(0.2 / told["seconds"], abs=0.2) and told["data_wait"] > 0.5


def test_without_a_terminal_there_is_a_line_every_few_steps(capsys):
    bar = metrics.Bar(config(console_log_interval=3, max_training_steps=10_000), 0, shown=True)
    for step in range(1, 8):
        bar.step({**RECORD, "step": step})
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10000", "3/10000", "6/10000"]
    assert "loss 2.5000 1,234 tok/s data wait 25% ETA 0:" in lines[1] and "MFU" not in lines[1]


def test_on_a_terminal_there_is_a_bar_with_the_same_words(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    bar = metrics.Bar(config(max_training_steps=4), 0, shown=True)
    bar.step({**RECORD, "mfu": 0.413, "skipped": 2})
    bar.say("step 3: validation loss 1.0000")
    bar.close()
    shown = screen.getvalue()
    assert "3/4" in shown and "loss 2.5000 1,234 tok/s MFU 41.3% data wait 25% 2 skipped" in shown and "ETA" in shown
    assert "step 3: validation loss 1.0000" in shown


def test_only_the_first_process_speaks(capsys):
    bar = metrics.Bar(config(), 0, shown=False)
    bar.step(RECORD)
    bar.say("nothing")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds, shown", [(5.9, "0:00:05"), (3725, "1:02:05"), (360000, "100:00:00")])
def test_time_to_go_reads_as_a_clock(seconds, shown):
    assert metrics.clock(seconds) == shown


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path, caplog):
    written = metrics.Metrics(tmp_path, config(), 0, {})
    written.file.close()
    written.file = open("/dev/full", "w") if sys.platform == "linux" else pytest.skip("needs /dev/full")
    written.write(RECORD)
    written.write(RECORD)
    written.close()
    assert [record.message for record in caplog.records if "no more metrics are written" in record.message]
    assert len(caplog.records) == 1


def test_wandb_is_left_alone_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it is an error
    run(tmp_path, config(max_training_steps=1))
    with pytest.raises(ConfigError, match=r"--log_wandb needs wandb: pip install 'nanovlm\[train\]'"):
        run(tmp_path / "asked", config(max_training_steps=1, log_wandb=True))


def test_wandb_gets_every_record_and_a_name_that_a_resumed_run_keeps(tmp_path, monkeypatch):
    told, started = [], []

    def init(**options):
        started.append(options)
        return SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run(tmp_path / "mine", config(max_training_steps=2, log_wandb=True, wandb_entity="us"))
    assert started[0]["entity"] == "us" and started[0]["id"] == started[0]["name"] == "mine"
    assert started[0]["resume"] == "allow" and started[0]["config"]["batch_size"] == 2
    assert started[0]["config"]["lm_hidden_dim"] == 64
    assert told[-1] == "end" and [step for step, _ in told[:-1]] == [1, 2, 2]
    assert told[0][1]["loss"] > 0 and told[2][1]["val_loss"] > 0 and "step" not in told[0][1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb comes with the train extra")
def test_the_real_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, config(max_training_steps=2, log_wandb=True))
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"val_loss" in record.read_bytes()


# -- the curve ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_loss_curve_as_png_and_svg(tmp_path):
    run(tmp_path / "a <run>", config(eval_interval=2))
    folder = tmp_path / "a <run>"
    with Image.open(folder / "loss.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {tuple(bytes.fromhex(name[1:])) for name in (STRONG, VALIDATION)} <= colours
    root = ET.fromstring((folder / "loss.svg").read_text())
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"a <run>", "step", "loss", "training", "validation"} <= set(texts)


def test_the_curve_goes_through_the_values(tmp_path):
    values = [5.0, 3.0, 4.0, 1.0]
    records = [{"step": step, "loss": value} for step, value in enumerate(values, 1)]
    assert write_curve(tmp_path, [*records, {"step": 5, "loss": None}, {"step": 2, "val_loss": 6.0}])
    root = ET.fromstring((tmp_path / "loss.svg").read_text())
    lines = [e.attrib for e in root.iter() if e.tag.endswith("polyline") and e.attrib["stroke"] == STRONG]
    heights = [float(point.split(",")[1]) for point in lines[0]["points"].split()]
    shares = [(heights[3] - height) / (heights[3] - heights[0]) for height in heights]
    assert shares == pytest.approx([(value - 1) / 4 for value in values], abs=0.01)


def test_a_run_without_a_finite_loss_has_no_curve(tmp_path):
    assert not write_curve(tmp_path, [{"step": 1, "loss": None}]) and not list(tmp_path.iterdir())


def test_one_step_makes_a_curve_too(tmp_path):
    assert write_curve(tmp_path, [{"step": 7, "loss": 2.0}])


def test_smoothing_is_the_mean_of_the_last_few():
    assert smooth([(1, 4.0), (2, 2.0), (3, 6.0)], 2) == [(1, 4.0), (2, 3.0), (3, 4.0)]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.013, 0.019), (3, 40_000), (-2.0, 7.0)])
def test_ticks_are_few_and_round(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 11 and low <= found[0] + 1e-9 and found[-1] <= high + 1e-9
    assert found == pytest.approx([float(f"{tick:.3g}") for tick in found])
