"""The behavioural lock: everything the judge can say of one model in one combo, one fact a line.

Unusual: a lock never fails because its target does. What the target raises, or does not have, is a fact at the
place where the answer would have been; only when the judge itself errs is there no lock. Facts hold no path,
no address and no time, so that two locks of one tree are the same bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

from compat.combo import Combo
from compat.process import Child, ChildFailed, NotSupported, TargetRaised, WorkerError
from compat.store import write_atomic

SCHEMA = 1
DIGITS = 9
LONGEST = 1024  # positions from which a row as long as the model allows takes minutes on a CPU
NEW_TOKENS = 12
COUNTED_TOKENS = 6  # of a generation whose FLOPs are counted: what is made anew each token shows in few
STEPS = 10
RATE = 0.1  # of plain SGD: the curve has to move in ten steps
IMAGE, IGNORED = -1, -100
HEADER = ("schema", "combo", "scale", "target", "commit", "dirty", "environment")

TEXTS = (
    "What is in this picture?",
    "Rows:\n\n12 of 345, 6.78 and  90",
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "Grüße aus Köln, naïve café",
    "日本語と emoji 🙂",
    " leading and trailing ",
)
CHATS = (
    [{"role": "user", "content": "What is this?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "How many windows?"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "And doors?"},
    ],
)
TURNS = (
    [{"user": "What is in the picture?", "assistant": "A small red house."}],
    [{"user": "How many windows?", "assistant": "Three."}, {"user": "And doors?", "assistant": "Only one door."}],
)
SAMPLING: dict[str, dict] = {
    "default": {},
    "top_k": {"top_k": 5, "top_p": 1.0, "temperature": 1.0},
    "top_p": {"top_k": 50, "top_p": 0.4, "temperature": 1.0},
    "temperature": {"top_k": 50, "top_p": 1.0, "temperature": 2.0},
    "repetition_penalty": {"top_k": 50, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.7},
}
DROPOUT = ("vit_dropout", "lm_dropout")
PICTURES = ((64, 64), (20, 20), (97, 60), (60, 97), (300, 200))


class NotALock(ValueError):
    """A file that is no lock, or one of another schema; the message says which."""


class LockFailed(Exception):
    """The judge itself erred, so there is no lock; the text is one sentence."""


# -- asking -----------------------------------------------------------------------------------------------


def make(child: Child, combo: Combo, scale: str = "tiny") -> dict:
    """Ask everything and return the lock. Raises CouldNotAsk, LockFailed."""
    asker = Asker(child, combo.as_dict(scale))
    asker.everything()
    target, hello = child.target, child.hello or {}
    facts = tidy(asker.facts, str(target.folder))
    return {
        "schema": SCHEMA,
        "combo": combo.name,
        "scale": scale,
        "target": target.label,
        "commit": target.commit,
        "dirty": target.dirty,
        "environment": {
            **{name: hello.get(name) for name in ("python", "torch", "transformers", "numpy", "device", "gpu")},
            "platform": machine(hello.get("platform") or ""),
        },
        "facts": dict(sorted(facts.items())),
    }


def limit_s(timeout_s: float, scale: str) -> float:
    """Seconds for all questions together: at full scale, ten minutes are less than a few passes take."""
    return max(600.0, timeout_s * (10 if scale == "tiny" else 100))


class Asker:
    """Asks one child the questions of a lock and collects what it says by path."""

    def __init__(self, child: Child, combo: dict):
        self.child, self.combo, self.began = child, combo, time.monotonic()
        self.facts: dict[str, object] = {}
        self.model: dict | None = None  # what `describe` says; None where there is no model to ask
        self.no_model: dict | None = None  # the fact that then stands for every answer

    def everything(self) -> None:
        self.section("train_config", "lock_train_config")
        self.section("script", "lock_scripts")
        answer = self.ask("describe")
        if isinstance(answer, Failed):
            self.no_model = answer.fact
        else:
            self.model = answer
        self.config()
        self.checkpoint()
        self.calls()
        self.data()
        self.numbers()
        self.training()
        self.cost()

    def ask(self, question: str, **parameters) -> dict | Failed:
        """The child's answer, or the fact that stands where it would have been."""
        if self.no_model is not None:
            return Failed(self.no_model)
        try:
            return self.child.ask(question, combo=self.combo, **parameters)
        except NotSupported as error:
            return Failed({"unsupported": str(error)})
        except TargetRaised as error:
            return Failed({"error": error.type, "message": error.message})
        except ChildFailed as error:
            if time.monotonic() - self.began >= self.child.run_timeout_s:  # our patience, no fact of the target
                raise LockFailed(f"no lock was made: {error}; --timeout gives it more time") from error
            return Failed({"error": "ChildFailed", "message": str(error)})
        except WorkerError as error:
            first = str(error).partition("\n")[0]
            raise LockFailed(f"the judge itself failed at '{question}', so no lock was made: {first}") from error

    def section(self, prefix: str, question: str, **parameters) -> None:
        """Facts of one question below ``prefix``; its failure stands at ``prefix`` itself."""
        self.keep(prefix, self.ask(question, **parameters))

    def keep(self, prefix: str, answer: dict | Failed) -> None:
        if isinstance(answer, Failed):
            self.facts[prefix] = answer.fact
            return
        for path, value in answer["facts"].items():
            joined = prefix + path if path.startswith(".") or not path else f"{prefix}.{path}"
            self.facts[joined if prefix else path] = value

    # -- rows ---------------------------------------------------------------------------------------------

    def row(self, length: int = 10, seed: int = 0, images: tuple[int, ...] = (0,)) -> dict:
        """A probe row of ``length`` text tokens after its pictures, every next token its label."""
        ids = self.model["text_ids"] if self.model else []
        text = [ids[(31 * i * i + 17 * i + 101 * seed + 7) % len(ids)] for i in range(length)] if ids else []
        labels = [IGNORED] * len(images) + text[1:] + [IGNORED]
        return {"tokens": [IMAGE] * len(images) + text, "images": list(images), "labels": labels}

    def batch(self) -> list[dict]:
        return [self.row(10), self.row(7, seed=1, images=(1,))]

    def filled(self, beyond: int = 0) -> dict:
        """A row that fills the model's positions, or goes ``beyond`` them. Raises NotSupported for a large model."""
        positions = self.model["max_positions"] if self.model else 0
        if positions > LONGEST:
            raise NotSupported(f"{positions} positions take too long here; rows of up to {LONGEST} are tried")
        return self.row(positions - (self.model["image_tokens"] if self.model else 0) + beyond)

    # -- sections -----------------------------------------------------------------------------------------

    def config(self) -> None:
        self.section("config", "lock_config")
        try:
            long = self.filled()
        except NotSupported:
            long = self.row()
        self.section("config.derived.without", "lock_hub_fields")
        self.section("config.derived.changed", "lock_hub_fields", how="changed")
        self.section("config.effect", "lock_effects", rows=[self.row()], long_row=long)

    def checkpoint(self) -> None:
        answer = self.ask("state_dict")
        if not isinstance(answer, Failed):
            said = ("shape", "dtype", "persistent", "trainable", "tied_to")
            keys = answer["keys"].items()
            answer = {"facts": {key: {name: entry[name] for name in said} for key, entry in keys}}
        self.keep("state", answer)
        answer = self.ask("lock_saved")
        self.keep("saved" if isinstance(answer, Failed) else "", answer)
        self.section("init", "lock_init")
        answer = self.ask("backbones")
        if not isinstance(answer, Failed):
            answer = {"facts": {"": {"loaded": answer["loaded"], "missing": answer["missing"]}}}
        self.keep("backbones", answer)
        self.section("backbone_weights", "lock_backbone_weights")
        self.section("backbone_weights_resized", "lock_backbone_weights", larger=True)

    def calls(self) -> None:
        answer = self.ask("lock_rates")
        self.keep("train_config.rates" if isinstance(answer, Failed) else "train_config", answer)
        self.section("signature", "lock_signatures")
        self.section("refusals", "lock_refusals", rows=[self.row()])
        for method in ("forward", "forward_with_targets", "generate"):
            answer = self.ask("lock_returns", rows=self.batch(), method=method)
            if isinstance(answer, Failed) and "unsupported" in answer.fact:  # rows of one length need no mask
                answer = self.ask("lock_returns", rows=[self.row(10), self.row(10, seed=1)], method=method)
            self.keep(f"returns.{method}" if isinstance(answer, Failed) else "returns", answer)

    def data(self) -> None:
        self.section("tokenizer.special", "lock_special")
        for number, text in enumerate(TEXTS):
            self.ids(f"tokenizer.text.{number}", self.ask("lock_text", text=text))
        for number, messages in enumerate(CHATS):
            self.ids(f"tokenizer.chat.{number}", self.ask("lock_chat", messages=messages))
        for number, (width, height) in enumerate(PICTURES):
            self.section(f"processor.{width}x{height}", "lock_picture", number=number, size=[width, height])
        answer = self.ask("data", turns=[list(turns) for turns in TURNS], pictures=1)
        if not isinstance(answer, Failed):
            names = ("supervised", "labels_text", "shift", "image_tokens", "features")
            rows = range(len(answer["supervised"]))
            answer = {"facts": {str(row): {name: answer[name][row] for name in names} for row in rows}}
        self.keep("data", answer)
        answer = self.ask("data", turns=[list(turns) for turns in TURNS], pictures=1, packed=True)
        if not isinstance(answer, Failed):
            answer = {"facts": {str(row): packed_facts(answer, row) for row in range(answer["rows"])}}
        self.keep("packed", answer)

    def ids(self, path: str, answer: dict | Failed) -> None:
        self.facts[path] = answer.fact if isinstance(answer, Failed) else answer["facts"]["ids"]

    def numbers(self) -> None:
        one, text, two = [self.row()], [self.row(images=())], [self.row(images=(0, 1))]
        cases: dict[str, dict] = {
            "fp32": {"rows": one},
            "bf16": {"rows": one, "change": "bf16"},
            "left_padded": {"rows": self.batch(), "padding": "left"},
            "right_padded": {"rows": self.batch(), "padding": "right"},
            "text_only": {"rows": text},
            "two_images": {"rows": two},
            "small_embeddings": {"rows": one, "change": "small_embeddings"},
            "train_mode": {"rows": one, "change": "train_mode"},
            "larger": {"rows": one, "change": "larger"},
            # one picture: some versions take no more of them in a row
            "packed": {"rows": [self.row(10), self.row(7, seed=1, images=())], "change": "packed"},
        }
        for case, parameters in cases.items():
            self.number(case, self.ask("lock_numbers", **parameters))
        for case, beyond in (("longest", 0), ("past_longest", 8)):
            try:
                rows = [self.filled(beyond)]
            except NotSupported as error:
                self.number(case, Failed({"unsupported": str(error)}))
            else:
                self.number(case, self.ask("lock_numbers", rows=rows))
                if not beyond:
                    self.number("bf16_longest", self.ask("lock_numbers", rows=rows, change="bf16"))
        self.number("wide_picture", self.ask("lock_wide_picture"))
        answer = self.ask("lock_choices", rows=one)
        self.keep("numbers.choices" if isinstance(answer, Failed) else "numbers", answer)
        cases = {
            "image": {"rows": one},
            "uncached": {"rows": one, "cached": False},
            "text_only": {"rows": text},
            "left_padded": {"rows": self.batch()},
            "right_padded": {"rows": self.batch(), "padding": "right"},
        }
        for case, parameters in cases.items():
            self.section(f"greedy.{case}", "lock_greedy", max_new_tokens=NEW_TOKENS, **parameters)
        self.section("greedy.ending", "lock_ending", rows=self.batch(), max_new_tokens=NEW_TOKENS)
        self.section("greedy.stopped", "lock_stopped", rows=self.batch(), max_new_tokens=NEW_TOKENS)
        for case, options in SAMPLING.items():
            self.section(f"sampling.{case}", "lock_sampling", rows=one, options=options)
        self.section("sampling.bf16", "lock_sampling", rows=one, options={}, bf16=True)
        for field in DROPOUT:
            self.section(f"dropout.{field}", "lock_dropout", rows=one, field=field)
        self.section("activation", "lock_activations", rows=one)

    def number(self, case: str, answer: dict | Failed) -> None:
        if isinstance(answer, Failed) and "error" in answer.fact:
            self.facts[f"numbers.{case}.error"] = answer.fact["error"]
        else:
            self.keep(f"numbers.{case}", answer)

    def training(self) -> None:
        answer = self.ask("gradients", rows=self.batch())
        if isinstance(answer, Failed) and "unsupported" in answer.fact:
            answer = self.ask("gradients", rows=[self.row()])
        self.keep("gradient", answer if isinstance(answer, Failed) else {"facts": answer["grads"]})
        answer = self.ask("train", rows=[self.row()], steps=STEPS, lr=RATE, optimizer="sgd")
        self.keep("loss_curve", answer if isinstance(answer, Failed) else {"facts": {"": answer["losses"]}})

    def cost(self) -> None:
        rows = [self.row(10), self.row(10, seed=1, images=(1,))]  # of one length: forward may know no mask
        self.facts["cost.parameters"] = self.model["parameters"] if self.model else self.no_model
        answer = self.ask("lock_flops", rows=rows)
        self.keep("cost.flops" if isinstance(answer, Failed) else "cost", answer)
        answer = self.ask("lock_generation_flops", rows=rows[:1], max_new_tokens=COUNTED_TOKENS)
        self.keep("cost.flops.generate" if isinstance(answer, Failed) else "cost", answer)
        for step in ("forward", "train"):
            answer = self.ask("memory", rows=rows, step=step)
            self.facts[f"cost.peak.{step}"] = answer.fact if isinstance(answer, Failed) else answer["peak_bytes"]


