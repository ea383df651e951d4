"""What surrounds the target: a scrubbed environment, a chosen interpreter, an untouched checkout."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from compat.child import protocol
from compat.process import Child, ChildFailed, CouldNotAsk, sandbox, scrubbed_environment
from compat.target import resolve
from tests.judge.trees import COMBO, MODEL, fingerprint, make_tree, put

SECRETS = {
    "HF_TOKEN": "s3cret",
    "HUGGING_FACE_HUB_TOKEN": "s3cret",
    "WANDB_API_KEY": "s3cret",
    "GITHUB_TOKEN": "s3cret",
    "AWS_SECRET_ACCESS_KEY": "s3cret",
    "OPENAI_API_KEY": "s3cret",
    "http_proxy": "http://s3cret",
    "HTTPS_PROXY": "http://s3cret",
    "ALL_PROXY": "socks://s3cret",
    "SSH_AUTH_SOCK": "/s3cret",
    "GPG_AGENT_INFO": "/s3cret",
    "NETRC": "/s3cret",
    "PIP_INDEX_URL": "http://s3cret",
    "LD_PRELOAD": "",
    "PYTHONSTARTUP": "/s3cret",
    "PYTHONHOME": "",
    "VIRTUAL_ENV": "/s3cret",
    "HF_HOME": "/s3cret",
    "XDG_CACHE_HOME": "/s3cret",
    "DBUS_SESSION_BUS_ADDRESS": "s3cret",
    "KUBECONFIG": "/s3cret",
}
TELL = """
import json, os, pathlib, sys
def listing(name):
    return sorted(str(p) for p in pathlib.Path(os.environ[name]).rglob('*') if p.is_file())
print('TOLD ' + json.dumps({
    'environment': dict(os.environ), 'cwd': os.getcwd(), 'path': sys.path, 'files': listing('HOME'),
    'modules': sorted(sys.modules), 'stdin': sys.stdin.read(), 'flags': sys.flags.dont_write_bytecode,
    'descriptors': sorted(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else [],
}))
"""


def told(child: Child) -> dict:
    line = next(line for line in child.output.splitlines() if line.startswith("TOLD "))
    return json.loads(line[5:])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(what the target saw while it was imported, its checkout before and after, the answers' hello)."""
    outer = pytest.MonkeyPatch()
    for name, value in SECRETS.items():
        outer.setenv(name, value)
    lent = tmp_path_factory.mktemp("lent")
    outer.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), str(lent), ""]))
    outer.setenv("OMP_NUM_THREADS", "2")
    tree = make_tree(
        tmp_path_factory.mktemp("process"),
        "main",
        {MODEL: [("import torch\n", TELL + "import torch\n")]},
        {"compat.py": "raise RuntimeError('the judge imported the module of a target')\n"},
    )
    before = fingerprint(tree)
    row = {"tokens": [-1, 40, 41], "images": [0], "labels": [-100, 41, -100]}
    try:
        with Child(resolve(str(tree))) as child:
            for question, parameters in {
                "forward": {"rows": [row]},
                "generate": {"rows": [row], "max_new_tokens": 2},
                "save_load": {"rows": [row]},
                "backbones": {},
                "data": {"turns": [[{"user": "a", "assistant": "b"}]]},
            }.items():
                child.ask(question, combo=COMBO, **parameters)
            facts = told(child)
            home = Path(facts["environment"]["HOME"])
            assert home.is_dir()
        yield {
            **facts,
            "tree": tree,
            "before": before,
            "after": fingerprint(tree),
            "hello": child.hello,
            "lent": lent,
            "home": home,
        }
    finally:
        outer.undo()


def test_no_token_proxy_or_agent_reaches_the_target(seen):
    assert "s3cret" not in json.dumps(seen["environment"])
    assert {"LD_PRELOAD", "PYTHONHOME", "SSH_AUTH_SOCK"}.isdisjoint(seen["environment"])


def test_home_and_caches_are_empty_and_gone_afterwards(seen):
    names = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR", "TORCH_HOME")
    assert all(Path(seen["environment"][name]).is_relative_to(seen["home"]) for name in names)
    assert seen["files"] == [] and not seen["home"].exists()


def test_offline_flags_are_set(seen):
    flags = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    assert [seen["environment"][name] for name in flags] == ["1"] * 4
    assert seen["environment"]["WANDB_MODE"] == "disabled"


def test_the_target_runs_in_its_checkout_and_leaves_it_as_it_was(seen):
    assert seen["cwd"] == str(seen["tree"]) and seen["path"][0] == str(seen["tree"])
    assert seen["after"] == seen["before"] and seen["flags"] == 1


