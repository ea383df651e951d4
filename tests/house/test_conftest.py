"""The conftest at the root keeps what it promises to every test."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import THREADS, NetworkBlocked, draw
from tests.house.tree import ROOT

ELSEWHERE = "192.0.2.1"  # TEST-NET-1, RFC 5737: nobody's address


@pytest.mark.parametrize(
    "leave",
    [
        lambda: socket.create_connection((ELSEWHERE, 80), timeout=1),
        lambda: socket.socket().connect_ex((ELSEWHERE, 80)),
        lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", (ELSEWHERE, 53)),
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
        lambda: asyncio.run(asyncio.open_connection(ELSEWHERE, 80)),
    ],
    ids=["create_connection", "connect_ex", "sendto", "getaddrinfo", "ipv6", "asyncio"],
)
def test_a_test_that_leaves_the_machine_fails_by_name(leave):
    with pytest.raises(NetworkBlocked, match="this machine only"):
        leave()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_loopback_is_reached(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection((host, server.getsockname()[1]), timeout=5):
            peer, _ = server.accept()
            peer.close()


def test_unix_sockets_are_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a short name: a socket's path has about 100 bytes
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("s")
        server.listen()
        client.connect("s")


@pytest.fixture(scope="module")
def torch():
    """Imported before the test's seed is set, as by a module that imports it at its top."""
    import torch

    return torch


DRAWN: list[tuple] = []


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_draws_the_same_numbers(torch, turn):
    DRAWN.append((random.random(), torch.rand(()).item(), torch.get_num_threads()))
    assert DRAWN[0] == DRAWN[-1]
    assert DRAWN[0][2] == THREADS


def test_pictures_are_the_same_for_the_same_arguments_and_differ_by_seed(picture):
    assert picture(40, 30).tobytes() == draw(40, 30).tobytes()
    assert picture(40, 30, seed=1).tobytes() != picture(40, 30, seed=2).tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "1"])
def test_a_picture_has_the_mode_and_size_asked_for(picture, mode):
    drawn = picture(31, 17, mode)
    assert (drawn.mode, drawn.size) == (mode, (31, 17))
    assert len(set(drawn.tobytes())) > 1, "not one flat colour"


def test_the_picture_file_opens_as_a_picture(picture_file):
    from PIL import Image

    with Image.open(picture_file) as image:
        assert image.size == draw().size


def test_the_tiny_config_and_its_tokenizer_belong_together(tiny_config, byte_tokenizer):
    assert byte_tokenizer.image_token_id < tiny_config.lm_vocab_size
    assert byte_tokenizer.decode(byte_tokenizer.encode("grün, 绿")) == "grün, 绿"


def inner(folder: Path, body: str, *options: str) -> subprocess.CompletedProcess:
    """pytest, on its own, over one test file under the project's conftest and settings."""
    (folder / "test_inner.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    command += ["-p", "conftest", "-p", "no:cacheprovider", "-rs", *options, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_run_that_needs_no_torch_does_not_load_it(tmp_path):
    body = "import sys\ndef test_torch_is_absent():\n    assert 'torch' not in sys.modules\n"
    done = inner(tmp_path, body)
    assert "1 passed" in done.stdout, done.stdout


def test_gpu_tests_are_skipped_with_the_reason_and_slow_ones_left_out(tmp_path):
    body = (
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_on_gpu():\n    raise SystemExit('ran')\n"
        "@pytest.mark.slow\ndef test_slow():\n    raise SystemExit('ran')\n"
        "def test_plain(device):\n    assert device == 'cpu'\n"
    )
    done = inner(tmp_path, body)
    assert "1 passed, 1 skipped, 1 deselected" in done.stdout, done.stdout
    assert "pass --device cuda" in done.stdout


def test_a_misspelt_marker_is_an_error(tmp_path):
    done = inner(tmp_path, "import pytest\n@pytest.mark.sloow\ndef test_it():\n    pass\n")
    assert done.returncode != 0 and "'sloow' not found" in done.stdout
