"""The pytest plugin: fixtures that ask the child, and the capture of each test's Result.

Unusual: pytest is the engine here, not the interface. `compat run` calls it in-process with its terminal,
cache, conftest files and every other installed plugin switched off; `pytest compat/suites --target .`
loads this same file as an ordinary plugin. A test that fails is the target's doing only when a check said
so or the target's code raised; anything else that goes wrong is an error of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compat.combo import SCALES, Combo, UnknownCombo, choose
from compat.figures import measure
from compat.parallel import Terminated
from compat.process import Child, ChildFailed, CouldNotAsk, NotSupported, TargetRaised
from compat.result import (
    DETAIL_CHARS,
    ERROR,
    FAILED,
    INCOMPLETE,
    OUTPUT_CHARS,
    PASSED,
    SKIPPED,
    Result,
    Run,
    bounded,
)
from compat.suites import FOLDER, Suite
from compat.suites.probes import Probes
from compat.target import TargetError, resolve

THEIRS = (AssertionError, TargetRaised, ChildFailed)
HERE = str(Path(__file__).resolve().parent)
CHILD = os.path.join(HERE, "child")
REMEMBERED_BYTES = 2**24  # arrays of an answer beyond which it is asked again instead


def interruption(error: KeyboardInterrupt) -> str:
    return "interrupted by SIGTERM" if isinstance(error, Terminated) else "interrupted from the keyboard"


class Silent:
    """What a run tells as it goes; the terminal's Watcher has the same methods."""

    def start(self, total: int) -> None:
        """Collection is over; `total` tests will be asked."""

    def asking(self, check: str, test: str) -> None:
        """A test begins."""

    def started(self, hello: dict, elapsed_s: float) -> None:
        """The child answered for the first time."""

    def answered(self, result: Result) -> None:
        """A test is done."""


