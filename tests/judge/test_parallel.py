"""Work in several processes: results in order, every end reaches all of them, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compat import parallel
from compat.parallel import Terminated, WorkerLost, places, terminable, together
from compat.result import PASSED, Result
from compat.several import Told

from .trees import MODEL, make_tree

ROOT = Path(__file__).parents[2]


def test_results_come_in_the_order_of_the_jobs_and_events_as_they_happen(tmp_path):
    def job(name, wait):
        def work(tell):
            time.sleep(wait)
            tell(name)
            return name, os.getpid()

        return work

    told = []
    made = together([job("slow", 0.3), job("fast", 0.0)], lambda number, event: told.append((number, event)))
    assert [name for name, _ in made] == ["slow", "fast"] and told == [(1, "fast"), (0, "slow")]
    assert len({pid for _, pid in made} | {os.getpid()}) == 3


def test_one_job_stays_in_this_process():
    assert together([lambda tell: (tell("x"), os.getpid())[1]]) == [os.getpid()]


def test_what_a_job_raises_is_raised_here():
    def fails(tell):
        raise ValueError("no such combo")

    with pytest.raises(ValueError, match="no such combo"):
        together([lambda tell: 1, fails])


@pytest.mark.parametrize("how", ["dies", "cannot be pickled"])
def test_a_process_that_gives_no_result_is_our_error_and_said_to_be(how):
    def lost(tell):
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda: None

    with pytest.raises(WorkerLost, match="exit code -9" if how == "dies" else "cannot be handed over"):
        together([lambda tell: 1, lost])


def test_an_interruption_reaches_every_process_and_what_they_had_is_cleared_away(tmp_path):
    def job(number):
        def work(tell):
            try:
                (tmp_path / f"home{number}").touch()
                tell(number)
                time.sleep(60)
            finally:
                (tmp_path / f"home{number}").unlink()

        return work

    started = []

    def interrupt(number, event):
        started.append(number)
        if len(started) == 2:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        together([job(0), job(1)], interrupt)
    assert time.monotonic() - began < 10 and not list(tmp_path.iterdir())


def test_sigterm_is_an_interruption_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_as_many_at_once_as_there_are_cores_and_memory_and_one_at_full_scale(monkeypatch):
    if not hasattr(os, "sched_getaffinity") or sys.platform == "darwin":
        pytest.skip("this system is asked one target at a time")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(parallel, "available_bytes", lambda: 64 << 30)
    assert [places(n) for n in (1, 2, 7)] == [1, 2, 4]
    assert places(7, "full") == places(7, "tiny", "cuda") == 1
    monkeypatch.setattr(parallel, "available_bytes", lambda: 5 << 30)
    assert places(7) == 2
    monkeypatch.setattr(parallel, "available_bytes", lambda: 0)
    assert places(7) == 1


def test_checks_of_two_parts_are_shown_one_after_the_other():
    class Watcher:
        def __init__(self):
            self.seen = []

        def start(self, total):
            self.seen.append(total)

        def answered(self, result):
            self.seen.append((result.check, result.combo))

    watcher = Watcher()
    told = Told(watcher)
    for part in (0, 1):
        told(part, ("start", 4))
    for check in ("A", "B"):
        for part in (0, 1):
            told(part, ("answered", Result(check, "x", PASSED, combo=f"c{part}")))
    told.finish()
    assert watcher.seen == [4, ("A", "c0"), ("A", "c1"), ("B", "c0"), ("B", "c1")]


HANGS = "        import os, time; open('{marks}/' + str(os.getpid()), 'w'); time.sleep(100)\n"


@pytest.mark.slow
@pytest.mark.parametrize(("end", "combos"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_run_that_is_ended_is_saved_and_leaves_no_home_and_no_process(tmp_path, end, combos):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "marks").mkdir()
    before = "        pick = likeliest"
    hangs = HANGS.format(marks=tmp_path / "marks")
    tree = make_tree(tmp_path, "main", {MODEL: [(before, hangs + before)]})
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    names = ["siglip2-smollm2", "siglip-smollm2"][:combos]
    command = [sys.executable, "-m", "compat", "run", str(tree), "--suite", "config", "--suite", "generate"]
    command += [word for name in names for word in ("--combo", name)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet) as run:
        until = time.monotonic() + 60
        waits_for = min(combos, places(combos))
        while len(list((tmp_path / "marks").iterdir())) < waits_for and time.monotonic() < until:
            time.sleep(0.1)
        run.send_signal(end)
        assert run.wait(60) == 3
    [saved] = (tmp_path / ".compat/runs").glob("*.json")
    told = json.loads(saved.read_text())
    assert told["incomplete"].startswith("interrupted" + (" by SIGTERM" if end == signal.SIGTERM else " from"))
    assert {result["combo"] for result in told["results"]} >= set(names[:waits_for])
    assert not list((tmp_path / "tmp").glob("compat-home-*")), "the temporary home is gone"
    assert not left_behind(str(tree)), "no process of the target goes on"


def left_behind(folder: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == folder:
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found
