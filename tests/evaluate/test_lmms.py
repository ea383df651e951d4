"""lmms-eval's wrapper: against the installed package where there is one, and always against its interface.

The stand-in has what a model meets of lmms-eval 0.7: the base class with its three abstract methods, cache hook and
task_dict, ``Instance`` with ``args``, and ``simple_evaluate`` with the arguments that are passed here.
"""

from __future__ import annotations

import abc
import importlib.util
import inspect
import json
import sys
import types

import pytest
import torch

from nanovlm import cli, preset, prompts
from nanovlm.errors import ConfigError, ImageError
from nanovlm.evaluate import lmms
from nanovlm.evaluate.asking import batch_of, say
from nanovlm.vlm import VisionLanguageModel
from tests.model.helpers import scale, tiny_model

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
WHY = "lmms-eval is not installed (pip install 'nanovlm[lmms]')"


class StandIn(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *given: None)

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


def simple_evaluate(model, tasks=None, limit=None, batch_size=None, log_samples=True):
    """One question a task; its score is the length of the answer."""
    results = {}
    for task in tasks:
        model.task_dict[task] = {"val": [{"image": None, "question": "What?"}]}
        asked = Request(("What?", {"max_new_tokens": 2}, lambda document: [], 0, task, "val"))
        (said,) = model.generate_until([asked])
        results[task] = {
            "length,none": float(len(said)),
            "length_stderr,none": 0.1,
            "alias": task,
            "samples": int(limit),
        }
    return {"results": results}


class Request:
    def __init__(self, args):
        self.args = args


@pytest.fixture(params=["stand-in", pytest.param("installed", marks=pytest.mark.skipif(not INSTALLED, reason=WHY))])
def harness(request, monkeypatch):
    """lmms_eval: what is installed, or the stand-in."""
    if request.param == "stand-in":
        package = types.ModuleType("lmms_eval")
        package.__spec__ = importlib.util.spec_from_loader("lmms_eval", None)
        model, registry, evaluator = (types.ModuleType(f"lmms_eval.{name}") for name in ("m", "r", "evaluator"))
        model.lmms, evaluator.simple_evaluate = StandIn, simple_evaluate
        registry.MODELS = {}
        registry.register_model = lambda *names: lambda cls: registry.MODELS.update(dict.fromkeys(names, cls)) or cls
        api = types.ModuleType("lmms_eval.api")
        api.model, api.registry = model, registry
        modules = {"": package, ".api": api, ".api.model": model, ".api.registry": registry}
        for name, module in {**modules, ".evaluator": evaluator}.items():
            monkeypatch.setitem(sys.modules, f"lmms_eval{name}", module)
    lmms.wrapper_class.cache_clear()
    yield request.param
    lmms.wrapper_class.cache_clear()


def wrapped(picture, batch_size=2):
    """(wrapper, model, documents): three questions about pictures of different sizes, one of them about none."""
    model = tiny_model()
    wrapper = lmms.wrap(model, batch_size)
    documents = [
        {"question": "What is it?", "pictures": [picture(90, 60)]},
        {"question": "How many of them are there in all?", "pictures": [picture(200, 90, seed=1)]},
        {"question": "Why?", "pictures": []},
    ]
    wrapper.task_dict["task"] = {"val": documents}
    return wrapper, model, documents


def requests(documents, second):
    return [
        Request((d["question"], second(n), lambda document: document["pictures"], n, "task", "val"))
        for n, d in enumerate(documents)
    ]  # fmt: skip


def test_it_is_a_model_of_lmms_eval(harness):
    cls = lmms.wrapper_class()
    from lmms_eval.api.model import lmms as base

    assert issubclass(cls, base) and not inspect.isabstract(cls) and cls.is_simple
    for name in ("loglikelihood", "generate_until", "generate_until_multi_round"):
        ours, theirs = inspect.signature(getattr(cls, name)), inspect.signature(getattr(base, name))
        assert list(ours.parameters) == list(theirs.parameters)


def test_answers_come_in_the_order_of_the_requests(harness, picture):
    wrapper, model, documents = wrapped(picture)
    found = wrapper.generate_until(requests(documents, lambda number: {"max_new_tokens": 3 + number % 2, "until": []}))
    alone = [
        say(model, batch_of(model, [d["question"]], [d["pictures"]]), 3 + number % 2)[0]
        for number, d in enumerate(documents)
    ]
    assert found == alone


def test_an_answer_stops_where_the_task_says(harness, picture):
    wrapper, _, documents = wrapped(picture)
    (whole, *_) = wrapper.generate_until(requests(documents, lambda number: {"max_new_tokens": 6}))
    assert len(whole) > 2
    (cut, *_) = wrapper.generate_until(requests(documents, lambda number: {"max_new_tokens": 6, "until": whole[2]}))
    assert cut == whole[: whole.index(whole[2])].strip()