def test_the_judge_lends_the_target_none_of_its_modules(seen):
    project = str(Path(__file__).parents[2])
    # An editable install puts the project on every interpreter's path; a .venv inside it is the target's to use.
    lent = [entry for entry in seen["path"] if Path(entry).is_relative_to(project)]
    assert not [entry for entry in lent if not Path(entry).is_relative_to(sys.prefix)]
    assert {"compat", "pytest", "rich", "protocol", "worker"}.isdisjoint(seen["modules"])
    assert str(seen["lent"]) in seen["path"]  # what else PYTHONPATH names is the user's wish
    assert seen["environment"]["PYTHONPATH"] == str(seen["lent"])


def test_nothing_but_the_pipes_is_open_and_stdin_is_empty(seen):
    assert seen["stdin"] == ""
    if not seen["descriptors"]:
        pytest.skip("this system has no /proc/self/fd to look into")
    # 0, 1, 2, a question and an answer pipe, and the folder just being listed
    assert len(seen["descriptors"]) <= 6


def test_hello_tells_the_versions_and_the_model(seen):
    hello = seen["hello"]
    assert hello["protocol"] == protocol.VERSION and hello["dialect"] == "upstream"
    assert hello["python"] == ".".join(map(str, sys.version_info[:3]))
    assert hello["model_class"] == "models.vision_language_model:VisionLanguageModel"
    assert hello["torch"] and hello["numpy"] and hello["platform"] and hello["device"] == "cpu"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ("", None),
        ("{ours}", None),
        ("{ours}/compat/..", None),
        ("{ours}:{other}", "{other}"),
        ("relative", "{cwd}/relative"),
        ("{ours}/tests:{other}:{ours}", "{ours}/tests:{other}"),
    ],
)
def test_pythonpath_without_the_judge_s_folder(tmp_path, monkeypatch, given, kept):
    names = {"ours": Path(__file__).parents[2].resolve(), "other": tmp_path, "cwd": Path.cwd().resolve()}
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given.format(**names))
    assert scrubbed_environment(tmp_path / "home").get("PYTHONPATH") == (kept and kept.format(**names))


# -- the interpreter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", ["/nowhere/python", "{folder}", "{file}"])
def test_an_interpreter_that_cannot_be_started_is_named(tmp_path, monkeypatch, python):
    put(tmp_path / "file", "no program")
    python = python.format(folder=tmp_path, file=tmp_path / "file")
    for mode in ("none", "sandbox"):
        monkeypatch.setenv("COMPAT_SANDBOX", mode)
        sandbox.cache_clear()
        with (
            Child(resolve(str(tmp_path)), python=python) as child,
            pytest.raises(CouldNotAsk, match="interpreter") as caught,
        ):
            child.ask("describe", combo=COMBO)
        assert python in str(caught.value) and "\n" not in str(caught.value)
    sandbox.cache_clear()


def test_an_interpreter_is_found_from_where_the_user_stands(tmp_path, monkeypatch):
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(sys.executable)
    (tmp_path / "fork").mkdir()
    monkeypatch.chdir(tmp_path)
    for python in ("venv/bin/python", Path(sys.executable).name):
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        with (
            Child(resolve("fork"), python=python) as child,
            pytest.raises(CouldNotAsk, match="this folder holds no nanoVLM"),
        ):
            child.ask("describe", combo=COMBO)