class Judge:
    """The plugin of one session: one child, some combos, and what was found out about them."""

    def __init__(
        self,
        child: Child,
        combos: list[Combo],
        scale: str = "tiny",
        limit_s: float = 600.0,
        watcher=None,
    ):
        self.child, self.combos, self.scale = child, {combo.name: combo for combo in combos}, scale
        self.limit_s, self.watcher = limit_s, watcher or Silent()
        self.results: list[Result] = []
        self.incomplete = ""
        self.could_not_ask = ""
        self.described: dict[str, dict] = {}  # combo -> what `describe` answered
        self._answers: dict[str, dict | Exception] = {}
        self._began: float | None = None
        self._setup_s = self._uncharged_s = 0.0
        self.start_s = 0.0  # until the first answer: the child's start, which no check is charged with

    def asker(self, combo: str) -> Callable[..., dict]:
        """ask(question, **parameters) for one combo.

        The same question twice is answered from memory, or raises from it; again=True asks the child anew.
        """

        def ask(question: str, again: bool = False, **parameters) -> dict:
            key = json.dumps([combo, question, parameters], sort_keys=True)
            if again or key not in self._answers:
                self._answers[key] = self._answer(question, combo, parameters)
            answer = self._answers[key]
            if isinstance(answer, Exception):
                raise answer.with_traceback(None)
            if sum(getattr(value, "nbytes", 0) for value in answer.values()) > REMEMBERED_BYTES:
                del self._answers[key]
            return answer

        return ask

    def not_offered(self) -> str:
        """Which combos the target does not offer, in one sentence; a run of skips alone is no pass."""
        keys = {combo: json.dumps([combo, "describe", {}], sort_keys=True) for combo in self.combos}
        why = {combo: self._answers.get(key) for combo, key in keys.items()}
        return "; ".join(f"{c} was not judged: {e}" for c, e in why.items() if isinstance(e, NotSupported))

    def _answer(self, question: str, combo: str, parameters: dict) -> dict | Exception:
        began = time.monotonic()
        reply: dict | Exception
        try:
            reply = self.child.ask(question, combo=self.combos[combo].as_dict(self.scale), **parameters)
        except (TargetRaised, ChildFailed, NotSupported) as error:
            reply = error
        else:
            for value in reply.values():
                if hasattr(value, "setflags"):  # shared by several tests: nobody may write into it
                    value.setflags(write=False)
        if not self.start_s:
            self.start_s = self._uncharged_s = time.monotonic() - began
            self.watcher.started(self.child.hello or {}, self.start_s)
        return reply

    # --- fixtures -----------------------------------------------------------------------------------------

    @pytest.fixture
    def ask(self, combo):
        return self.asker(combo)

    @pytest.fixture
    def facts(self, combo):
        """What `describe` says of the model: vocabulary, layout, what it takes."""
        if combo not in self.described:
            self.described[combo] = self.asker(combo)("describe")
        return self.described[combo]

    @pytest.fixture
    def probes(self, facts):
        return Probes(facts)

    # --- hooks --------------------------------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc):
        if "combo" in metafunc.fixturenames or "ask" in metafunc.fixturenames:
            metafunc.parametrize("combo", list(self.combos), scope="session")

    def pytest_collection_finish(self, session):
        self.watcher.start(len(session.items))

    def pytest_collectreport(self, report):
        if report.failed:
            self._record(
                Result(
                    "Suites",
                    Path(str(report.nodeid)).name or "collection",
                    ERROR,
                    "a suite could not be loaded",
                    str(report.longrepr),
                )
            )

    def pytest_runtest_setup(self, item):
        self._began = self._began or time.monotonic()
        self.watcher.asking(item.module.CHECK, sentence(item))
        if time.monotonic() - self._began > self.limit_s:
            self.incomplete = f"the run's time limit of {self.limit_s:g} s is spent"
            pytest.skip(f"not asked: {self.incomplete}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        error = call.excinfo.value if call.excinfo else None
        if isinstance(error, NotSupported):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {error}")
        elif isinstance(error, CouldNotAsk):
            self.could_not_ask = str(error)
            item.session.shouldstop = str(error)
        elif isinstance(error, TargetRaised | ChildFailed):
            report.longrepr = "\n".join(explain(error, self.child.target.folder))
        if call.when == "setup":
            self._setup_s = call.duration
        if isinstance(error, CouldNotAsk) or (call.when != "call" and report.passed):
            return report
        if call.when == "call" or not report.passed:
            self._record(self._result(item, call, report, error))
        return report

    def pytest_sessionfinish(self, session):
        if self.could_not_ask:
            session.exitstatus = INCOMPLETE

    def pytest_keyboard_interrupt(self, excinfo):
        if isinstance(excinfo.value, KeyboardInterrupt):
            self.incomplete = interruption(excinfo.value)

    def pytest_internalerror(self, excrepr, excinfo):
        self._record(
            Result("Suites", "pytest runs the suites", ERROR, excinfo.exconly(), str(excrepr)[-DETAIL_CHARS:])
        )
        return True

    def _record(self, result: Result) -> None:
        self.results.append(result)
        self.watcher.answered(result)

    def _result(self, item, call, report, error) -> Result:
        status, message, detail = PASSED, "", ""
        if report.skipped:
            status, message = SKIPPED, str(getattr(error, "msg", None) or error)
        elif report.failed:
            status = FAILED if isinstance(error, THEIRS) else ERROR
            message, detail = explain(error, self.child.target.folder)
        return Result(
            item.module.CHECK,
            sentence(item),
            status,
            message,
            detail,
            self._elapsed_s(call),
            item.callspec.params["combo"] if hasattr(item, "callspec") else "",
        )

    def _elapsed_s(self, call) -> float:
        spent = call.duration + (self._setup_s if call.when == "call" else 0.0)
        uncharged, self._uncharged_s = self._uncharged_s, 0.0
        return round(max(0.0, spent - uncharged), 4)


def sentence(item) -> str:
    """`test_left_padding_does_not_change_a_row` as people read it."""
    words = item.originalname.removeprefix("test_").replace("_s_", "'s_").replace("_", " ")
    given = (
        [str(value) for name, value in item.callspec.params.items() if name != "combo"]
        if hasattr(item, "callspec")
        else []
    )
    return words + (f" ({', '.join(given)})" if given else "")


def explain(error: BaseException, folder: Path | None = None) -> tuple[str, str]:
    """(one line, details): what a maintainer needs; our own frames only when the error is ours."""
    if isinstance(error, TargetRaised):
        return str(error), their_frames(error.traceback, folder)
    if isinstance(error, ChildFailed):
        return str(error), ""
    if isinstance(error, AssertionError):
        first, _, rest = str(error).partition("\n")
        return first or "a check failed without saying why", rest
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(HERE)]
    text = f"{type(error).__name__}: {error}".strip()
    return text.partition("\n")[0], "".join(traceback.format_list(frames)) + text


