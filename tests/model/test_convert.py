"""`nanovlm convert`: pickled tensors become a folder that loads; what is more is named, and not run."""

from __future__ import annotations

import os
import shlex
import shutil
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from nanovlm import VisionLanguageModel
from nanovlm.cli import main
from nanovlm.convert import convert
from nanovlm.errors import ConfigError, SourceNotFound, WeightsError
from tests.model.helpers import tiny_model

GENERATIONS = ["v0.1", "v0.2", "main"]


def old(folder: Path, content, name="model.pth", generation="main", zipped=True) -> Path:
    """A folder as people kept them: a pickle, and the config.json beside it."""
    tiny_model(generation).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)
    return folder / name


def same(model, other) -> bool:
    state, others = model.state_dict(), other.state_dict()
    return list(state) == list(others) and all(torch.equal(state[name], others[name]) for name in state)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("name", "zipped"), [("model.pth", True), ("pytorch_model.bin", False)])
def test_what_is_converted_loads_as_the_model_that_was_pickled(tmp_path, generation, name, zipped):
    model = tiny_model(generation)
    file = old(tmp_path / "old", model.state_dict(), name, generation, zipped)
    report = convert(file, tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors"]
    again = VisionLanguageModel.from_pretrained(tmp_path / "new")
    assert same(again, model) and again.cfg == model.cfg
    assert again.decoder.head.weight is again.decoder.token_embedding.weight
    assert set(report.loaded) == set(model.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_model_lose_the_wrapper(tmp_path, prefix):
    model = tiny_model()
    state = OrderedDict((prefix + name, tensor) for name, tensor in model.state_dict().items())
    convert(old(tmp_path / "old", state), tmp_path / "new")
    assert same(VisionLanguageModel.from_pretrained(tmp_path / "new"), model)


def test_tensors_keep_their_precision_and_rotary_frequencies_theirs(tmp_path):
    from safetensors.torch import load_file

    model = tiny_model().bfloat16()
    convert(old(tmp_path / "old", model.state_dict()), tmp_path / "new")
    kinds = {name: t.dtype for name, t in load_file(tmp_path / "new" / "model.safetensors").items()}
    assert kinds.pop("decoder.rotary_embd.inv_freq") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert same(VisionLanguageModel.from_pretrained(tmp_path / "new", dtype=torch.bfloat16), model)


def test_a_file_may_be_converted_in_place_with_a_config_from_elsewhere(tmp_path):
    model = tiny_model()
    file = old(tmp_path / "old", model.state_dict())
    shutil.move(file.parent / "config.json", tmp_path / "elsewhere.json")
    with pytest.raises(SourceNotFound, match=r"config\.json does not exist; --config"):
        convert(file, file.parent)
    convert(file, file.parent, config=tmp_path / "elsewhere.json")
    assert same(VisionLanguageModel.from_pretrained(file.parent), model)


def test_one_entry_of_several_is_picked_by_its_key(tmp_path):
    model = tiny_model()
    content = {"step": 12, "model": model.state_dict(), "optimizer": {"state": {}}}
    file = old(tmp_path / "old", content)
    with pytest.raises(WeightsError, match="'model' is a dict, no tensor; --key NAME picks one of 'model'"):
        convert(file, tmp_path / "new")
    with pytest.raises(WeightsError, match="no entry 'weights'.*'model', 'optimizer'"):
        convert(file, tmp_path / "new", key="weights")
    convert(file, tmp_path / "new", key="model")
    assert same(VisionLanguageModel.from_pretrained(tmp_path / "new"), model)


class Command:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


STATE = tiny_model().state_dict()
NOT_TENSORS = {
    "vlm.VisionLanguageModel": tiny_model(),
    "argparse.Namespace": {"args": Namespace(lr=1)},
    "'epoch' is a int": {**STATE, "epoch": 3},
    "'names' is a list": {"names": ["a"]},
    "holds a list": [torch.ones(1)],
    "holds a Tensor": torch.ones(1),
    "holds a dict": {},
    "7 is no name": {7: torch.ones(1)},
    "'a' is a tensor of torch.float32, torch.sparse_coo": {"a": torch.eye(3).to_sparse()},
    "'a' is a tensor of torch.complex64": {"a": torch.ones(1, dtype=torch.complex64)},
    "on meta": {"a": torch.ones(1, device="meta")},
    "unexpected: MP.norm.weight": {**STATE, "MP.norm.weight": torch.ones(3)},
    "missing: MP.proj.weight": {name: t for name, t in STATE.items() if name != "MP.proj.weight"},
    "MP.proj.weight: (3, 3) in the file, (64, 128) here": {**STATE, "MP.proj.weight": torch.ones(3, 3)},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("words", NOT_TENSORS)
def test_what_is_no_tensor_or_does_not_fit_is_named_and_nothing_is_written(tmp_path, words, zipped):
    file = old(tmp_path / "old", NOT_TENSORS[words], zipped=zipped)
    with pytest.raises(WeightsError) as caught:
        convert(file, tmp_path / "new")
    assert words in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_program_in_a_pickle_is_named_and_not_run(tmp_path, zipped):
    trace = tmp_path / "it ran"
    file = old(tmp_path / "old", {**STATE, "extra": Command(trace)}, zipped=zipped)
    with pytest.raises(WeightsError, match=r"asks for \w+\.mkdir, which is not run"):
        convert(file, tmp_path / "new")
    assert not trace.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, share, zipped):
    file = old(tmp_path / "old", STATE, zipped=zipped)
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(WeightsError, match="cannot be read as tensors|more than tensors"):
        convert(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_compressed_file_is_refused_before_it_unpacks(tmp_path):
    file = old(tmp_path / "old", STATE)
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(tmp_path / "x", "w") as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name), zipfile.ZIP_DEFLATED)
    shutil.move(tmp_path / "x", file)
    with pytest.raises(WeightsError, match="is compressed"):
        convert(file, tmp_path / "new")


def test_weights_that_are_there_are_not_overwritten(tmp_path):
    file = old(tmp_path / "old", STATE)
    tiny_model(seed=1).save_pretrained(tmp_path / "new")
    before = (tmp_path / "new" / "model.safetensors").read_bytes()
    with pytest.raises(WeightsError, match=r"model\.safetensors exists already"):
        convert(file, tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    file = old(tmp_path / "old", STATE)
    (tmp_path / "taken").write_text("")
    with pytest.raises(WeightsError, match="taken cannot be written"):
        convert(file, tmp_path / "taken")


def test_a_config_that_contradicts_itself_is_refused(tmp_path):
    file = old(tmp_path / "old", STATE)
    text = (file.parent / "config.json").read_text()
    (file.parent / "config.json").write_text(text.replace('"lm_n_heads": 4', '"lm_n_heads": 5'))
    with pytest.raises(ConfigError, match="lm_n_heads=5"):
        convert(file, tmp_path / "new")


def test_loading_refuses_a_pickle_and_the_command_it_names_is_the_way_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    file = old(tmp_path / "the old one", model.state_dict())
    for source in (file.parent, file):
        with pytest.raises(WeightsError, match="a pickle") as caught:
            VisionLanguageModel.from_pretrained(source)
        command = str(caught.value).rpartition(": ")[2].replace("FOLDER", "'new one'")
        program, *arguments = shlex.split(command)
        assert program == "nanovlm" and main(arguments) == 0
        folder = capsys.readouterr().out.strip()
        assert same(VisionLanguageModel.from_pretrained(folder), model)


def test_the_command_tells_a_mistake_in_one_line(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "new")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and "none.pth does not exist" in shown.err
