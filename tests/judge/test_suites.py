"""Every test of every check fails on the reply that deserves it, and passes on a good one."""

from __future__ import annotations

import math

import pytest

from compat.combo import choose as choose_combos
from compat.plugin import judge
from compat.process import ChildFailed, NotSupported, TargetRaised
from compat.result import ERROR, FAILED, PASSED, SKIPPED, Run
from compat.suites import choose

from .fake_child import BOS, EOS, VOCAB, FakeChild


def results(child, *suites: str) -> dict[str, object]:
    run = Run.begin({"label": "fake"}, "tiny", ["siglip2-smollm2"])
    judge(run, child, choose_combos(None), choose(list(suites) or None))
    assert not run.incomplete
    assert len({result.test for result in run.results}) == len(run.results) or not suites
    return {result.test: result for result in run.results}


def put(question: str, *path, value=None, via=None):
    """Changes that set `value` (or via(old)) at `path` inside the reply to `question`."""

    def change(reply, parameters):
        inner = reply
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = via(inner[path[-1]]) if via else value
        return reply

    return {question: change}


def drop(question: str, *path):
    def change(reply, parameters):
        inner = reply
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return reply

    return {question: change}


def raising(question: str, error: Exception, when=lambda parameters: True):
    def change(reply, parameters):
        if when(parameters):
            raise error
        return reply

    return {question: change}


def long_row(parameters) -> bool:
    return len(parameters["rows"][0]["tokens"]) > 61  # one picture and all the 64 - 4 positions beside it


def nan_when_long(reply, parameters):
    if len(parameters["rows"][0]["tokens"]) >= 61:
        reply["logits.0"][-1] = math.nan
    return reply


def no_loss(reply, parameters):
    return {**reply, "loss": None}


def always_loss(reply, parameters):
    return {**reply, "loss": 1.0 if reply["loss"] is None else reply["loss"]}


def padded_loss(reply, parameters):
    return {
        **reply,
        "loss": reply["loss"] and reply["loss"] * (1.1 if parameters["padding"] == "left" else 1),
    }


def train_loss(value):
    return {
        "forward": lambda reply, parameters: {**reply, "loss": value} if parameters.get("train") else reply
    }


def generated(change):
    """Changes that rewrite each row of generated ids by change(ids, parameters)."""
    def rewritten(reply, parameters):
        return {**reply, "ids": [change(ids, parameters) for ids in reply["ids"]]}

    return {"generate": rewritten}


def in_mode(train: bool, **values):
    """Changes to what generate says of the model, in one mode."""
    return {"generate": lambda reply, p: {**reply, **(values if p.get("train", False) == train else {})}}


def always_greedy(reply, parameters):
    return reply if parameters["greedy"] else FakeChild().ask("generate", **{**parameters, "greedy": True})


def other_in_train(reply, parameters):
    return {**reply, "logits.0": reply["logits.0"] * (1.01 if parameters.get("train") else 1)}


def padded_train_loss(reply, parameters):
    off = parameters.get("train") and len(parameters["rows"]) == 2 and parameters["padding"] == "left"
    return {**reply, "loss": reply["loss"] + 0.1} if off else reply


def padded_generate(ids, parameters):
    return [TEXT if n == 2 else i for n, i in enumerate(ids)] if len(parameters["rows"]) == 2 else ids


TEXT = 7
SIGNATURE = ("describe", "signatures", "forward")