def packed_facts(answer: dict, row: int) -> dict:
    """What a pack holds; which document each position is of, as [value of the mask, how often in a row]."""
    mask = answer["attention_mask"][row] if answer["attention_mask"] else []
    runs = [[value, len(list(group))] for value, group in itertools.groupby(mask)]
    names = ("supervised", "labels_text", "image_tokens", "features")
    return {**{name: answer[name][row] for name in names}, "documents": runs}


class Failed:
    """What stands in a lock where an answer would have been."""

    def __init__(self, fact: dict):
        self.fact = fact


# -- facts ------------------------------------------------------------------------------------------------

# An address in a repr, and the private home each child gets, differ from run to run.
_VARYING = (
    ("0x", re.compile(r"0x[0-9a-fA-F]{6,}"), "0x"),
    ("compat-home-", re.compile(r"[^\s'\"]*compat-home-[^/\s'\"]*"), "~"),
)


def tidy(value, folder: str):
    """A JSON value without what is no fact: digits beyond the ninth, paths of this machine, addresses.

    NaN and infinities become the strings "nan", "inf" and "-inf".
    """
    if isinstance(value, dict):
        return {str(tidy(name, folder)): tidy(item, folder) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(item, folder) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, str):
        value = value.replace(folder, ".")
        for mark, pattern, instead in _VARYING:
            value = pattern.sub(instead, value) if mark in value else value
    return value


