"""What is refused: by an error of our own that names the thing, before memory is taken, nothing half-loaded.

Unusual: every case runs in one child process, whose peak memory may not grow with what the input claims.
Damaged headers and contradicting configs are in test_weights.py and test_config.py; here they come through
the calls of the interface, beside what those leave out.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm import VisionLanguageModel, get_image_processor, get_tokenizer, preset
from nanovlm.checkpoint import Checkpoint
from nanovlm.errors import WeightsError
from nanovlm.images import open_picture
from nanovlm.prompts import image_string
from nanovlm.weights import load
from tests.hub_client import Client, Raised
from tests.model.helpers import prompt, tiles, tiny_config, tiny_model
from tests.model.test_weights import lie, rewrite

MOST_BYTES = 48 << 20  # that a refusal may add to the peak; what the inputs below claim begins at 200 MB
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PROJ = "MP.proj.weight"


class Case(NamedTuple):
    make: Callable  # changes the folder of a saved model; or makes the bad call
    error: str
    words: tuple[str, ...]


# -- folders that from_pretrained is given ------------------------------------------------------------------


def config(**changes):
    def change(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))

    return change


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def header(change):
    return lambda folder: rewrite(folder / WEIGHTS, change)


def shift(header):
    header[PROJ]["data_offsets"] = [offset + 8 for offset in header[PROJ]["data_offsets"]]


def long_number(header):
    return json.dumps({PROJ: {**header[PROJ], "shape": [1]}}).replace("[1]", f"[{'9' * 5000}]").encode()


def shards(content: dict):
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": content}))

    return change


def enormous(folder: Path) -> None:
    """A file that really has the ten gigabytes its header claims; none of them is on the disk."""
    header = json.dumps({PROJ: {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, 10**10]}})
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 10**10)


def long_config(folder: Path) -> None:
    os.truncate(folder / CONFIG, 10**9)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({PROJ: torch.ones(1)}, folder / "model.pth")


def a_folder_for_a_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def as_large_as_the_default(folder: Path) -> None:
    names = [name for name in preset("default").to_json_dict() if name.startswith(("vit_", "lm_", "mp_"))]
    large = {name: preset("default").to_json_dict()[name] for name in names}
    config(**large, extra_token_amount=66, max_img_size=512)(folder)


BEYOND = "\\".join(("..", "model.safetensors"))
FOLDERS = {
    "a gap between tensors": Case(header(shift), "WeightsError", (WEIGHTS, PROJ, "leaves a gap")),
    "more than the file has": Case(header(lie(shape=[64, 10**6], data_offsets=[0, 256 * 10**6])),
                                   "WeightsError", (WEIGHTS, "overlaps")),
    "a type that is a list": Case(header(lie(dtype=["F32"])), "WeightsError", (WEIGHTS, PROJ, "malformed")),
    "100,000 dimensions": Case(header(lie(shape=[2**61] * 100_000)), "WeightsError", (PROJ, "malformed")),
    "a number of 5,000 digits": Case(header(long_number), "WeightsError", (WEIGHTS, "no JSON")),
    "ten gigabytes for another shape": Case(enormous, "WeightsError", ("does not fit", "missing")),
    "a folder for a file": Case(a_folder_for_a_file, "SourceNotFound", (WEIGHTS, INDEX, "neither")),
    "pickled weights": Case(pickled, "WeightsError", ("model.pth", "a pickle", "nanovlm convert")),
    "a shard that is missing": Case(shards({PROJ: "x.safetensors"}),
                                    "SourceNotFound", (INDEX, "x.safetensors")),
    "a shard outside": Case(shards({PROJ: BEYOND}), "WeightsError", (INDEX, "in the same folder")),
    "a shard that is the parent": Case(shards({PROJ: ".."}), "WeightsError", (INDEX, "'..'")),
    "an index without end": Case(shards({PROJ: [PROJ]}), "WeightsError", (INDEX, "weight_map")),
    "a config of a gigabyte": Case(long_config, "WeightsError", (CONFIG, "1,000,000,000", "100,000,000")),
    "a config that is a list": Case(text(CONFIG, "[]"), "ConfigError", ("list", "object")),
    "a config with an endless number": Case(text(CONFIG, '{"lm_hidden_dim": ' + "9" * 5000 + "}"),
                                            "WeightsError", (CONFIG, "no JSON")),
    "a width of 10^9": Case(config(lm_hidden_dim=10**9), "ConfigError", ("lm_hidden_dim=1000000000",)),
    "10^9 layers": Case(config(vit_n_blocks=10**9), "ConfigError", ("vit_n_blocks=1000000000", "256")),
    "a vocabulary of 10^9": Case(config(lm_vocab_size=10**9), "ConfigError", ("1000000000", "4,194,304")),
    "a width that is text": Case(config(lm_hidden_dim="64"), "ConfigError", ("lm_hidden_dim='64'", "number")),
    "a width that is nothing": Case(config(vit_hidden_dim=None), "ConfigError", ("vit_hidden_dim=None",)),
    "a width that is no number": Case(config(lm_rms_eps=math.nan), "ConfigError", ("lm_rms_eps=nan",)),
    "tokens that are a list": Case(config(vlm_extra_tokens=["<a>"]), "ConfigError", ("vlm_extra_tokens",)),
    "a grid beyond the tokens": Case(config(max_img_size=1024), "ConfigError", ("16x16 tiles", "no r1c9")),
    "another kind of model": Case(config(model_type="llama"), "ConfigError", ("model_type='llama'",)),
    "sizes of 460M parameters": Case(as_large_as_the_default, "WeightsError", ("does not fit", "missing: ")),
}  # fmt: skip


# -- calls --------------------------------------------------------------------------------------------------


def model_and_prompt(images: int = 1):
    model = tiny_model()
    return model, torch.tensor([prompt(model.cfg, 4, images)]), tiles(model.cfg, images)


def call(change: Callable) -> Callable:
    """forward with (input_ids, images, attention_mask, targets) changed by ``change(ids, pixels)``."""

    def run(folder: Path) -> None:
        model, ids, pixels = model_and_prompt()
        model(*change(ids, pixels))

    return run


def float_picture(value: float) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.float32))


def bomb(limit: int | None):
    """A small file of 30,000 x 30,000 pixels, read where PIL's own limit is this one."""

    def run(folder: Path) -> None:
        shown = Image.new("1", (8, 8))
        shown.save(folder / "bomb.png")
        raw = bytearray((folder / "bomb.png").read_bytes())
        raw[16:24] = (30_000).to_bytes(4, "big") * 2
        raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
        (folder / "bomb.png").write_bytes(raw)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            open_picture(folder / "bomb.png")

    return run