def their_frames(text: str, folder: Path | None) -> str:
    """A traceback without the frames of our worker, paths inside the target written from its folder."""
    kept, ours = [], False
    for line in text.splitlines():
        if line.startswith('  File "'):
            ours = line.startswith(f'  File "{CHILD}')
        elif not line.startswith("    "):
            ours = False
        if not ours:
            kept.append(line)
    found = "\n".join(kept)
    return found.replace(f'File "{folder}{os.sep}', 'File "') if folder else found


def run_limit_s(timeout_s: float) -> float:
    """Seconds for all questions of a run together: ten minutes, or ten times the limit of one."""
    return max(600.0, 10 * timeout_s)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody's pytest settings or plugins reach us through the environment while we run it in-process."""
    kept = {
        name: os.environ.pop(name, None)
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    }
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def judge(
    run: Run, child: Child, combos: list[Combo], suites: list[Suite], limit_s: float = 600.0, watcher=None
) -> Run:
    """Ask `child` everything in `suites` and fill in `run`: results, environment, notes, output, time.

    Ctrl-C keeps what was answered. Raises CouldNotAsk when nothing can be asked of the target at all.
    """
    if not __debug__:
        raise CouldNotAsk("python -O removes the assertions the checks are made of; run without it")
    plugin = Judge(child, combos, run.scale, limit_s, watcher)
    began = time.monotonic()
    off = ("terminal", "cacheprovider", "faulthandler", "logging")
    arguments = [f"--config-file={FOLDER / 'pytest.ini'}", f"--rootdir={FOLDER}", f"--confcutdir={FOLDER}"]
    arguments += ["--noconftest", "--capture=no", *(f"-pno:{name}" for name in off)]
    try:
        with alone():
            code = pytest.main([*arguments, *(str(suite.path) for suite in suites)], plugins=[plugin])
    except KeyboardInterrupt as error:
        code, plugin.incomplete = pytest.ExitCode.INTERRUPTED, interruption(error)
    if plugin.could_not_ask and not plugin.results:
        raise CouldNotAsk(plugin.could_not_ask)
    run.results = plugin.results
    plugin.incomplete = plugin.incomplete or plugin.not_offered()
    run.incomplete = plugin.incomplete or plugin.could_not_ask
    if not run.results and not run.incomplete:
        run.incomplete = f"pytest ended with code {int(code)} before any test ran"
    run.environment = {name: value for name, value in (child.hello or {}).items() if name != "notes"}
    for combo, facts in plugin.described.items():
        run.environment |= facts.get("environment", {})
        label = f"{combo}: " if len(run.combos) > 1 else ""
        run.notes += [label + note for note in facts.get("notes", []) if label + note not in run.notes]
    try:
        for combo, facts in plugin.described.items():
            if not run.incomplete:
                run.cost[combo], run.facts[combo] = measure(plugin.asker(combo), facts, run.checks(combo))
    except KeyboardInterrupt as error:
        run.incomplete = interruption(error)
    run.start_s = round(plugin.start_s, 3)
    run.output = bounded(child.output, OUTPUT_CHARS, tail=True)
    run.elapsed_s = round(time.monotonic() - began, 3)
    return run


# --- `pytest compat/suites --target .` --------------------------------------------------------------------


def pytest_addoption(parser):
    group = parser.getgroup("compat", "what is judged")
    group.addoption("--target", default=".", help="folder, FOLDER@REF, package.module:Class or file.py:Class")
    group.addoption("--combo", action="append", help="a combo of combos.toml; may be given again")
    group.addoption("--scale", choices=SCALES, default="tiny")
    group.addoption("--python", help="the interpreter the target runs in (default: this one)")
    group.addoption("--timeout", type=float, default=60.0, help="seconds a question may take")
    with contextlib.suppress(ValueError):  # a conftest above the suites may have --device too
        group.addoption("--device", choices=("cpu", "cuda"), default="cpu")


def pytest_configure(config):
    option, limit_s = config.option, run_limit_s(config.option.timeout)
    try:
        combos, target = choose(option.combo), resolve(option.target)
    except (UnknownCombo, TargetError) as error:
        raise pytest.UsageError(str(error)) from None
    child = Child(
        target, option.python, option.timeout, limit_s, option.device, option.scale
    )  # not started yet
    config.pluginmanager.register(Judge(child, combos, option.scale, limit_s), "compat-judge")


def pytest_unconfigure(config):
    judge = config.pluginmanager.get_plugin("compat-judge")
    if judge:
        judge.child.close()