# suite: {test: what makes it fail}. A text is a fault of the double's model; a dict rewrites replies.
DESERVED = {
    "config": {
        "every default has its declared type": put("describe", "config", "lm_n_heads", "default", value="15"),
        "sizes divide as the layers need": put("describe", "config", "lm_n_heads", "default", value=7),
        "patches fit the pixel shuffle": put(
            "describe", "config", "mp_pixel_shuffle_factor", "default", value=5
        ),
        "vocabulary is base plus extra tokens": put(
            "describe", "config", "lm_vocab_size", "default", value=49152
        ),
        "training length fits the positions": put(
            "describe", "config", "lm_max_length", "default", value=9000
        ),
        "the built model has the size its config says": put("describe", "vocab_size", value=VOCAB - 1),
        "config comes back from json unchanged": put("save_load", "config_after", "lm_n_heads", value=4.0),
    },
    "signature": {
        "forward takes ids pictures and targets": put(*SIGNATURE, 1, "name", value="video"),
        "mask and targets may be left out": drop(*SIGNATURE, 2, "default"),
        "ids come before pictures": put(*SIGNATURE, via=lambda old: [old[1], old[0], *old[2:]]),
        "generate needs only ids and pictures": drop("describe", "signatures", "generate", 2, "default"),
        "logits cover every text token and the whole vocabulary": put(
            "forward", "logits.1", via=lambda old: old[:-1]
        ),
        "without targets there is no loss": {"forward": always_loss},
        "with targets there is a loss": {"forward": no_loss},
    },
    "forward": {
        "loss is finite": train_loss(math.nan),
        "loss is cross entropy at the labelled positions": put(
            "forward", "loss", via=lambda old: old and old * 1.01
        ),
        "a masked label does not change the loss": "masked labels count",
        "a later token does not change earlier logits": "the future is seen",
        "another picture changes the logits": "pictures are ignored",
        "rows do not depend on their neighbours or order": "rows leak",
        "the same call twice gives the same logits": "dropout in eval",
        "train mode without dropout gives what eval mode gives": {"forward": other_in_train},
    },
    "generate": {
        "cached generation equals argmax of the full forward": "the cache is off by one",
        "a long generation equals argmax of the full forward": "the cache forgets late",
        "prompts of different length generate what they generate alone": generated(padded_generate),
        "generated ids are inside the vocabulary (greedy)": generated(
            lambda ids, p: [*ids[:-1], VOCAB] if p["greedy"] else ids
        ),
        "generated ids are inside the vocabulary (sampled)": generated(
            lambda ids, p: ids if p["greedy"] else [*ids[:-1], -1]
        ),
        "no more than max new tokens come": generated(lambda ids, p: [*ids, TEXT]),
        "max new tokens zero gives nothing": generated(lambda ids, p: ids or [TEXT]),
        "sampling with the same seed repeats": "sampling is not seeded",
        "sampling is not greedy under another name": {"generate": always_greedy},
        "generating changes no weight and no mode (eval)": in_mode(False, changed=["MP.proj.weight"]),
        "generating changes no weight and no mode (train)": in_mode(True, mode_kept=False),
        "generating leaves the model as it was": "generate changes the model",
    },
    "backward": {
        "every trainable parameter gets a gradient": put("gradients", "grads", "MP.proj.weight", value=None),
        "every gradient is finite": put("gradients", "grads", "MP.proj.weight", value=math.inf),
        "no part of the model is cut off": put("gradients", "grads", "MP.proj.weight", value=0.0),
        "no matrix has a gradient of zero": put(
            "gradients", "grads", "decoder.blocks.0.attn.weight", value=0.0
        ),
        "frozen parameters get no gradient": put("gradients", "frozen", value=["MP.proj.weight"]),
        "loss in train mode is a number": put("gradients", "loss", value=math.nan),
        "twenty steps on one batch learn it": put(
            "train", "losses", via=lambda old: [4.0 - 0.01 * n for n in range(len(old))]
        ),
    },
    "save_load": {
        "the folder holds a config and weights": put("save_load", "files", value=["config.json"]),
        "loading finds every tensor": put("save_load", "missing", value=["MP.proj.weight"]),
        "saving leaves nothing the model does not know": put("save_load", "unexpected", value=["old.weight"]),
        "the loaded model gives the same logits": put(
            "save_load", "after.0", via=lambda old: old * (1 + 1e-5)
        ),
        "saved names are the model's own": put(
            "save_load", "keys", via=lambda old: ["model." + name for name in old]
        ),
        "loading keeps ties and what is trained": put("save_load", "ties_after", value=[]),
    },
    "tokenizer": {
        "decoding gives the text back": put(
            "tokenize", "decoded", via=lambda old: [text.strip() for text in old]
        ),
        "ids equal those of the tokenizer file": put(
            "tokenize", "reference_ids", 0, via=lambda old: [*old[:-1], 9, 9]
        ),
        "ids are inside the model's vocabulary": put("tokenize", "length", value=VOCAB + 1),
        "special tokens have their own ids inside the vocabulary": put(
            "tokenize", "special", "image_token", 1, value=EOS
        ),
        "a special token in text is one id": put("tokenize", "ids", 0, via=lambda old: [*old, 9]),
    },
    "train_config": {
        "every default has its declared type": put(
            "train_config", "fields", "batch_size", "default", value=2.5
        ),
        "some learning rate trains and none is negative": put(
            "train_config", "fields", "lr_mp", "default", value=-1.0
        ),
        "counts are whole numbers that count something": put(
            "train_config", "fields", "batch_size", "default", value=0
        ),
    },
    "state_dict": {
        "no tensor is empty": put("state_dict", "keys", "MP.proj.weight", "shape", value=[0, 16]),
        "the embedding has the vocabulary's size": put(
            "describe", "config", "lm_vocab_size", "value", value=VOCAB + 1
        ),
        "there are as many layers as the config says (lm_n_blocks)": drop(
            "state_dict", "keys", "decoder.blocks.1.attn.weight"
        ),
        "there are as many layers as the config says (vit_n_blocks)": drop(
            "state_dict", "keys", "vision_encoder.blocks.0.attn.weight"
        ),
        "ties are real": put("state_dict", "keys", "decoder.head.weight", "tied_to", value=None),
        "fresh weights are numbers": put("state_dict", "keys", "MP.proj.weight", "finite", value=False),
        "parameters are floating point": put("state_dict", "keys", "MP.proj.weight", "dtype", value="int64"),
    },
    "edge_cases": {
        "padding does not change a row (left)": "padding leaks",
        "padding does not change a row (right)": "padding leaks",
        "padding carries no labels": {"forward": padded_loss},
        "a row without a picture gives numbers": "pictures are ignored",
        "text only and pictured rows share a batch": "padding leaks",
        "several pictures keep their order": "picture order is lost",
        "every picture of a row counts": "the first picture stands for all",
        "a picture changes only the text after it": "pictures go to the places in reverse",
        "a longest row still sees its beginning": "only a window is seen",
        "a row that ends early leaves the others their length": "the first end ends all",
        "a split picture has the tiles of its grid": put("process_image", "pictures", 1, "tiles", value=2),
        "every picture has a token for every feature": put(
            "process_image", "pictures", 2, "features", via=lambda old: old + 1
        ),
        "a row as long as the positions gives numbers": {"forward": nan_when_long},
        "beyond the positions comes a clear error or numbers": raising(
            "forward", TargetRaised("IndexError", "index out of range in self", "models/lm.py:9"), long_row
        ),
        "after the end token nothing else follows": "the end is ignored",
    },
    "data": {
        "every row is supervised": put("data", "supervised", 1, value=0),
        "labels are the assistant's words": put("data", "labels_text", 0, via=lambda old: old[1:]),
        "every label is the next token": put("data", "labels", 1, value=[-100, -100, 12, 13, 14, -100]),
        "padding is masked and teaches nothing": put("data", "attention_mask", 0, value=[1] * 6),
        "image tokens match the features": put("data", "image_tokens", 0, via=lambda old: old - 1),
        "the batch has ids labels and pictures": put("data", "batch_keys", value=["input_ids", "labels"]),
    },
    "backbones": {
        "backbones load": put("backbones", "loaded", value=False),
        "the model holds every tensor of the files": put(
            "backbones", "missing", value=["a/b: lm_head.weight"]
        ),
    },
    "vram": {
        "peak of a forward pass holds the weights": put("memory", "parameters_bytes", value=9999),
        "a training step needs more than a forward pass": {
            "memory": lambda reply, p: {**reply, "peak_bytes": 4100} if p["step"] == "train" else reply
        },
        "memory grows with the batch": put("memory", "peak_bytes", value=8000),
    },
}
CASES = [(suite, test, fault) for suite, tests in DESERVED.items() for test, fault in tests.items()]

