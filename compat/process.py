"""The child process a target lives in: start it, ask it, survive it.

Unusual: the child is launched by path in any interpreter, in a scrubbed environment and its own session,
and is replaced after every crash, hang or forged answer, so that one bad question costs one check.
Scrubbing is hygiene, no sandbox: running a fork runs its code.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from compat.child import protocol
from compat.target import Target

WORKER = Path(__file__).parent / "child" / "worker.py"
OUTPUT_BYTES = 64 * 1024  # of the target's own prints: the first and the last half are kept
MEMORY_BYTES = {"tiny": 6 * 2**30, "full": 0}  # 0: no limit; full-size models need what they need
MAX_STARTS = 25


class TargetRaised(Exception):
    """The target's own code raised. ``type``, ``message``, ``where`` (file:line), ``traceback``."""

    def __init__(self, type: str, message: str, where: str = "", traceback: str = ""):
        self.type, self.message, self.where, self.traceback = type, message, where, traceback
        super().__init__(f"{type}: {message}" + (f" ({where})" if where else ""))


class ChildFailed(Exception):
    """The child died, hung, ran out of memory or sent something that is no answer."""


class NotSupported(Exception):
    """The target has no such thing; the text is the reason of the skip."""


class CouldNotAsk(Exception):
    """Nothing can be asked of this target at all; the text is one sentence."""


class WorkerError(Exception):
    """The judge's own code in the child failed: ours, not the target's."""