def test_an_interpreter_without_torch_is_told_so(tmp_path):
    """A bare interpreter: this one, without its site-packages."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    tree = make_tree(tmp_path, "main")
    with (
        Child(resolve(str(tree)), python=str(python)) as child,
        pytest.raises(CouldNotAsk, match="no module named 'torch'"),
    ):
        child.ask("describe", combo=COMBO)


@functools.cache
def other_interpreters() -> list[str]:
    """One interpreter of each other version: on PATH, or installed beside this one."""
    beside = [str(folder) for folder in Path(sys.base_prefix).parent.glob("*/bin")]
    found = []
    for minor in range(9, 16):
        for folder in [*os.environ["PATH"].split(os.pathsep), *beside] if minor != sys.version_info[1] else []:
            path = Path(folder) / f"python3.{minor}"
            if path.is_file() and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
                found.append(str(path))
                break
    return found


def test_the_child_speaks_the_syntax_of_older_and_newer_pythons():
    others = other_interpreters()
    if not others:
        pytest.skip("no other Python from 3.9 on is at hand")
    child = Path(protocol.__file__).parent
    check = (
        "import ast, pathlib, sys\nfor p in pathlib.Path(sys.argv[1]).rglob('*.py'): ast.parse(p.read_text('utf-8'))"
    )
    for python in others:
        done = subprocess.run([python, "-c", check, str(child)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{python}: {done.stderr}"


def test_another_interpreter_answers_for_itself(tmp_path):
    others = other_interpreters()
    if not others:
        pytest.skip("no other Python from 3.9 on is at hand")
    for python in others:
        # Without torch there, discovery still runs and says what is missing, in that interpreter's words.
        with Child(resolve(str(tmp_path)), python=python) as child, pytest.raises(CouldNotAsk) as caught:
            child.ask("describe", combo=COMBO)
        assert str(caught.value).startswith("this folder holds no nanoVLM-style model"), f"{python}: {caught.value}"


def test_a_closed_child_holds_nothing_open_and_is_not_started_again(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system has no /proc/self/fd to look into")
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    child = Child(resolve(str(tmp_path)))
    with pytest.raises(CouldNotAsk, match="this folder holds no nanoVLM"):
        child.ask("describe", combo=COMBO)
    child.close()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before
    with pytest.raises(CouldNotAsk, match="was ended"):
        child.ask("describe", combo=COMBO)
    assert child.starts == 1


# -- the sandbox ---------------------------------------------------------------------------------------------


def test_the_sandbox_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("COMPAT_SANDBOX", "none")
    assert sandbox.__wrapped__() == ()


def test_without_the_tools_there_is_no_sandbox(monkeypatch, tmp_path):
    monkeypatch.delenv("COMPAT_SANDBOX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sandbox.__wrapped__() == ()


def test_the_sandbox_passes_exit_codes_on_and_cuts_the_network(monkeypatch):
    monkeypatch.delenv("COMPAT_SANDBOX", raising=False)
    prefix = sandbox.__wrapped__()
    if not prefix:
        pytest.skip("neither bwrap nor unshare works here")
    done = subprocess.run([*prefix, sys.executable, "-c", "import sys; sys.exit(7)"], check=False)
    assert done.returncode == 7
    interfaces = "import socket; print([name for _, name in socket.if_nameindex()])"
    shown = subprocess.run(
        [*prefix, sys.executable, "-c", interfaces], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "['lo']"


LEAVES_A_CHILD = """
        import os, time
        if os.fork() == 0:
            while True:
                open({beat!r}, "a").write("x"); time.sleep(0.02)
        while not os.path.exists({beat!r}): time.sleep(0.02)
        os._exit(3)
"""


def test_without_a_sandbox_a_target_is_judged_and_its_children_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPAT_SANDBOX", "none")
    sandbox.cache_clear()
    row, beat = {"tokens": [-1, 40, 41], "images": [0]}, tmp_path / "beat"
    before = "        pick = likeliest"
    changes = {MODEL: [(before, LEAVES_A_CHILD.format(beat=str(beat)) + before)]}
    try:
        with Child(resolve(str(make_tree(tmp_path, "main", changes)))) as child:
            assert child.ask("forward", combo=COMBO, rows=[row])["logits.0"].shape == (2, 338)
            with pytest.raises(ChildFailed, match="ended with exit code 3 while answering 'generate'"):
                child.ask("generate", combo=COMBO, rows=[row], max_new_tokens=1)
            time.sleep(0.1)
            size = beat.stat().st_size
            time.sleep(0.3)
            assert beat.stat().st_size == size
    finally:
        sandbox.cache_clear()


# -- the protocol --------------------------------------------------------------------------------------------


def test_a_frame_comes_back_as_it_was_sent():
    nonce = bytes(range(16))
    frame = protocol.encode(nonce, {"a": [1, None, "ü"], "loss": float("nan")}, b"blob")
    got, json_bytes, blob_bytes = protocol.decode_header(frame[: protocol.HEADER.size], nonce)
    body = frame[protocol.HEADER.size :]
    assert got == nonce and blob_bytes == 4 and len(body) == json_bytes + blob_bytes
    assert json.loads(body[:json_bytes])["a"] == [1, None, "ü"] and body[json_bytes:] == b"blob"


@pytest.mark.parametrize(
    "header",
    [
        protocol.HEADER.pack(b"NVJ0", bytes(16), 2, 0),
        protocol.HEADER.pack(b"NVJ1", b"x" * 16, 2, 0),
        b"\n" * protocol.HEADER.size,
    ],
    ids=["another magic", "another nonce", "lines"],
)
def test_other_bytes_are_no_frame(header):
    with pytest.raises(protocol.ProtocolError, match="something other than the worker"):
        protocol.decode_header(header, bytes(16))


@pytest.mark.parametrize(
    "sizes", [(protocol.MAX_JSON_BYTES + 1, 0), (0, protocol.MAX_BLOB_BYTES + 1), (2**32 - 1, 2**64 - 1)]
)
def test_a_frame_beyond_the_limit_is_refused_from_its_header(sizes):
    with pytest.raises(protocol.ProtocolError, match="over the limit"):
        protocol.decode_header(protocol.HEADER.pack(b"NVJ1", bytes(16), *sizes), bytes(16))


def test_arrays_are_read_without_pickle(tmp_path):
    from compat.process import _arrays

    path = tmp_path / "evil.npz"
    np.savez(path, evil=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        _arrays(path.read_bytes())
