"""Each way forks have been written is spoken: the same questions, answered with the numbers the code gives.

Unusual: what a tree must answer is worked out here once more, from its towers alone, one row at a time,
without padding, cache or adapter.
"""

from __future__ import annotations

import importlib.util
import types

import numpy as np
import pytest

from compat.process import Child, NotSupported
from compat.target import resolve
from tests.judge.trees import CACHED_V01, COMBO, FORKS, make_odd, make_package, make_tree

torch = pytest.importorskip("torch")

TREES = {
    "v01": lambda folder: make_tree(folder, "v01"),
    "v01 with a cache": lambda folder: make_tree(folder, "v01", CACHED_V01),
    "v02": lambda folder: make_tree(folder, "v02"),
    "main": lambda folder: make_tree(folder, "main"),
    "idefics3": lambda folder: make_tree(folder, "idefics3"),
    "odd": make_odd,
    "package": make_package,
}
IN_FRONT = ("v01", "v01 with a cache")
ONE_PICTURE = (*IN_FRONT, "v02")
DIALECT = (
    dict.fromkeys(TREES, "upstream") | dict.fromkeys(ONE_PICTURE, "single_image") | {"idefics3": "idefics3"}
)
WITHOUT_BACKBONES = ("idefics3", "package")


class Judged:
    """One tree in one child, and what it said of itself."""

    def __init__(self, name, child):
        self.name, self.child = name, child
        self.facts = child.ask("describe", combo=COMBO)

    def ask(self, question, **parameters):
        return self.child.ask(question, combo=COMBO, **parameters)

    def row(self, length, picture=0, seed=0):
        ids = self.facts["text_ids"]
        words = [ids[int(i)] for i in np.random.default_rng([seed, length]).integers(0, len(ids), length)]
        return {"tokens": [-1, *words], "images": [picture], "labels": [-100, *words[1:], -100]}


@pytest.fixture(scope="module", params=TREES)
def judged(request, tmp_path_factory):
    folder = TREES[request.param](tmp_path_factory.mktemp("trees"))
    with Child(resolve(str(folder))) as child:
        yield Judged(request.param, child)


