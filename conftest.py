"""What every test gets: a seed, two threads, no network, drawn pictures, tiny configs.

Unusual: torch is touched only when a test has imported it, so tests of the judge alone start at once.
Sockets reach loopback only; a test that goes further fails with NetworkBlocked instead of hanging.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 20250930
WORKER = "PYTEST_XDIST_WORKER" in os.environ
THREADS = 1 if WORKER else 2
if WORKER:  # one process a core: neither it nor what it starts takes a second one
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))


class NetworkBlocked(RuntimeError):
    """A test tried to leave this machine."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu (tests marked gpu are skipped), cuda, cuda:1, ...")


def pytest_configure(config: pytest.Config) -> None:
    # read by the OpenMP of this process and of every child that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    config.add_cleanup(_loopback_only())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reason = _why_no_gpu(config.getoption("--device"))
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu(device: str) -> str | None:
    if not device.startswith("cuda"):
        return f"needs a GPU, and the tests run with --device {device}; pass --device cuda"
    import torch

    return None if torch.cuda.is_available() else f"--device {device}: torch sees no CUDA device here"


def _loopback_only() -> Callable[[], None]:
    """Let this process's sockets reach loopback and Unix sockets only; the result undoes it."""
    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
    real_getaddrinfo = socket.getaddrinfo

    def refuse(host: object) -> None:
        if not _is_loopback(host):
            raise NetworkBlocked(f"tests reach this machine only, not {host!r}: serve it on 127.0.0.1")

    def guard(name: str):
        def method(self, *arguments):
            # (host, port) comes last in all three; a Unix socket's address is a path
            if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(arguments[-1], tuple):
                refuse(arguments[-1][0])
            return real[name](self, *arguments)

        return method

    def getaddrinfo(host, *arguments, **options):
        refuse(host)
        return real_getaddrinfo(host, *arguments, **options)

    def undo() -> None:
        for name, method in real.items():
            setattr(socket.socket, name, method)
        socket.getaddrinfo = real_getaddrinfo

    for name in real:
        setattr(socket.socket, name, guard(name))
    socket.getaddrinfo = getaddrinfo
    return undo


def _is_loopback(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host is None or host in ("", "localhost"):  # what bind and getaddrinfo take for "here"
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(SEED)
        torch.set_num_threads(THREADS)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of --device."""
    return request.config.getoption("--device")


@pytest.fixture
def tiny_config():
    """VLMConfig of the preset `tiny`: two or three layers, byte tokenizer, nothing to download."""
    from nanovlm import preset

    return preset("tiny")


@pytest.fixture
def byte_tokenizer(tiny_config):
    """The tokenizer of `tiny_config`, made in memory: one token a byte, and the special tokens."""
    from nanovlm import get_tokenizer

    return get_tokenizer(tiny_config)


@pytest.fixture
def picture() -> Callable[..., Image]:
    """picture(width=96, height=64, mode="RGB", seed=0) -> a PIL picture, the same for the same arguments."""
    return draw


@pytest.fixture
def picture_file(tmp_path: Path) -> Iterator[Path]:
    """A drawn picture as a PNG file."""
    path = tmp_path / "picture.png"
    draw().save(path)
    return path


@pytest.fixture(scope="session")
def trained_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the preset `tiny` on drawings, trained as a newcomer would, once a session.

    It takes minutes: for tests marked slow. Beside the checkpoint lie `printed.txt`, what the command printed,
    and `cpu_s.txt`, the seconds of processor time that it took.
    """
    shared = tmp_path_factory.getbasetemp()
    if WORKER:
        shared = shared.parent  # each worker is a session of its own: the first one trains, the others wait
    run = shared / "trained" / "tiny"
    with open(shared / "trained.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (run / "cpu_s.txt").exists():
            _train(run)
    return run


def _train(run: Path) -> None:
    words = "-m nanovlm train --use_preset tiny --train_dataset_path synthetic --run_name".split()
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    before = os.times()
    done = subprocess.run(
        [sys.executable, *words, run.name, "--output_dir", str(run.parent)],
        cwd=Path(__file__).parent,
        env=plain,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    (run / "printed.txt").write_text(done.stdout)
    (run / "cpu_s.txt").write_text(str(spent))


def draw(width: int = 96, height: int = 64, mode: str = "RGB", seed: int = 0) -> Image:
    """A gradient with shapes and strokes on it: edges, flat areas and every channel different.

    Modes that PIL cannot draw in directly (P, CMYK, I;16, ...) are converted from RGB; an alpha channel
    runs from clear to solid.
    """
    from PIL import Image, ImageDraw

    dice = random.Random(seed)
    across, down = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
    flat = Image.new("L", across.size, dice.randrange(40, 216))
    image = Image.merge("RGB", (across, down, flat)).resize((width, height))
    pen = ImageDraw.Draw(image)
    for shape in (pen.ellipse, pen.rectangle, pen.line):
        x0, x1 = sorted(dice.randrange(width) for _ in range(2))
        y0, y1 = sorted(dice.randrange(height) for _ in range(2))
        shape((x0, y0, x1, y1), fill=tuple(dice.randrange(256) for _ in range(3)))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize((width, height)))
    if mode == "I;16":  # 8-bit grey scaled to the full 16-bit range
        return image.convert("L").convert("I").point(lambda value: value * 257).convert("I;16")
    return image.convert(mode)