def machine(platform: str) -> str:
    """ "Linux x86_64" of a longer platform string: a kernel's version says nothing about a model."""
    found = re.search(r"x86_64|amd64|aarch64|arm64", platform, re.IGNORECASE)
    return " ".join([platform.partition("-")[0], *([found[0]] if found else [])])


def summary(lock: dict) -> str:
    """ "697 facts of siglip2-smollm2 (tiny), 3 of them that the target lacks something, 1 that it raises"."""
    facts = lock["facts"]
    lacking = sum(isinstance(value, dict) and "unsupported" in value for value in facts.values())
    raising = sum(isinstance(value, dict) and "error" in value for value in facts.values())
    raising += sum(path.startswith("numbers.") and path.endswith(".error") for path in facts)
    return (
        f"{len(facts)} facts of {lock['combo']} ({lock['scale']}), {lacking} of them that the target lacks something, "
        f"{raising} that it raises"
    )


# -- files ------------------------------------------------------------------------------------------------


def dumps(lock: dict) -> str:
    """A lock as text: facts sorted by path, one a line."""
    head = [f'"{name}": {_line(lock[name])},' for name in HEADER]
    return "\n".join(["{", *head, '"facts": {', ",\n".join(_facts(lock)), "}", "}"]) + "\n"


def _facts(lock: dict) -> Iterator[str]:
    for path, value in sorted(lock["facts"].items()):
        yield f"{_line(path)}: {_line(value)}"


def _line(value) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write(path: Path, lock: dict) -> None:
    """Put the lock at ``path`` in one step. Raises OSError."""
    write_atomic(Path(path), dumps(lock).encode("utf-8"))


def read(path: Path) -> dict:
    """The lock in a file. Raises OSError when there is none, NotALock when it holds something else."""
    try:
        lock = json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotALock(f"{path} is no lock: {error}") from None
    return checked(lock, path)


def checked(lock: object, path: Path | str) -> dict:
    """``lock``, which came from ``path``, if it is one. Raises NotALock."""
    if not isinstance(lock, dict) or not isinstance(lock.get("facts"), dict):
        raise NotALock(f"{path} is no lock: it has no facts")
    if lock.get("schema") != SCHEMA:
        raise NotALock(
            f"{path} is a lock of schema {lock.get('schema')!r}, this compat reads {SCHEMA}; make it again: compat lock"
        )
    missing = [name for name in HEADER if name not in lock]
    if missing:
        raise NotALock(f"{path} is no lock: it does not say {', '.join(missing)}")
    return lock