# More ways to deserve the same failure.
ALSO = [
    ("config", "config comes back from json unchanged", drop("save_load", "config_after", "lm_n_heads")),
    ("config", "config comes back from json unchanged", put("save_load", "config_after", "new", value=1)),
    (
        "config",
        "vocabulary is base plus extra tokens",
        put("describe", "config", "vlm_extra_tokens", "default", value={str(n): str(n) for n in range(11)}),
    ),
    ("signature", "logits cover every text token and the whole vocabulary", drop("forward", "logits.1")),
    (
        "signature",
        "logits cover every text token and the whole vocabulary",
        put("forward", "logits.0", via=lambda old: old[:, :-1]),
    ),
    (
        "signature",
        "logits cover every text token and the whole vocabulary",
        put("forward", "logits.0", via=lambda old: old * math.nan),
    ),
    (
        "signature",
        "logits cover every text token and the whole vocabulary",
        put("forward", "logits.0", via=lambda old: old * 0),
    ),
    ("signature", "generate needs only ids and pictures", drop("describe", "signatures", "generate")),
    ("forward", "loss is finite", train_loss(-0.5)),
    ("forward", "a later token does not change earlier logits", "ids are ignored"),
    (
        "generate",
        "no more than max new tokens come",
        generated(lambda ids, p: ids[: max(0, p["max_new_tokens"] - 1)]),
    ),
    ("generate", "cached generation equals argmax of the full forward", generated(lambda ids, p: [])),
    ("generate", "prompts of different length generate what they generate alone", "padding leaks a lot"),
    ("backward", "twenty steps on one batch learn it", put("train", "losses", 5, value=math.nan)),
    ("backward", "twenty steps on one batch learn it", put("train", "losses", via=lambda old: old[:-1])),
    ("backward", "every trainable parameter gets a gradient", put("gradients", "trainable", value=[])),
    (
        "save_load",
        "the folder holds a config and weights",
        put("save_load", "files", value=["model.safetensors"]),
    ),
    (
        "save_load",
        "the loaded model gives the same logits",
        put("save_load", "after.0", via=lambda old: old * math.nan),
    ),
    ("tokenizer", "ids are inside the model's vocabulary", put("tokenize", "ids", 0, 0, value=VOCAB)),
    (
        "tokenizer",
        "special tokens have their own ids inside the vocabulary",
        put("tokenize", "special", value={}),
    ),
    (
        "tokenizer",
        "special tokens have their own ids inside the vocabulary",
        put("tokenize", "special", "image_token", 1, value=VOCAB),
    ),
    (
        "train_config",
        "some learning rate trains and none is negative",
        {"train_config": lambda reply, p: {"fields": {"lr": {"type": "float", "default": 0.0}}}},
    ),
    (
        "state_dict",
        "ties are real",
        put("state_dict", "keys", "decoder.head.weight", "tied_to", value="nowhere"),
    ),
    (
        "state_dict",
        "ties are real",
        put("state_dict", "keys", "decoder.head.weight", "shape", value=[VOCAB, 8]),
    ),
    ("state_dict", "ties are real", put("describe", "config", "lm_tie_weights", "value", value=False)),
    ("state_dict", "no tensor is empty", put("state_dict", "keys", value={})),
    (
        "edge_cases",
        "a split picture has the tiles of its grid",
        put("process_image", "pictures", 1, "grid", value=None),
    ),
    ("edge_cases", "beyond the positions comes a clear error or numbers", {"forward": nan_when_long}),
    (
        "edge_cases",
        "beyond the positions comes a clear error or numbers",
        raising("forward", ChildFailed("the process was ended by SIGKILL while answering"), long_row),
    ),
    (
        "edge_cases",
        "after the end token nothing else follows",
        generated(lambda ids, p: ids if p["eos"] == 0 else [*ids, TEXT, BOS]),
    ),
    ("data", "image tokens match the features", put("data", "image_tokens", value=[0, 0])),
    ("data", "every label is the next token", put("data", "labels", 1, 5, value=15)),
    ("data", "padding is masked and teaches nothing", put("data", "attention_mask", 1, 0, value=0)),
    ("data", "padding is masked and teaches nothing", put("data", "labels", 0, 0, value=0)),
    ("edge_cases", "every picture of a row counts", "the last picture stands for all"),
    ("edge_cases", "a picture changes only the text after it", "the last picture stands for all"),
    ("forward", "train mode without dropout gives what eval mode gives", {"forward": padded_train_loss}),
    ("save_load", "loading keeps ties and what is trained", put("save_load", "trainable_after", value={})),
    (
        "generate",
        "generating changes no weight and no mode (eval)",
        in_mode(False, mode_kept=False),
    ),
    ("data", "every row is supervised", put("data", "rows", value=0)),
    ("backbones", "backbones load", put("backbones", "total", value=0)),
    ("vram", "peak of a forward pass holds the weights", put("memory", "peak_bytes", value=0)),
]