def question(grid: tuple[int, int], generation: str = "main", tokens: int = 4):
    return lambda folder: image_string(get_tokenizer(tiny_config(generation)), [grid], tokens)


def generate(**options):
    def run(folder: Path) -> None:
        model, ids, pixels = model_and_prompt()
        model.generate(ids, **{"images": pixels, **options})

    return run


CALLS = {
    "ids in a list": Case(call(lambda ids, x: (ids.tolist(), x)), "PromptError", ("input_ids", "list")),
    "a mask in a list": Case(call(lambda ids, x: (ids, x, [1])), "PromptError", ("attention_mask", "list")),
    "targets of floats": Case(call(lambda ids, x: (ids, x, None, ids.float())),
                              "PromptError", ("targets", "torch.int64", "torch.float32")),
    "targets of another shape": Case(call(lambda ids, x: (ids, x, None, ids[:, :3])),
                                     "PromptError", ("(1, 3)", "(1, 8)")),
    "a target beyond the vocabulary": Case(call(lambda ids, x: (ids, x, None, ids + 325)),
                                           "PromptError", ("lm_vocab_size=325", "-100")),
    "a target below it": Case(call(lambda ids, x: (ids, x, None, -ids)), "PromptError", ("target -",)),
    "infinite pixels": Case(call(lambda ids, x: (ids, x / 0)), "ImageError", ("NaN or infinite",)),
    "pixels of complex numbers": Case(call(lambda ids, x: (ids, x * 1j)), "ImageError", ("torch.complex64",)),
    "pixels in an array": Case(call(lambda ids, x: (ids, x.numpy())), "ImageError", ("ndarray",)),
    "a picture that was not processed": Case(call(lambda ids, x: (ids, [float_picture(0)])),
                                             "ImageError", ("Image", "get_image_processor")),
    "a token without its picture": Case(generate(images=None), "ImageTokenMismatch", ("4 image", "0 tiles")),
    "10^12 new tokens": Case(generate(max_new_tokens=10**12), "PromptTooLong", ("1000000000000", "1024")),
    "new tokens in words": Case(generate(max_new_tokens="5"), "PromptError", ("max_new_tokens='5'",)),
    "a picture of NaN": Case(lambda folder: get_image_processor(tiny_config())(float_picture(math.nan)),
                             "ImageError", ("NaN",)),
    "a bomb": Case(bomb(Image.MAX_IMAGE_PIXELS), "ImageError", ("bomb.png", "900000000")),
    "a bomb without PIL's limit": Case(bomb(None), "ImageError", ("bomb.png", "30000x30000", "178,956,970")),
    "a grid beyond the tokens": Case(question((9, 1)), "ImageTokenMismatch", ("9x1", "r9c1", "max_img_size")),
    "a grid of nothing": Case(question((0, 1)), "ImageTokenMismatch", ("0x1",)),
    "a grid of 10^12": Case(question((10**6, 10**6), "v0.2"), "ImageTokenMismatch", ("1000000x1000000",)),
    "10^12 tokens a tile": Case(question((1, 1), tokens=10**12), "ImageTokenMismatch", ("1000000000000",)),
    "tiles that do not divide": Case(lambda _: get_image_processor(100, 64), "ConfigError", ("100", "64")),
    "an unknown preset": Case(lambda _: preset("tinny"), "UnknownPreset", ("'tinny'", "'tiny'")),
    "an unknown encoder": Case(lambda _: VisionLanguageModel(preset("tiny", vision_encoder="vit")),
                               "UnknownBackbone", ("'vit'", "siglip")),
}  # fmt: skip