class Child:
    """One target in one child process, started at the first question and again after a failure.

    timeout_s bounds a question, run_timeout_s all of them together. Not safe to share between threads.
    """

    def __init__(
        self,
        target: Target,
        python: str | None = None,
        timeout_s: float = 60.0,
        run_timeout_s: float = 600.0,
        device: str = "cpu",
        scale: str = "tiny",
    ):
        self.target, self.device, self.scale = target, device, scale
        self.python = python or sys.executable
        self.timeout_s, self.run_timeout_s = timeout_s, run_timeout_s
        self.hello: dict | None = None
        self.starts = 0
        self._deadline: float | None = None
        self._closed, self._stopping = False, threading.Lock()
        self._process: subprocess.Popen | None = None
        self._printed = _Bounded(OUTPUT_BYTES)
        self._home: tempfile.TemporaryDirectory | None = None

    @property
    def output(self) -> str:
        """What the target printed so far, its middle cut when it is long."""
        return self._printed.text()

    def ask(self, question: str, combo: dict | None = None, **parameters) -> dict:
        """The child's answer; arrays come as numpy arrays.

        Raises TargetRaised, ChildFailed, NotSupported, CouldNotAsk (see each) and WorkerError.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + self.run_timeout_s
        if time.monotonic() > self._deadline:
            raise ChildFailed(
                f"the run's time limit of {self.run_timeout_s:g} s is spent; '{question}' was not asked"
            )
        document = {"combo": combo, "parameters": parameters}
        if self._process is not None and self._disturbed():
            self._stop()
        fresh = not self._ready
        if fresh:
            self._start()
        try:
            return self._exchange(question, document)
        except WorkerError:
            self._stop()
            if fresh:
                raise
        # Something an earlier answer left behind may have broken the worker: a fresh one has the last word.
        self._start()
        return self._exchange(question, document)

    def close(self) -> None:
        """End the child and everything it started that can be found; no question starts it again."""
        self._closed = True
        self._stop()
        if self._home is not None:
            with contextlib.suppress(OSError):
                self._home.cleanup()
            self._home = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def _ready(self) -> bool:
        """Whether a process waits for questions about the target."""
        return self._process is not None

    def _disturbed(self) -> bool:
        """Whether the child ended, or wrote more than its answers, since the last of them."""
        return self._process.poll() is not None or bool(select.select([self._from], [], [], 0)[0])

    def _start(self) -> None:
        if self._closed:  # by another thread, while this one had a question left
            raise CouldNotAsk("the target's process was ended")
        if self.starts >= MAX_STARTS:
            raise ChildFailed(f"the process ended {self.starts} times; not started again")
        self.starts += 1
        self._launch()
        self._greet()

    def _launch(self) -> None:
        """Start the worker's process; it has imported nothing yet."""
        if self._home is None:
            self._home = tempfile.TemporaryDirectory(prefix="compat-home-")
        # Found from where the user stands: the child starts in the target's folder. A venv's link stays one.
        python = shutil.which(self.python)
        if python is None:
            raise CouldNotAsk(f"the interpreter {self.python} cannot be started: there is no such program")
        question_read, question_write = os.pipe()
        answer_read, answer_write = os.pipe()
        command = [
            *sandbox(),
            os.path.abspath(python),
            "-B",
            str(WORKER),
            str(question_read),
            str(answer_write),
        ]
        environment = scrubbed_environment(Path(self._home.name))
        if self.scale == "tiny":  # waking a second thread costs a tiny model more than half of its work
            environment["OMP_NUM_THREADS"] = "1"
        try:
            self._process = subprocess.Popen(
                command,
                cwd=self.target.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(question_read, answer_write),
                start_new_session=True,
            )
        except OSError as error:
            os.close(question_write), os.close(answer_read)
            raise CouldNotAsk(f"the interpreter {self.python} cannot be started: {error.strerror}") from None
        finally:
            os.close(question_read), os.close(answer_write)
        os.set_blocking(question_write, False)
        os.set_blocking(answer_read, False)
        self._to, self._from = question_write, answer_read
        self._ended = threading.Event()
        arguments = (self._process.stdout.fileno(), self._ended)
        self._drain = threading.Thread(target=self._printed.drain, args=arguments, daemon=True)
        self._drain.start()

    def _greet(self) -> None:
        """Let the process import the target."""
        try:
            self.hello = self._exchange(
                "hello",
                {
                    "target": self.target.as_dict(),
                    "device": self.device,
                    "memory_bytes": MEMORY_BYTES[self.scale],
                },
            )
        except TargetRaised as error:
            self._stop()
            raise CouldNotAsk(f"the target cannot be imported: {error}") from None
        except ChildFailed as error:
            raise CouldNotAsk(f"the target could not be started: {error}") from None
        except (CouldNotAsk, WorkerError):
            self._stop()
            raise

    def _exchange(self, question: str, document: dict) -> dict:
        nonce = secrets.token_bytes(16)
        limit = min(self.timeout_s, max(0.1, self._deadline - time.monotonic()))
        try:
            frame = protocol.encode(nonce, {"question": question, **document})
            until = time.monotonic() + limit
            self._write(frame, until)
            header = self._read(protocol.HEADER.size, until)
            _, json_bytes, blob_bytes = protocol.decode_header(header, nonce)
            reply = json.loads(self._read(json_bytes, until))
            blob = self._read(blob_bytes, until)
            arrays = _arrays(blob)
            outcome = reply["outcome"]
        except _Late:
            self._stop()
            raise ChildFailed(f"no answer to '{question}' within {limit:g} s") from None
        except (_Ended, BrokenPipeError):
            raise ChildFailed(f"the process {self._how_it_ended()} while answering '{question}'") from None
        except (protocol.ProtocolError, ValueError, KeyError, TypeError, OSError) as error:
            self._stop()
            text = str(error) if isinstance(error, protocol.ProtocolError) else "the answer cannot be read"
            raise ChildFailed(f"{text} (while answering '{question}')") from None
        except BaseException:  # Ctrl-C: a half-read answer must not meet the next question
            self._stop()
            raise
        if outcome == protocol.ANSWERED:
            return reply["answer"] | arrays
        if outcome == protocol.RAISED:
            raise TargetRaised(reply["type"], reply["message"], reply["where"], reply["traceback"])
        kind = {protocol.UNSUPPORTED: NotSupported, protocol.UNASKABLE: CouldNotAsk}.get(outcome, WorkerError)
        raise kind(reply["message"])

    def _send(self, question: str) -> None:
        """Ask what nobody answers."""
        frame = protocol.encode(secrets.token_bytes(16), {"question": question})
        with contextlib.suppress(_Late, OSError):
            self._write(frame, time.monotonic() + self.timeout_s)

    def _write(self, data: bytes, until: float) -> None:
        view = memoryview(data)
        while view:
            _, ready, _ = select.select([], [self._to], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise _Late
            view = view[os.write(self._to, view[: 64 * 1024]) :]

    def _read(self, size: int, until: float) -> bytes:
        chunks = []
        while size:
            ready, _, _ = select.select([self._from], [], [], min(0.25, max(0.0, until - time.monotonic())))
            if ready:
                chunk = os.read(self._from, min(size, 2**20))
                if not chunk:
                    raise _Ended
                chunks.append(chunk)
                size -= len(chunk)
            elif self._process.poll() is not None:  # a grandchild may still hold the pipe open
                raise _Ended
            elif time.monotonic() >= until:
                raise _Late
        return b"".join(chunks)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self._stop()
        if code is None:
            return "closed its answer pipe"
        if code < 0 or code > 128:
            number = -code if code < 0 else code - 128
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(number).name}"
        return f"ended with exit code {code}"

    def _stop(self) -> None:
        with self._stopping:  # the thread that asks, and one that closes
            if self._process is None:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._ended.set()
            self._drain.join()
            self._process.stdout.close()
            os.close(self._to)
            os.close(self._from)
            self._process = None