def fake(fault) -> FakeChild:
    return FakeChild(fault) if isinstance(fault, str) else FakeChild(changes=fault)


def test_a_good_model_passes_every_test_and_skips_none():
    found = Run.begin({"label": "fake"}, "tiny", ["siglip2-smollm2"])
    judge(found, FakeChild(), choose_combos(None), choose(None))
    assert [(r.test, r.message) for r in found.results if r.status != PASSED] == []
    assert found.exit_code == 0


def test_every_test_of_every_check_has_a_fault_that_it_catches():
    found = Run.begin({"label": "fake"}, "tiny", ["siglip2-smollm2"])
    judge(found, FakeChild(), choose_combos(None), choose(None))
    titles = {suite.title: suite.name for suite in choose(None)}
    assert {(titles[r.check], r.test) for r in found.results} == {(suite, test) for suite, test, _ in CASES}


@pytest.mark.parametrize(
    ("suite", "test", "fault"), CASES + ALSO, ids=[f"{s}: {t}" for s, t, _ in CASES + ALSO]
)
def test_a_fault_fails_the_test_meant_for_it(suite, test, fault):
    found = results(fake(fault), suite)[test]
    assert found.status == FAILED, f"{found.status}: {found.message}"
    assert len(found.message) > 30, f"says too little: {found.message}"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TargetRaised("ValueError", "too many values to unpack (expected 5)", "models/x.py:12"), FAILED),
        (ChildFailed("the process ended with exit code 7 while answering 'describe'"), FAILED),
        (NotSupported("this layout takes exactly one picture a row"), SKIPPED),
        (KeyError("a bug of ours"), ERROR),
    ],
)
def test_what_a_question_raises_decides_whose_failure_it_is(error, status):
    found = results(FakeChild(changes=raising("forward", error)), "forward")
    assert {result.status for result in found.values()} == {status}
    assert all(str(error).strip("'") in result.message for result in found.values())


def test_a_model_that_insists_on_pictures_and_knows_no_mask_is_asked_the_rest():
    takes = {
        "no_image": False,
        "several_images": False,
        "greedy": True,
        "attention_mask": False,
        "eos": False,
    }
    found = results(
        FakeChild(changes=put("describe", "takes", value=takes)), "edge_cases", "forward", "generate"
    )
    skipped = {test for test, result in found.items() if result.status == SKIPPED}
    assert {result.status for result in found.values()} == {PASSED, SKIPPED}
    assert skipped == {
        "padding does not change a row (left)",
        "padding does not change a row (right)",
        "padding carries no labels",
        "a row without a picture gives numbers",
        "text only and pictured rows share a batch",
        "several pictures keep their order",
        "every picture of a row counts",
        "a picture changes only the text after it",
        "after the end token nothing else follows",
        "a row that ends early leaves the others their length",
    }