# -- the child ----------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory this process ever had; getrusage would begin with what the process that forked it had."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load_folder(folder: str) -> None:
    VisionLanguageModel.from_pretrained(folder)


def make_call(name: str, folder: str) -> None:
    CALLS[name].make(Path(folder))


def warm_up(folder: str) -> None:
    """Once what is right, so that libraries have loaded what they need."""
    model = VisionLanguageModel.from_pretrained(folder)
    picture = Image.new("RGB", (100, 60))
    picture.save(Path(folder) / "picture.png")
    model.answer(str(Path(folder) / "picture.png"), "What?", max_new_tokens=1)


def take(count: int) -> None:
    torch.ones(count, dtype=torch.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def child(saved) -> Iterator[Client]:
    with Client(dict(os.environ)) as client:
        client(warm_up, str(saved))
        yield client
        before = client(peak_bytes)  # that growth would have been seen
        client(take, 4 * MOST_BYTES)
        assert client(peak_bytes) - before > 2 * MOST_BYTES


def refuse(child: Client, case: Case, function: Callable, *arguments: str) -> None:
    """The call ends with the case's error and words, and took no memory worth speaking of."""
    before = child(peak_bytes)
    with pytest.raises(Raised) as raised:
        child(function, *arguments)
    assert case.error in raised.value.kinds and "NanoVLMError" in raised.value.kinds, raised.value
    assert [word for word in case.words if word not in raised.value.message] == [], raised.value
    assert len(raised.value.message) < 1000
    assert child(peak_bytes) - before < MOST_BYTES


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_is_refused_by_what_is_wrong_before_memory_is_taken(child, saved, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    FOLDERS[name].make(folder)
    refuse(child, FOLDERS[name], load_folder, str(folder))


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_refused_by_what_is_wrong_before_memory_is_taken(child, tmp_path, name):
    refuse(child, CALLS[name], make_call, name, str(tmp_path))


def test_a_model_that_cannot_be_filled_keeps_what_it_had(saved, tmp_path):
    model = tiny_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / WEIGHTS, lambda header: header.update({"MP.proj.bias": header.pop(PROJ)}))
    with pytest.raises(WeightsError, match=r"missing: MP\.proj\.weight.*unexpected: MP\.proj\.bias"):
        load(model, Checkpoint([tmp_path / WEIGHTS]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_that_shrinks_while_it_is_read_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    stored = Checkpoint([tmp_path / WEIGHTS])
    last = max(stored.entries, key=lambda name: stored.entries[name].start)
    os.truncate(tmp_path / WEIGHTS, stored.entries[last].start + 1)
    with pytest.raises(WeightsError, match=f"{last} ends after 1 of .* did the file change"):
        stored.read(last)
