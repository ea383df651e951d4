"""Several pieces of work at once, each in a forked process of the judge, and an end that reaches all of them.

Unusual: workers leave the terminal's process group, so that Ctrl-C arrives here alone and is passed on once;
then they are given time to tell what they had and to clear away. SIGTERM counts as Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

GRACE_S = 20.0  # for a worker to end its child, clear its home and hand over what it has
CHILD_BYTES = 2 << 30  # what a tiny model's process may come to, torch included
MOST = 8


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: what was found so far is kept, as after Ctrl-C."""


class WorkerLost(RuntimeError):
    """A process of the judge itself ended without a result."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated inside the block."""

    def end(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def places(wanted: int, scale: str = "tiny", device: str = "cpu") -> int:
    """How many of ``wanted`` targets may be asked at once: one a core, as far as memory goes.

    One at a time at full scale, where a model takes all cores and much memory, and on a GPU.
    """
    if scale != "tiny" or device != "cpu" or not hasattr(os, "fork") or sys.platform == "darwin":
        return 1  # forking under macOS's frameworks is not safe
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted, cores, available_bytes() // CHILD_BYTES, MOST))


def available_bytes() -> int:
    """What the system says it could give without swapping; enough where it does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return MOST * CHILD_BYTES


def together(jobs: Sequence[Callable], told: Callable[[int, Any], None] | None = None) -> list:
    """What each job returns, in the order given; a job is called with ``tell(event)``, which calls told(job, event).

    One job runs in this process. Raises what a job raises, KeyboardInterrupt once all of them ended.
    """
    told = told or (lambda number, event: None)
    if len(jobs) == 1:
        return [jobs[0](lambda event: told(0, event))]
    import multiprocessing

    fork = multiprocessing.get_context("fork")
    processes, pipes = [], []
    try:
        for job in jobs:
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=_work, args=(job, there), daemon=False)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        outcomes = _collect(processes, pipes, told)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()
    for outcome in outcomes:
        if isinstance(outcome, _Raised):
            raise outcome.error
    return outcomes


class _Raised:
    def __init__(self, error: BaseException):
        self.error = error


def _work(job: Callable, pipe) -> None:
    os.setpgrp()
    try:
        answer = job(lambda event: pipe.send((True, event)))
    except BaseException as error:
        answer = _Raised(error)
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        try:
            pipe.send((False, answer))
        except (TypeError, AttributeError, ValueError) as error:  # what cannot be pickled
            pipe.send((False, _Raised(WorkerLost(f"a result cannot be handed over: {error}"))))


def _collect(processes: list, pipes: list, told: Callable[[int, Any], None]) -> list:
    from multiprocessing import connection

    outcomes: list = [None] * len(pipes)
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    until = None
    while waiting:
        try:
            ready = connection.wait(list(waiting), None if until is None else max(0.0, until - time.monotonic()))
            if not ready:
                break  # grace is over: together() kills what is left
            for pipe in [pipe for pipe in pipes if pipe in ready]:
                number = waiting[pipe]
                try:
                    event, value = pipe.recv()
                except EOFError:
                    processes[number].join(GRACE_S)
                    event, value = False, _Raised(
                        WorkerLost(f"a process of the judge ended with exit code {processes[number].exitcode}")
                    )
                if event:
                    told(number, value)
                else:
                    outcomes[number] = value
                    del waiting[pipe]
        except KeyboardInterrupt as error:
            first = until is None
            until = time.monotonic() + (GRACE_S if first else 0.0)
            for number in waiting.values() if first else ():
                with contextlib.suppress(ProcessLookupError):
                    how = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
                    os.kill(processes[number].pid, how)
    for number in waiting.values():
        outcomes[number] = _Raised(KeyboardInterrupt())
    return outcomes
