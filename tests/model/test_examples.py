"""The examples run as they are printed, and a script written for upstream nanoVLM runs on our calls."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import nanovlm
from nanovlm import VisionLanguageModel
from tests.model.helpers import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
GENERATIONS = ["v0.1", "v0.2", "main"]


def run(script: str, *arguments: object) -> dict:
    """A script of the examples in this process; its global names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_inference_answers_offline_about_a_drawn_picture(capsys):
    run("inference.py", "--generations", 2, "--max_new_tokens", 3)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "320x240 pixels, a grid of 2x2, 57 tokens"
    assert [line.partition(":")[0] for line in shown[1:]] == ["Question", "Answer 1", "Answer 2"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_inference_answers_with_a_checkpoint_of_any_generation(tmp_path, picture_file, capsys, generation):
    model = tiny_model(generation)
    model.save_pretrained(tmp_path)
    options = ["--image", picture_file, "--prompt", "Why?", "--generations", 1, "--max_new_tokens", 4]
    run("inference.py", "--checkpoint", tmp_path, *options)
    answer = capsys.readouterr().out.splitlines()[-1]
    torch.manual_seed(0)
    assert answer == f"Answer 1: {model.answer(str(picture_file), 'Why?', max_new_tokens=4)!r}"


# -- the notebook -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads((EXAMPLES / "nanovlm.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_runs_from_top_to_bottom_and_learns_its_answer(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["answer"] == "A red disc." and capsys.readouterr().out.count("A red disc.") == 2
    assert names["losses"][-1] < names["losses"][0] / 10
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_is_kept_without_outputs(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


# -- scripts written for upstream ---------------------------------------------------------------------------

# Argument names and their order in upstream main, github.com/huggingface/nanoVLM; scripts pass them both ways.
UPSTREAM = {
    "forward": ["input_ids", "images", "attention_mask", "targets"],
    "generate": ["input_ids", "images", "attention_mask", "max_new_tokens", "top_k", "top_p", "temperature",
                 "greedy"],
    "from_pretrained": ["repo_id_or_path"],
    "save_pretrained": ["save_directory"],
    "push_to_hub": ["repo_id", "private"],
    "get_tokenizer": ["name", "extra_special_tokens", "chat_template"],
    "get_image_processor": ["max_img_size", "splitted_image_size", "resize_to_max_side_len"],
    "get_image_string": ["tokenizer", "splitted_image_counts", "mp_image_token_length"],
}  # fmt: skip
DEFAULTS = {"max_new_tokens": 5, "top_k": 50, "top_p": 0.9, "temperature": 0.5, "greedy": False,
            "attention_mask": None, "targets": None, "private": False, "extra_special_tokens": None,
            "chat_template": None, "resize_to_max_side_len": False}  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAM)
def test_calls_take_upstreams_arguments_in_its_order(name):
    function = getattr(VisionLanguageModel, name, None) or getattr(nanovlm, name)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if name == "get_image_string":  # always called by position: the names are upstream's own
        assert len(positional) == len(UPSTREAM[name])
        return
    assert [p.name for p in positional] == UPSTREAM[name]
    assert {p.name: p.default for p in positional if p.name in DEFAULTS} == {
        key: value for key, value in DEFAULTS.items() if key in UPSTREAM[name]
    }
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


def upstream_generate(source: str, path: str, prompt: str, device: str = "cpu") -> str:
    """How a script of upstream main asks: only the import line differs."""
    from nanovlm import VisionLanguageModel, get_image_processor, get_image_string, get_tokenizer

    model = VisionLanguageModel.from_pretrained(source).to(device)
    model.eval()
    cfg = model.cfg
    tokenizer = get_tokenizer(cfg.lm_tokenizer, cfg.vlm_extra_tokens, cfg.lm_chat_template)
    resize = cfg.resize_to_max_side_len if hasattr(cfg, "resize_to_max_side_len") else False
    image_processor = get_image_processor(cfg.max_img_size, cfg.vit_img_size, resize)
    tiles, ratio = image_processor(Image.open(path).convert("RGB"))
    if not hasattr(tokenizer, "global_image_token") and ratio[0] * ratio[1] == len(tiles) - 1:
        tiles = tiles[1:]
    image_string = get_image_string(tokenizer, [ratio], cfg.mp_image_token_length)
    messages = [{"role": "user", "content": image_string + prompt}]
    encoded = tokenizer.apply_chat_template([messages], tokenize=True, add_generation_prompt=True)
    tokens = torch.tensor(encoded).to(device)
    generated = model.generate(tokens, tiles.to(device), max_new_tokens=6, greedy=True)
    return tokenizer.batch_decode(generated, skip_special_tokens=True)[0]


@pytest.mark.parametrize("global_view", [True, False])
def test_a_generation_script_of_upstream_gives_the_one_call_answer(tmp_path, picture_file, global_view):
    changes = {}
    if not global_view:  # as in checkpoints made before there was one
        tokens = dict(nanovlm.preset("tiny").vlm_extra_tokens)
        del tokens["global_image_token"]
        changes = {"vlm_extra_tokens": tokens, "extra_token_amount": 65}
    tiny_model(**changes).save_pretrained(tmp_path)
    model = VisionLanguageModel.from_pretrained(tmp_path)
    answer = model.answer(str(picture_file), "What is this?", max_new_tokens=6, greedy=True)
    assert upstream_generate(str(tmp_path), str(picture_file), "What is this?") == answer != ""


def upstream_rows(model, tokenizer, conversations):
    """A batch as upstream's dataset and collator make it: shifted labels, padding on the left, nested lists."""
    rows, template = [], tokenizer.apply_chat_template
    for messages, images in conversations:
        conversation = template(messages, tokenize=True, add_special_tokens=False, return_dict=True)
        ids, mask = torch.tensor(conversation["input_ids"]), []
        word = [{"role": "assistant", "content": "xzyvd"}]
        head = template(word, tokenize=False, add_special_tokens=False)
        prefix = len(tokenizer.encode(head[: head.find("xzyvd")]))
        for message in messages:
            count = len(template([message], tokenize=True, add_special_tokens=False))
            spoken = message["role"] == "assistant"
            mask += [0] * prefix + [int(spoken)] * (count - prefix)
        labels = ids.clone().masked_fill(~torch.tensor(mask).bool(), -100).roll(-1)
        labels[-1] = -100
        rows.append((ids, labels, torch.tensor(conversation["attention_mask"]), images))
    longest = max(len(row[0]) for row in rows)

    def stacked(number: int, fill: int) -> torch.Tensor:
        pad = torch.nn.functional.pad
        return torch.stack([pad(row[number], (longest - len(row[number]), 0), value=fill) for row in rows])

    return stacked(0, tokenizer.pad_token_id), stacked(1, -100), stacked(2, 0), [row[3] for row in rows]


def test_a_training_script_of_upstream_brings_the_loss_down_and_evaluates(tmp_path, picture):
    from nanovlm import get_image_processor, get_image_string, get_tokenizer

    model = tiny_model()
    cfg = model.cfg
    tokenizer = get_tokenizer(cfg.lm_tokenizer, cfg.vlm_extra_tokens, cfg.lm_chat_template)
    image_processor = get_image_processor(cfg.max_img_size, cfg.vit_img_size, cfg.resize_to_max_side_len)
    tiles, ratio = image_processor(picture(100, 100))
    places = get_image_string(tokenizer, [ratio], cfg.mp_image_token_length)
    ask, tell = {"role": "user", "content": places + "Who?"}, {"role": "assistant", "content": "me"}
    conversations = [([ask, tell], [tiles]), ([{"role": "user", "content": "Are you?"}, tell], [])]
    ids, labels, mask, images = upstream_rows(model, tokenizer, conversations)
    parts = (model.MP, model.vision_encoder, model.decoder)
    groups = [{"params": list(part.parameters()), "lr": 3e-3} for part in parts]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    model.train()
    for _ in range(30):
        _, loss = model(ids, images, attention_mask=mask, targets=labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    model.eval()
    model.save_pretrained(save_directory=str(tmp_path))
    again = VisionLanguageModel.from_pretrained(str(tmp_path)).eval()
    asked, their_mask = ids[:, :-4], mask[:, :-4]  # without "me", its end and the line's
    by_place = again.generate(asked, images, their_mask, 3, 50, 0.9, 0.5, True)
    by_name = again.generate(
        asked, images, their_mask, max_new_tokens=3, greedy=True, temperature=None, top_p=None
    )  # as upstream's evaluation calls it
    assert torch.equal(by_place, by_name)
    assert tokenizer.batch_decode(by_name, skip_special_tokens=True) == ["me", "me"]