def test_likelihoods_are_those_of_forward(harness, picture):
    wrapper, model, documents = wrapped(picture)
    found = wrapper.loglikelihood(requests(documents, lambda number: ("red", lambda document: "blue", "x")[number]))
    for number, answer in enumerate(("red", "blue", "x")):
        batch = batch_of(model, [documents[number]["question"]], [documents[number]["pictures"]])
        shown = prompts.image_string(model.tokenizer, batch.grids[0], model.cfg.tokens_per_cell)
        ids, taught = prompts.conversation(model.tokenizer, [(documents[number]["question"], answer)], shown)
        labels = [i if counts else -100 for i, counts in zip(ids, taught, strict=True)]
        targets = torch.tensor([[*labels[1:], -100]])
        with torch.no_grad():
            _, loss = model(torch.tensor([ids]), batch.images, targets=targets)
        assert found[number][0] == pytest.approx(-float(loss) * int((targets != -100).sum()), abs=2e-3)
        assert found[number][1] is False


def test_what_it_cannot_do_is_told(harness, picture):
    wrapper, _, documents = wrapped(picture)
    documents[0]["pictures"] = ["film.mp4"]
    with pytest.raises(ImageError, match="task task: a str to look at"):
        wrapper.generate_until(requests(documents, lambda number: {}))
    with pytest.raises(NotImplementedError, match="one question at a time"):
        wrapper.generate_until_multi_round([])
    with pytest.raises(ConfigError, match="no argument 'temperature'; it has pretrained, device, batch_size"):
        lmms.wrapper_class()(tiny_model(), temperature=1)


def test_the_command_line_of_lmms_eval_makes_one_by_name(harness, tmp_path):
    lmms.register()
    from lmms_eval.api import registry

    cls = registry.MODELS["nanovlm"] if harness == "stand-in" else registry.get_model("nanovlm")
    tiny_model().save_pretrained(tmp_path)
    made = cls(pretrained=str(tmp_path), device="cpu", batch_size="3")
    assert made.batch_size == 3 and made.config.vit_img_size == 64 and made.max_length == 1024
    assert made.tok_decode(made.tok_encode("hat")) == "hat" and str(made.device) == "cpu" and made.rank == 0


def test_numbers_are_what_it_measured():
    metrics = {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1, "alias": "mine", "n": 3}
    assert lmms.numbers({"results": {"mme": metrics}}) == {"mme/exact_match": 0.5, "mme/n": 3.0}


def test_training_measures_benchmarks_on_the_way(harness, tmp_path):
    if harness == "installed":
        pytest.skip("the installed one downloads its tasks; test_a_task_of_one_s_own runs it offline")
    words = [
        "train", "--use_preset", "tiny", "--train_dataset_path", "synthetic", "--output_dir", str(tmp_path),
        "--run_name", "run", "--max_training_steps", "4", "--eval_interval", "2", "--batch_size", "2",
        "--num_workers", "0", "--validation_batches", "1", "--scored_scenes", "0", "--no_pack", "--use_lmms_eval",
        "--lmms_eval_tasks", "mmstar,mme", "--lmms_eval_limit", "5",
    ]  # fmt: skip
    assert cli.main(words) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [record for record in records if "lmms_eval/mme/length" in record]
    assert [record["step"] for record in told] == [2, 4]
    assert all(record["lmms_eval/mmstar/samples"] == 5 for record in told)


def test_evaluate_hands_other_tasks_to_it(harness, capsys):
    if harness == "installed":
        pytest.skip("the installed one downloads its tasks")
    words = [
        "evaluate",
        "--use_preset",
        "tiny",
        "--tasks",
        "mme,ocrbench",
        "--max-samples",
        "2",
        "--output",
        "",
        "--json",
    ]
    cli.main(words)
    assert set(json.loads(capsys.readouterr().out)["lmms_eval"]) == {
        f"{task}/{name}" for task in ("mme", "ocrbench") for name in ("length", "samples")
    }


@pytest.mark.skipif(not INSTALLED, reason=WHY)
def test_a_task_of_one_s_own_runs_through_the_installed_package(tmp_path, picture):
    """A data set of two questions on disk, lmms-eval's own task manager and metric, and our model."""
    import datasets
    from lmms_eval.tasks import TaskManager

    rows = {"image": [picture(90, 60), picture(60, 90, seed=1)], "question": ["What?", "Who?"], "answer": ["x", "y"]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.to_parquet(str(tmp_path / "test.parquet"))
    (tmp_path / "utils.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    (tmp_path / "own.yaml").write_text(
        f"dataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/test.parquet\ntask: own_task\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\ngeneration_kwargs:\n  max_new_tokens: 3\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    model = scale(VisionLanguageModel(preset("tiny"), load_backbone=False))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lmms.scores(model, ["own_task"], batch_size=2, task_manager=manager, bootstrap_iters=0)
    assert found["own_task/exact_match"] == 0.0


def test_without_it_a_sentence_says_what_to_install(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lmms_eval" else real(name, *more)
    )
    lmms.wrapper_class.cache_clear()
    with pytest.raises(ConfigError, match=r"nanovlm\[lmms\]"):
        lmms.wrap(tiny_model())
    assert cli.main(["train", "--use_preset", "tiny", "--use_lmms_eval"]) == 2
    assert "lmms-eval is not installed" in capsys.readouterr().err
