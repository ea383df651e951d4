"""This model as lmms-eval sees one: its base class's three methods, by the functions that evaluate here.

Unusual: the class is made when it is asked for, because its base class is lmms-eval's, an extra that a machine
need not have. A model is usable without being registered: ``simple_evaluate(model=wrap(model), tasks=[...])``; the
command line's ``--model nanovlm --model_args pretrained=DIR`` works after ``register()``.

Interface: lmms_eval.api.model.lmms, https://github.com/EvolvingLMMs-Lab/lmms-eval.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from PIL import Image

from nanovlm.errors import ConfigError, ImageError
from nanovlm.evaluate.asking import batch_of, log_likelihoods, say
from nanovlm.vlm import VisionLanguageModel

MAX_NEW_TOKENS = 100  # where a task does not say
IMAGE_MARK = "<image>"  # what some tasks write where a picture is; ours stand in front


def installed() -> bool:
    """Whether lmms-eval can be imported."""
    return importlib.util.find_spec("lmms_eval") is not None


@cache
def wrapper_class() -> Any:
    """A subclass of lmms-eval's ``lmms``. Raises ConfigError where it is not installed."""
    if not installed():
        raise ConfigError("lmms-eval is not installed: pip install 'nanovlm[lmms]'")
    from lmms_eval.api.model import lmms

    class NanoVLM(lmms):
        """pretrained: a folder, a repository or a model. Batches are padded on the left; answers are the likeliest."""

        is_simple = True

        def __init__(self, pretrained: Any, device: str = "auto", batch_size: int | str = 1, **unknown: Any) -> None:
            super().__init__()
            if unknown:
                raise ConfigError(f"nanovlm for lmms-eval has no argument {sorted(unknown)[0]!r}; "
                                  "it has pretrained, device, batch_size")  # fmt: skip
            self._model = _loaded(pretrained, device)
            self.batch_size_per_gpu = int(batch_size)

        @property
        def model(self) -> VisionLanguageModel:
            return self._model

        @property
        def config(self) -> Any:
            return self._model.cfg

        @property
        def tokenizer(self) -> Any:
            return self._model.tokenizer

        @property
        def device(self) -> Any:
            return self._model.MP.proj.weight.device

        @property
        def batch_size(self) -> int:
            return self.batch_size_per_gpu

        @property
        def max_length(self) -> int:
            return self._model.cfg.lm_max_position_embeddings

        @property
        def eot_token_id(self) -> int:
            return self._model.tokenizer.eos_token_id

        def tok_encode(self, string: str, **options: Any) -> list[int]:
            return self._model.tokenizer.encode(string, add_special_tokens=False)

        def tok_decode(self, tokens: Sequence[int]) -> str:
            return self._model.tokenizer.decode(tokens)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """An answer to each request (context, generation arguments, doc_to_visual, doc_id, task, split)."""
            found: list[str] = [""] * len(requests)
            asked = [request.args for request in requests]
            # those of one length in new tokens go together, long texts first: what does not fit is known at once
            groups: dict[int, list[int]] = {}
            for number, arguments in enumerate(request[1] for request in asked):
                groups.setdefault(int(arguments.get("max_new_tokens", MAX_NEW_TOKENS)), []).append(number)
            for longest, numbers in groups.items():
                numbers.sort(key=lambda number: -len(asked[number][0]))
                for first in range(0, len(numbers), self.batch_size):
                    part = numbers[first : first + self.batch_size]
                    texts, shown = [_text(asked[n][0]) for n in part], [self._visuals(*asked[n][2:]) for n in part]
                    answers = say(self._model, batch_of(self._model, texts, shown), longest)
                    for number, said in zip(part, answers, strict=True):
                        found[number] = _until(said, asked[number][1].get("until"))
                        self.cache_hook.add_partial("generate_until", asked[number][:2], found[number])
            return found

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """(log-probability, whether greedy would say it) of each continuation, its end included."""
            found: list[tuple[float, bool]] = []
            asked = [request.args for request in requests]
            for first in range(0, len(asked), self.batch_size):
                part = asked[first : first + self.batch_size]
                shown = [self._visuals(*request[2:]) for request in part]
                batch = batch_of(self._model, [_text(request[0]) for request in part], shown)
                targets = [[self._target(request[1], *request[3:])] for request in part]
                found += [scores[0] for scores in log_likelihoods(self._model, batch, targets)]
            return found

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise NotImplementedError("nanovlm answers one question at a time; leave tasks of several rounds out")

        def _document(self, doc_id: Any, task: str, split: str) -> Any:
            return self.task_dict[task][split][doc_id]

        def _visuals(self, visuals: Callable[[Any], Any], doc_id: Any, task: str, split: str) -> list[Image.Image]:
            pictures = list(visuals(self._document(doc_id, task, split)) or ())
            for each in pictures:
                if not isinstance(each, Image.Image):
                    raise ImageError(f"task {task}: a {type(each).__name__} to look at; nanovlm takes pictures alone")
            return pictures

        def _target(self, target: Any, doc_id: Any, task: str, split: str) -> str:
            return target if isinstance(target, str) else target(self._document(doc_id, task, split))

    return NanoVLM


def wrap(model: Any, batch_size: int = 1) -> Any:
    """A model for ``lmms_eval.evaluator.simple_evaluate(model=...)``."""
    return wrapper_class()(model, batch_size=batch_size)


def register() -> None:
    """Make ``--model nanovlm`` known to lmms-eval in this process."""
    cls = wrapper_class()
    from lmms_eval.api.registry import register_model

    register_model("nanovlm")(cls)


def scores(
    model: VisionLanguageModel, tasks: Sequence[str], limit: float | None = None, batch_size: int = 1, **options: Any
) -> dict[str, float]:
    """{task/metric: value} by lmms-eval, which downloads the tasks' data; options are ``simple_evaluate``'s."""
    cls = wrapper_class()
    from lmms_eval.evaluator import simple_evaluate

    training = model.training
    model.eval()
    try:
        found = simple_evaluate(
            model=cls(model, batch_size=batch_size), tasks=list(tasks), limit=limit, batch_size=batch_size,
            log_samples=False, **options,
        )  # fmt: skip
    finally:
        model.train(training)
    return numbers(found or {})


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of lmms-eval's results, as "task/metric"; filters and error bars are left out."""
    return {
        f"{task}/{metric.partition(',')[0]}": float(value)
        for task, metrics in found.get("results", {}).items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in metric
    }


def benchmark(tasks: str, limit: float | None, batch_size: int) -> Callable[[VisionLanguageModel], Mapping[str, float]]:
    """What training calls at every evaluation. Raises ConfigError where lmms-eval is not installed."""
    wrapper_class()
    names = [name for name in tasks.split(",") if name]
    return lambda model: {f"lmms_eval/{name}": value for name, value in scores(model, names, limit, batch_size).items()}


def _loaded(pretrained: Any, device: str) -> VisionLanguageModel:
    if not isinstance(pretrained, str | os.PathLike):
        return pretrained
    from nanovlm.commands import device_of

    return VisionLanguageModel.from_pretrained(pretrained).to(device_of(device)).eval()


def _text(context: str) -> str:
    return context.replace(IMAGE_MARK, "").strip()


def _until(said: str, until: Any) -> str:
    """Up to the first of the texts that end an answer."""
    for end in [until] if isinstance(until, str) else until or ():
        if end:
            said = said.split(end)[0]
    return said.strip()
