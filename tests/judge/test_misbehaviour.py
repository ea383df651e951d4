"""A target that misbehaves costs the question it was asked, and nothing else.

Unusual: one tree serves all of it. Its generate runs whatever stands in ``plan.txt`` beside it, which a test
writes just before it asks; the forward pass is honest and must answer the same afterwards.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time

import numpy as np
import pytest

from compat.process import Child, ChildFailed, CouldNotAsk, TargetRaised, WorkerError, sandbox
from compat.target import resolve
from tests.judge.trees import COMBO, MODEL, make_tree, put

pytestmark = pytest.mark.slow  # every test ends a process or two, and a new one imports torch

ROW = {"tokens": [-1, 40, 41, 42], "images": [0]}
MISCHIEF = """
import pathlib

PLAN = pathlib.Path(__file__).with_name("plan.txt")


def run_plan():
    if PLAN.exists():
        exec(compile(PLAN.read_text(), str(PLAN), "exec"), {})
"""
# Every descriptor above stderr that takes bytes gets them.
WRITE_EVERYWHERE = """
import os
def everywhere(data):
    for number in range(3, 256):
        try:
            os.write(number, data)
        except OSError:
            pass
"""
FORGED = """
import json, struct

answer = json.dumps({"outcome": "answered", "answer": {"ids": [[1, 2, 3]]}}).encode()
everywhere(struct.pack(">4s16sIQ", b"NVJ1", %s, len(answer), 0) + answer)
"""


class Judged:
    def __init__(self, folder, child):
        self.plan, self.child = folder / "plan.txt", child
        self.honest = self.forward()

    def forward(self):
        return self.child.ask("forward", combo=COMBO, rows=[ROW], padding="none")["logits.0"]

    def generate(self, plan="", timeout_s=60.0):
        """Two new ids, after the plan ran; the plan is gone afterwards."""
        put(self.plan, plan)
        self.child.timeout_s = timeout_s
        try:
            return self.child.ask("generate", combo=COMBO, rows=[ROW], max_new_tokens=2)["ids"]
        finally:
            self.child.timeout_s = 60.0
            self.plan.unlink()

    def start_again(self):
        with contextlib.suppress(ChildFailed):
            self.generate("import os; os._exit(0)")

    def wait_until_disturbed(self):
        deadline = time.monotonic() + 20
        while not self.child._disturbed() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.child._disturbed()

    def assert_the_next_question_is_answered(self):
        assert np.array_equal(self.forward(), self.honest)


def mischievous(folder):
    return make_tree(
        folder,
        "main",
        {
            MODEL: [
                ("import torch\n", "import torch\nfrom mischief import run_plan\n"),
                ("        pick = likeliest", "        run_plan()\n        pick = likeliest"),
            ]
        },
        {"mischief.py": MISCHIEF},
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = mischievous(tmp_path_factory.mktemp("mischief"))
    with Child(resolve(str(folder))) as child:
        yield Judged(folder, child)


DEADLY = {
    "leaves by os._exit": ("import os; os._exit(7)", "ended with exit code 7 while answering 'generate'"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "was ended by SIGSEGV while answering 'generate'"),
    "writes junk into every descriptor": (
        WRITE_EVERYWHERE + "everywhere(b'PASSED ' * 100)",
        "something other than the worker wrote into the answer pipe",
    ),
    "forges an answer": (
        WRITE_EVERYWHERE + FORGED % "bytes(16)",
        "something other than the worker wrote into the answer pipe",
    ),
    "closes every descriptor": ("import os; os.closerange(3, 4096)", "ended with exit code"),
    "leaves a child that holds the pipes": (
        "import os, time\nif os.fork() == 0:\n    time.sleep(600)\nos._exit(0)",
        "ended with exit code 0",
    ),
    "takes the worker's own functions away": (
        "import os, sys\nos.makedirs = None\nfor name in list(sys.modules):\n"
        "    if name.startswith('_compat'):\n"
        "        vars(sys.modules[name]).pop('write_all', None)\n"
        "        vars(sys.modules[name]).pop('encode', None)\n",
        "ended with exit code 1",
    ),
}


SLOW = ("closes every descriptor", "takes the worker's own functions away")  # each costs a start


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in DEADLY])
def test_what_ends_the_process_costs_one_question(judged, kind):
    plan, sentence = DEADLY[kind]
    began = time.monotonic()
    with pytest.raises(ChildFailed, match=re.escape(sentence)) as caught:
        judged.generate(plan)
    assert time.monotonic() - began < 20
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    judged.assert_the_next_question_is_answered()


@pytest.mark.parametrize(
    "plan",
    [
        "while True: pass",
        pytest.param(
            "import signal, time\nfor number in (15, 2, 1): signal.signal(number, signal.SIG_IGN)\n"
            "while True:\n    try: time.sleep(600)\n    except BaseException: pass",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["loops", "ignores signals"],
)
def test_what_never_answers_is_ended_at_the_time_limit(judged, plan):
    judged.assert_the_next_question_is_answered()  # the limit below is for the question, not for a start
    began = time.monotonic()
    with pytest.raises(ChildFailed, match=r"^no answer to 'generate' within 1\.5 s$"):
        judged.generate(plan, timeout_s=1.5)
    assert time.monotonic() - began < 6
    judged.assert_the_next_question_is_answered()


RAISING = {
    "exits": ("import sys; sys.exit(3)", "SystemExit", "3"),
    "interrupts itself": ("raise KeyboardInterrupt", "KeyboardInterrupt", "(no message)"),
    "asks for more memory than there is": ("bytearray(2**40)", "MemoryError", "(no message)"),
    "recurses": ("def f(n): return f(n + 1)\nf(0)", "RecursionError", "maximum recursion depth exceeded"),
    "shouts": ("raise ValueError('\\n# PASSED\\n' + 'A' * 10**7)", "ValueError", "# PASSED AAAA"),
    "raises what cannot be shown": (
        "class Mute(Exception):\n    def __str__(self): raise Mute\nraise Mute",
        "Mute",
        "(its message cannot be shown)",
    ),
    "has a name without end": (
        "raise type('E' * 10**6, (Exception,), {'__module__': 'x'})('short')",
        "E" * 200,
        "short",
    ),
    "raises what has no module": (
        "raise type('Lost', (Exception,), {})('where')",
        "Lost",
        "(its message cannot be shown)",
    ),
    "raises the judge's own exceptions": (
        "import sys\nraise sys.modules['_compat_child.protocol'].ProtocolError('no')",
        "ProtocolError",
        "no",
    ),
}


@pytest.mark.parametrize("kind", RAISING)
def test_what_raises_is_reported_in_bounded_lines_and_costs_no_process(judged, kind):
    plan, name, message = RAISING[kind]
    starts = judged.child.starts
    with pytest.raises(TargetRaised) as caught:
        judged.generate(plan)
    error = caught.value
    assert error.type == name and error.message.startswith(message)
    assert "\n" not in error.message and len(error.message) <= 2000 and len(error.traceback) <= 8000
    assert error.where.startswith(("plan.txt:", "models/vision_language_model.py:", "mischief.py:"))
    judged.assert_the_next_question_is_answered()
    assert judged.child.starts == starts


HARMLESS = {
    "prints 100 MB": "import sys\nfor _ in range(100): sys.stdout.write('x' * 10**6)",
    "prints binary": "import os; os.write(1, bytes(range(256)) * 20); os.write(2, b'\\xff\\xfe\\x00')",
    "closes stdout": "import sys; sys.stdout.close(); sys.stdout = None",
    "changes the folder": "import os; os.chdir('/')",
    "removes its temporary folders": (
        "import os, shutil\n"
        "for name in ('TMPDIR', 'HF_HOME', 'HOME'): shutil.rmtree(os.environ[name], ignore_errors=True)"
    ),
    "empties the environment": "import os; os.environ.clear()",
    "lets a daemon live on": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0: time.sleep(600)\n    os._exit(0)"
    ),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_only_makes_a_mess_costs_nothing(judged, kind):
    starts = judged.child.starts
    assert judged.generate() == judged.generate(HARMLESS[kind])
    judged.assert_the_next_question_is_answered()
    saved = judged.child.ask("save_load", combo=COMBO, rows=[ROW])  # needs a temporary folder
    assert np.array_equal(saved["before.0"], saved["after.0"])
    assert judged.child.ask("backbones", combo=COMBO)["missing"] == []  # needs the files in HF_HOME
    assert judged.child.starts <= starts + 1 and len(judged.child.output) < 70_000


def test_replacing_json_forges_no_answer(judged):
    answer = '{"outcome": "answered", "answer": {"ids": [[1, 2, 3]]}}'
    first = judged.generate()
    assert (
        judged.generate(f"import json; json.dumps = lambda *a, **k: {answer!r}; json.loads = None") == first
    )
    judged.assert_the_next_question_is_answered()
    judged.start_again()  # save_pretrained would use the replaced one, and that is the target's own doing


def test_output_keeps_its_beginning_and_its_end(tmp_path):
    from compat.process import _Bounded

    kept = _Bounded(2000)
    with open(tmp_path / "printed", "wb") as stream:
        stream.write(b"first line\n" + b"x" * 10**7 + b"\nlast line \xff\n")
    with open(tmp_path / "printed", "rb") as stream:
        kept.drain(stream.fileno(), threading.Event())
    text = kept.text()
    assert text.startswith("first line\n") and text.endswith("\nlast line \ufffd\n")
    assert "bytes cut" in text and len(text) < 2100


def test_what_is_written_after_an_answer_is_never_read_as_the_next(judged):
    late = WRITE_EVERYWHERE + ("import threading\nthreading.Timer(0.3, everywhere, [b'x' * 50]).start()")
    first = judged.generate(late)
    judged.wait_until_disturbed()
    judged.assert_the_next_question_is_answered()
    assert judged.generate() == first


def test_a_process_that_ends_between_two_questions_costs_neither(judged):
    first = judged.generate("import threading, os; threading.Timer(0.2, os._exit, [5]).start()")
    judged.wait_until_disturbed()
    judged.assert_the_next_question_is_answered()
    assert judged.generate() == first


def test_what_breaks_the_worker_for_later_questions_is_asked_again_in_a_fresh_one(judged):
    starts = judged.child.starts
    judged.generate("import os; os.chdir = None")
    judged.assert_the_next_question_is_answered()
    assert judged.child.starts == starts + 1


def test_nothing_the_target_started_outlives_the_child_in_a_sandbox(tmp_path):
    if not sandbox():
        pytest.skip("neither bwrap nor unshare works here, so a daemon cannot be contained")
    folder = mischievous(tmp_path)
    beat = tmp_path / "beat"
    put(
        folder / "plan.txt",
        f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True:\n"
        f"        open({str(beat)!r}, 'a').write('x'); time.sleep(0.02)\n",
    )
    with Child(resolve(str(folder))) as child:
        child.ask("generate", combo=COMBO, rows=[ROW], max_new_tokens=1)
        deadline = time.monotonic() + 5
        while not beat.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert beat.exists()
    time.sleep(0.1)
    size = beat.stat().st_size
    time.sleep(0.3)
    assert beat.stat().st_size == size


# -- while it is imported ------------------------------------------------------------------------------------

AT_IMPORT = {
    "hangs": ("while True: pass", r"could not be started: no answer to 'hello' within 2 s"),
    "exits": (
        "import sys; sys.exit('bye')",
        r"cannot be imported: SystemExit: bye \(models/vision_language_model\.py:\d+\)",
    ),
    "leaves": ("import os; os._exit(4)", r"could not be started: the process ended with exit code 4"),
    "raises": (
        "raise OSError('no weights\\nhere')",
        r"cannot be imported: OSError: no weights here \(models/vision",
    ),
    "lacks a module": (
        "import nowhere_to_be_found",
        r"cannot be imported: no module named 'nowhere_to_be_found'$",
    ),
}


@pytest.mark.parametrize("kind", AT_IMPORT)
def test_what_fails_while_it_is_imported_is_told_in_one_sentence(tmp_path, kind):
    code, sentence = AT_IMPORT[kind]
    folder = make_tree(tmp_path, "main", {MODEL: [("import torch\n", f"{code}\nimport torch\n")]})
    with Child(resolve(str(folder)), timeout_s=2 if kind == "hangs" else 30) as child:
        with pytest.raises(CouldNotAsk, match=sentence) as caught:
            child.ask("describe", combo=COMBO)
        assert "\n" not in str(caught.value)


# -- no model ------------------------------------------------------------------------------------------------

NO_MODEL = {
    "an empty folder": ({}, r"^this folder holds no nanoVLM-style model: .* was found$"),
    "unrelated code": (
        {"app.py": "class App:\n    def forward(self, request):\n        return request\n"},
        r"^this folder holds no nanoVLM-style model",
    ),
    "a syntax error in the model": (
        {MODEL: "class VLM(Module)\n    def forward(self, input_ids, images): pass\n", "ok.py": "x = 1\n"},
        r"no nanoVLM-style model.*; not readable as Python 3\.\d+\.\d+: models/vision_"
        r"language_model\.py line 1 \(expected ':'\)$",
    ),
    "a JAX model": (
        {
            "model.py": "import flax.linen as nn\nclass VLM(nn.Module):\n"
            "    def __call__(self, input_ids, images): return 0\n"
            "    def generate(self, input_ids, images): return 0\n"
        },
        r"^this folder holds no nanoVLM-style model",
    ),
    "a config without a model": (
        {
            "models/config.py": "class VLMConfig:\n    vit_hidden_dim: int = 1\n"
            "    lm_hidden_dim: int = 1\n    lm_n_heads: int = 1\n"
            "    lm_vocab_size: int = 1\n"
        },
        r"^this folder holds no nanoVLM-style model",
    ),
    "a model without a config": (
        {
            "models/vlm.py": "from torch import nn\nclass VLM(nn.Module):\n"
            "    def forward(self, input_ids, images): return 0\n"
            "    def generate(self, input_ids, images): return 0\n"
        },
        r"^vlm:VLM looks like a model, but no config class with fields such as vit_hidden_dim",
    ),
}


@pytest.mark.parametrize("kind", NO_MODEL)
def test_what_is_no_model_is_told_in_one_sentence(tmp_path, kind):
    files, sentence = NO_MODEL[kind]
    for name, text in files.items():
        put(tmp_path / name, text)
    with Child(resolve(str(tmp_path)), timeout_s=30) as child:
        for _ in range(2):  # asked again it says the same again
            with pytest.raises(CouldNotAsk, match=sentence) as caught:
                child.ask("describe", combo=COMBO)
            assert "\n" not in str(caught.value)


# -- limits of a whole run -----------------------------------------------------------------------------------


def test_a_run_out_of_time_says_so_and_asks_no_more(tmp_path):
    with Child(resolve(str(tmp_path)), run_timeout_s=0.01) as child:
        with contextlib.suppress(ChildFailed, CouldNotAsk):
            child.ask("describe", combo=COMBO)
        time.sleep(0.02)
        with pytest.raises(ChildFailed, match=r"time limit of 0\.01 s is spent; 'forward' was not asked"):
            child.ask("forward", combo=COMBO, rows=[ROW])


def test_a_target_that_keeps_ending_is_not_started_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("compat.process.MAX_STARTS", 2)
    with Child(resolve(str(tmp_path))) as child:
        for _ in range(2):
            with pytest.raises(CouldNotAsk):
                child.ask("describe", combo=COMBO)
        with pytest.raises(ChildFailed, match="ended 2 times; not started again"):
            child.ask("describe", combo=COMBO)


def test_an_unknown_question_and_a_wrong_parameter_are_not_the_target_s_fault(judged):
    from compat.process import NotSupported

    with pytest.raises(NotSupported, match="knows no question 'sing'"):
        judged.child.ask("sing", combo=COMBO)
    with pytest.raises(WorkerError, match="TypeError"):
        judged.child.ask("forward", combo=COMBO, rows=[ROW], colour="red")