@pytest.fixture(scope="module")
def towers():
    spec = importlib.util.spec_from_file_location("fork_towers", FORKS / "shared/towers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(judged, towers, row):
    """(T_text, V) logits of a row of one picture and text, from the towers and the probe's weights."""
    from compat.child import probe
    from compat.child.adapters.base import TINY

    cfg = types.SimpleNamespace(**TINY, lm_vocab_size=judged.facts["vocab_size"])
    names = (
        ("vision_model", "text_model", "connector")
        if judged.name == "idefics3"
        else ("vision_encoder", "decoder", "MP")
    )
    parts = [towers.Vision(cfg), towers.Text(cfg), towers.Projector(cfg)]
    probe.fill(torch.nn.ModuleDict(dict(zip(names, parts, strict=True))))
    vision, text, projector = parts
    with torch.no_grad():
        features = projector(vision(probe.picture(row["images"][0], cfg.vit_img_size)[None]))
        embeds = torch.cat((features, text.embed_tokens(torch.tensor([row["tokens"][1:]]))), 1)
        return text.head(text(embeds)[0])[0, features.shape[1] :].numpy()


def assert_close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def test_a_tree_is_recognised_by_its_signature(judged):
    facts = judged.facts
    assert facts["dialect"] == DIALECT[judged.name]
    assert facts["layout"] == ("in_front" if judged.name in IN_FRONT else "in_text")
    assert facts["image_tokens"] == 4  # (32 / 8 / 2) ** 2
    several = judged.name not in ONE_PICTURE
    assert (facts["takes"]["several_images"], facts["takes"]["no_image"]) == (several, several)
    assert facts["takes"]["greedy"] == (judged.name != "v01")
    assert facts["takes"]["eos"] == (judged.name not in IN_FRONT)
    assert all(16 < i < facts["vocab_size"] for i in facts["text_ids"]) and len(facts["text_ids"]) == 200


def test_logits_are_what_the_towers_give(judged, towers):
    rows = [judged.row(6), judged.row(9, picture=1, seed=1)]
    reply = judged.ask("forward", rows=rows, padding="left")
    for number, row in enumerate(rows):
        assert_close(reply[f"logits.{number}"], expected(judged, towers, row))
    assert reply["finite"] is True


def test_the_loss_is_the_mean_over_the_labels_of_those_logits(judged, towers):
    rows = [judged.row(6), judged.row(9, picture=1, seed=1)]
    total, count = 0.0, 0
    for row in rows:
        logits, labels = torch.tensor(expected(judged, towers, row)), torch.tensor(row["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    assert judged.ask("forward", rows=rows)["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(judged, side):
    rows = [judged.row(4), judged.row(11, picture=1)]
    together = judged.ask("forward", rows=rows, padding=side)
    for number, row in enumerate(rows):
        alone = judged.ask("forward", rows=[row], padding="none")
        assert_close(together[f"logits.{number}"], alone["logits.0"])


def test_greedy_generation_takes_the_likeliest_id_of_a_full_pass(judged, towers):
    rows = [judged.row(5), judged.row(8, picture=2, seed=3)]
    answer = judged.ask("generate", rows=rows, max_new_tokens=5)["ids"]
    for row, ids in zip(rows, answer, strict=True):
        assert len(ids) == 5
        whole = expected(judged, towers, {**row, "tokens": [*row["tokens"], *ids[:-1]]})
        want = whole[len(row["tokens"]) - 2 :].argmax(-1).tolist()
        end = next((n for n, i in enumerate(want) if i == 2), len(want)) + 1  # 2: <|im_end|>
        assert ids[:end] == want[:end]


def test_sampling_follows_the_seed(judged):
    first, again, other = (
        judged.ask("generate", rows=[judged.row(5)], max_new_tokens=12, greedy=False, seed=seed)["ids"]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_every_parameter_gets_a_gradient(judged):
    reply = judged.ask("gradients", rows=[judged.row(6)])
    assert reply["frozen"] == [] and len(reply["trainable"]) > 40
    assert all(norm is not None and norm > 0 for norm in reply["grads"].values()), reply["grads"]


def test_training_on_one_batch_learns_it(judged):
    losses = judged.ask("train", rows=[judged.row(6), judged.row(6, picture=1, seed=1)])["losses"]
    assert len(losses) == 21 and losses[-1] < losses[0] / 4


def test_every_question_meets_the_same_weights(judged):
    before = judged.ask("forward", rows=[judged.row(6)])
    judged.ask("train", rows=[judged.row(6)], steps=2)
    after = judged.ask("forward", rows=[judged.row(6)])
    assert np.array_equal(before["logits.0"], after["logits.0"])


def test_what_is_saved_comes_back(judged):
    reply = judged.ask("save_load", rows=[judged.row(6)])
    assert reply["files"] == ["config.json", "model.safetensors"]
    assert (reply["missing"], reply["unexpected"]) == ([], [])
    assert np.array_equal(reply["before.0"], reply["after.0"])
    assert reply["config_before"] == reply["config_after"]


def test_the_state_dict_tells_ties(judged):
    keys = judged.ask("state_dict")["keys"]
    text = "text_model" if judged.name == "idefics3" else "decoder"
    assert keys[f"{text}.head.weight"]["tied_to"] == f"{text}.embed_tokens.weight"
    assert [name for name, entry in keys.items() if entry["tied_to"]] == [f"{text}.head.weight"]
    assert all(entry["finite"] and entry["trainable"] and entry["persistent"] for entry in keys.values())


def test_pretrained_files_are_found_in_the_model(judged):
    if judged.name in WITHOUT_BACKBONES:
        with pytest.raises(NotSupported, match="no backbone repositories"):
            judged.ask("backbones")
        return
    reply = judged.ask("backbones")
    assert reply["found"] == reply["total"] > 40 and reply["missing"] == []


def test_the_tokenizer_agrees_with_tokenizer_json(judged):
    texts = ["\n\n12", "x   42", "the cat and the hat"]
    reply = judged.ask("tokenize", texts=texts)
    assert reply["ids"] == reply["reference_ids"] and reply["decoded"] == texts
    assert reply["length"] == reply["model_vocab_size"] or judged.name == "package"
    assert reply["special"]["eos_token"] == ["<|im_end|>", 2]


def test_the_data_pipeline_supervises_the_answers(judged):
    turns = [[{"user": "What is it?", "assistant": "12 cats"}], [{"user": "Why", "assistant": "the hat"}]]
    if judged.name == "idefics3":
        with pytest.raises(NotSupported, match="VQADataset"):
            judged.ask("data", turns=turns)
        return
    reply = judged.ask("data", turns=turns)
    for text, [turn] in zip(reply["labels_text"], turns, strict=True):
        assert text.strip() == turn["assistant"] + "<|im_end|>"
    assert reply["image_tokens"] == reply["features"] == ([0, 0] if judged.name in IN_FRONT else [4, 4])


def test_memory_holds_the_weights_and_training_needs_more(judged):
    rows = [judged.row(8)]
    forward, train = (judged.ask("memory", rows=rows, step=step) for step in ("forward", "train"))
    # weights, gradients and two moments of AdamW
    assert (
        forward["parameters_bytes"]
        < forward["peak_bytes"]
        < 4 * forward["parameters_bytes"]
        < train["peak_bytes"]
    )


def test_pictures_in_several_numbers_reach_their_places(judged):
    words = judged.facts["text_ids"][:4]
    rows = [{"tokens": [-1, words[0], -1, *words[1:]], "images": [0, 1]}, {"tokens": words, "images": []}]
    if judged.name in ONE_PICTURE:
        with pytest.raises(NotSupported, match="exactly one image a row"):
            judged.ask("forward", rows=rows)
        return
    mixed = judged.ask("forward", rows=rows)
    for number, row in enumerate(rows):
        assert_close(mixed[f"logits.{number}"], judged.ask("forward", rows=[row], padding="none")["logits.0"])
    swapped = judged.ask("forward", rows=[{**rows[0], "images": [1, 0]}])["logits.0"]
    assert np.abs(swapped - mixed["logits.0"]).max() > 1e-3


def test_an_end_token_can_be_chosen(judged):
    rows = [judged.row(5)]
    if judged.name in IN_FRONT:
        with pytest.raises(NotSupported, match="end-of-sequence"):
            judged.ask("generate", rows=rows, max_new_tokens=2, eos=20)
        return
    if judged.name == "idefics3":  # reads the id while it is built, from a tokenizer it does not keep
        with pytest.raises(NotSupported, match="holds no tokenizer"):
            judged.ask("generate", rows=rows, max_new_tokens=2, eos=20)
        return
    with pytest.raises(NotSupported, match="no token for id 99999"):
        judged.ask("generate", rows=rows, max_new_tokens=2, eos=99999)
    [free] = judged.ask("generate", rows=rows, max_new_tokens=6)["ids"]
    [ended] = judged.ask("generate", rows=rows, max_new_tokens=6, eos=free[1])["ids"]
    stop = free.index(free[1])
    assert ended[: stop + 1] == free[: stop + 1] and set(ended[stop:]) == {free[1]}


def test_the_odd_tree_names_what_stands_in(judged):
    stands_in = [note for note in judged.facts["notes"] if note.startswith("not installed")]
    if judged.name != "odd":
        assert stands_in == []
        return
    absent = [name for name in ("einops", "torchvision", "wandb") if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("einops, torchvision and wandb are all installed here")
    assert stands_in == ["not installed, only mentioned by the target: " + ", ".join(absent)]
    assert "pictures are passed as one tensor" in judged.facts["notes"]


def test_a_combo_the_model_does_not_offer_is_a_skip(judged):
    with pytest.raises(NotSupported, match="dinov2"):
        judged.child.ask("describe", combo={**COMBO, "name": "dinov2-smollm2", "vision": "dinov2"})


# -- the choice of a dialect, without a child ----------------------------------------------------------------


def subject(forward, functions=()):
    model = type("Anything", (), {"forward": forward})
    return types.SimpleNamespace(
        model_class=model, function=lambda name: print if name in functions else None
    )


@pytest.mark.parametrize(
    ("forward", "functions", "dialect"),
    [
        (lambda self, input_ids, image: None, (), "single_image"),
        (lambda self, input_ids, images: None, (), "upstream"),
        (lambda self, input_ids, images: None, ("preset",), "nanovlm"),
        (lambda self, input_ids, pixel_values: None, (), "idefics3"),
        (lambda self, input_ids, pixel_values, images: None, ("preset",), "idefics3"),
    ],
)
def test_the_signature_alone_decides(forward, functions, dialect):
    from compat.child.adapters import choose

    assert choose(subject(forward, functions)).dialect == dialect


def test_a_model_of_text_alone_has_no_dialect():
    from compat.child.adapters import choose

    assert choose(subject(lambda self, input_ids, attention_mask: None)) is None