class _Late(Exception):
    pass


class _Ended(Exception):
    pass


class _Bounded:
    """The first and the last half of a stream, drained by a thread so that a flood never blocks."""

    def __init__(self, size: int):
        self.half = size // 2
        self.head, self.tail, self.total = bytearray(), bytearray(), 0
        self.lock = threading.Lock()

    def drain(self, descriptor: int, ended: threading.Event) -> None:
        """Read until the end of the stream, or, when a grandchild holds it open, until the process has ``ended``."""
        flood = 100  # chunks that are still read of a grandchild that never stops writing
        with contextlib.suppress(OSError):
            while flood:
                if over := ended.is_set():  # asked before the stream: what was written by then is still read
                    flood -= 1
                if not select.select([descriptor], [], [], 0.0 if over else 0.1)[0]:
                    if over:
                        return
                    continue
                if not (chunk := os.read(descriptor, 65536)):
                    return
                with self.lock:
                    self.total += len(chunk)
                    room = self.half - len(self.head)
                    self.head += chunk[:room]
                    self.tail = (self.tail + chunk[max(0, room) :])[-self.half :]

    def text(self) -> str:
        with self.lock:
            cut = self.total - len(self.head) - len(self.tail)
            middle = f"\n... {cut:,} bytes cut ...\n".encode() if cut else b""
            return (bytes(self.head) + middle + bytes(self.tail)).decode(errors="replace")


def _arrays(blob: bytes) -> dict:
    if not blob:
        return {}
    import numpy

    with numpy.load(io.BytesIO(blob), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


# Names a model may need to run at all. Everything else stays outside: tokens, proxies, agents.
_KEPT = ("PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
         "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH")  # fmt: skip


def scrubbed_environment(home: Path) -> dict[str, str]:
    """The child's environment: an empty home, offline flags, no secrets."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("LC_")}
    if "PYTHONPATH" in kept:
        # Entries stay valid from the checkout's folder; the judge's own folder must not lend its packages.
        ours = WORKER.parents[2].resolve()
        entries = [Path(entry).resolve() for entry in kept.pop("PYTHONPATH").split(os.pathsep) if entry]
        if lent := [str(entry) for entry in entries if entry != ours]:
            kept["PYTHONPATH"] = os.pathsep.join(lent)
    folders = {
        "HOME": home,
        "TMPDIR": home / "tmp",
        "HF_HOME": home / "hf",
        "XDG_CACHE_HOME": home / "xdg" / "cache",
        "XDG_CONFIG_HOME": home / "xdg" / "config",
        "XDG_DATA_HOME": home / "xdg" / "data",
        "XDG_RUNTIME_DIR": home / "xdg" / "run",
        "TORCH_HOME": home / "torch",
        "TORCHINDUCTOR_CACHE_DIR": home / "inductor",
        "TRITON_CACHE_DIR": home / "triton",
        "MPLCONFIGDIR": home / "mpl",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    flags = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUNBUFFERED": "1",
        "USER": "compat",
    }
    return kept | {name: str(folder) for name, folder in folders.items()} | flags


@functools.cache
def sandbox() -> tuple[str, ...]:
    """A command prefix that cuts the network and contains the process tree, where the machine has one.

    bubblewrap, else unshare, else nothing; $COMPAT_SANDBOX=none switches it off. Tried once, for real.
    """
    if os.environ.get("COMPAT_SANDBOX") == "none":
        return ()
    candidates = [
        ("bwrap", "--dev-bind", "/", "/", "--proc", "/proc", "--unshare-net", "--unshare-pid",
         "--unshare-ipc", "--die-with-parent"),
        ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
        ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
    ]  # fmt: skip
    for candidate in candidates:
        if shutil.which(candidate[0]) is None:
            continue
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            tried = subprocess.run([*candidate, "true"], capture_output=True, timeout=10, check=False)
            if tried.returncode == 0:
                return candidate
    return ()
