"""The run in the terminal: verdict, a table of checks, every failure in full, what was not asked and why.

On a terminal it has colour and line drawing; piped it is plain ASCII of a fixed width, so that it can be
searched and pasted. Progress goes to stderr while checks run.
"""

from __future__ import annotations

import sys

from rich.box import ASCII2, ROUNDED
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from compat.reports.text import one_line, printable
from compat.result import ERROR, FAILED, PASSED, SKIPPED, Check, Result, Run

PIPED_COLUMNS = 120
TASK = TaskID(0)  # the only one a bar has
VERSIONS = ("python", "torch", "transformers", "device")
STYLE = {PASSED: "green", FAILED: "bold red", ERROR: "bold magenta", SKIPPED: "yellow"}
LABEL = {PASSED: "passed", FAILED: "FAILED", ERROR: "ERROR", SKIPPED: "skipped"}


def console(stream) -> Console:
    """Plain and of fixed width unless the stream is a terminal that can show more."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=PIPED_COLUMNS, color_system=None, force_terminal=False)


def fancy(stream) -> bool:
    return stream.isatty() and (stream.encoding or "").lower().replace("-", "") == "utf8"


def show(run: Run, run_path: str | None, stream=None, quiet: bool = False, verbose: bool = False) -> None:
    """Print the run.

    quiet: verdict and failures alone. verbose: every test, and what the target printed.
    """
    stream = stream or sys.stdout
    out = console(stream)
    clean = (lambda text: text) if fancy(stream) else _ascii
    out.print(Text(clean(verdict(run)), style="bold " + _colour(run)), soft_wrap=True)
    if run.results and not quiet:
        out.print(_table(run, clean, ROUNDED if fancy(stream) else ASCII2))
    for status, heading in ((FAILED, "Failures"), (ERROR, "Errors of the harness (not the target's)")):
        found = [result for result in run.results if result.status == status]
        if found:
            out.print(Text(f"\n{heading}", style="bold"))
            for group in _alike(found):
                out.print(_in_full(group, run, clean), soft_wrap=True)
    if not quiet:
        _show_rest(out, run, clean, verbose)
    if run_path:
        out.print(Text(clean(f"\nRun: {run_path}"), style="dim"), soft_wrap=True)


def _show_rest(out: Console, run: Run, clean, verbose: bool) -> None:
    skipped = [result for result in run.results if result.status == SKIPPED]
    if skipped:
        out.print(Text(f"\nSkipped ({len(skipped)})", style="bold"))
        reasons: dict[str, list[str]] = {}
        for result in skipped:
            reasons.setdefault(result.message, []).append(f"{result.check}: {result.test}{_of(result, run)}")
        for reason, tests in reasons.items():
            out.print(Text(clean(f"  {one_line(reason)}"), style=STYLE[SKIPPED]), soft_wrap=True)
            for test in tests:
                out.print(Text(clean(f"    {test}")), soft_wrap=True)
    if run.notes:
        out.print(Text("\nNotes", style="bold"))
        for note in run.notes:
            out.print(Text(clean(f"  {one_line(note)}")), soft_wrap=True)
    if verbose:
        out.print(Text("\nEvery test", style="bold"))
        for result in run.results:
            test = f"{result.check}: {result.test}{_of(result, run)}"
            line = f"  {LABEL[result.status]:8}{result.elapsed_s:6.2f} s  {test}"
            out.print(Text(clean(line), style=STYLE[result.status]), soft_wrap=True)
        if run.output.strip():
            out.print(Text("\nWhat the target printed", style="bold"))
            out.print(Text(clean(printable(run.output).rstrip())), soft_wrap=True)


def verdict(run: Run) -> str:
    """One line: how many checks passed, of which target, where, in what time."""
    checks = len(run.checks())
    counts = [f"{run.count(PASSED)} of {checks} checks passed"]
    counts += [
        f"{run.count(s)} {word}"
        for s, word in ((FAILED, "failed"), (ERROR, "could not be judged"), (SKIPPED, "skipped"))
        if run.count(s)
    ]
    head = {0: "PASSED", 1: "FAILED"}.get(run.exit_code, "INCOMPLETE")
    if not checks:
        counts = ["no check was answered"]
    why = f" ({run.incomplete})" if run.incomplete else ""
    commit = run.target.get("commit")
    at = f" at {commit[:10]}{' + local changes' if run.target.get('dirty') else ''}" if commit else ""
    where = f"{', '.join(run.combos)} ({run.scale})"
    return one_line(
        f"{head}: {', '.join(counts)}{why} | {run.target['label']}{at} | {where} | {run.elapsed_s:.1f} s", 600
    )


def _colour(run: Run) -> str:
    return {0: "green", 1: "red"}.get(run.exit_code, "magenta")


def _table(run: Run, clean, box) -> Table:
    table = Table(box=box, expand=False, show_edge=True, pad_edge=True)
    if len(run.combos) > 1:
        table.add_column("combo", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name in ("pass", "fail", "skip", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first message", overflow="fold", ratio=1)
    for check in run.checks():
        table.add_row(*_row(check, clean, with_combo=len(run.combos) > 1))
    return table


def _row(check: Check, clean, with_combo: bool) -> list[Text]:
    style = STYLE[check.status]
    failed = check.count(FAILED) + check.count(ERROR)
    cells = [Text(check.title), Text(LABEL[check.status], style=style)]
    for number, colour in ((check.count(PASSED), "green"), (failed, style), (check.count(SKIPPED), "yellow")):
        cells.append(Text(str(number) if number else "-", style=colour if number else "dim"))
    cells.append(Text(f"{check.elapsed_s:.1f}"))
    cells.append(Text(clean(one_line(check.first_message, 100))))
    return [Text(check.combo), *cells] if with_combo else cells


def _alike(results: list[Result]) -> list[list[Result]]:
    """Tests of one check that say the same, under whatever combo: said once."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault((result.check, result.message), []).append(result)
    return list(groups.values())


def _in_full(results: list[Result], run: Run, clean) -> Group:
    lines = [Text(clean(f"  {r.check}: {r.test}{_of(r, run)}"), style=STYLE[r.status]) for r in results]
    message = one_line(results[0].message, 600)
    lines.append(Text(clean(f"    {message}")))
    detail = printable(results[0].detail).strip()
    if detail and one_line(detail, 600) != message:
        lines += [Text(clean(f"      {line}"), style="dim") for line in detail.splitlines()]
    return Group(*lines)


def _of(result: Result, run: Run) -> str:
    return f" [{result.combo}]" if len(run.combos) > 1 else ""


def _ascii(text: str) -> str:
    return text.replace("…", "...").encode("ascii", "backslashreplace").decode("ascii")


class Watcher:
    """Progress on stderr: a bar on a terminal, else one line when a check is done. level 0 says nothing."""

    def __init__(self, stream=None, level: int = 1, several: bool = False):
        self.stream, self.level = stream or sys.stderr, level
        self.several = several  # combos: then each line names its own
        self.bar: Progress | None = None
        self.running = False
        self.done: list[Result] = []

    def start(self, total: int) -> None:
        if self.level and self.stream.isatty():
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),  # by the pace of the last half minute; -:--:-- until there is one
            )
            self.bar = Progress(*columns, console=console(self.stream), transient=True)
            self.bar.start()
            self.bar.add_task("starting the target's process", total=total)

    def asking(self, check: str, test: str) -> None:
        if self.bar and self.running:
            self.bar.update(TASK, description=f"{check}: {test}" if self.level > 1 else check)

    def started(self, hello: dict, elapsed_s: float) -> None:
        self.running = True
        versions = ", ".join(
            f"{name} {one_line(str(hello[name]), 40)}" for name in VERSIONS if hello.get(name)
        )
        if self.level and not self.bar:
            self._say(
                f"the target's process answers after {elapsed_s:.1f} s ({versions or 'versions unknown'})"
            )

    def answered(self, result: Result) -> None:
        if self.bar:
            self.bar.advance(TASK)
        if self.level > 1:
            self._say(f"{LABEL[result.status]:8}{result.check}: {result.test} ({result.elapsed_s:.2f} s)")
        if self.done and (self.done[-1].check, self.done[-1].combo) != (result.check, result.combo):
            self._summary()
        self.done.append(result)

    def stop(self) -> None:
        if self.done:
            self._summary()
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _summary(self) -> None:
        check = Check(self.done[-1].check, self.done[-1].combo, tuple(self.done))
        self.done = []
        count = len(check.results)
        tests = f"{count} test{'s' * (count != 1)}"
        if self.level == 1 and not self.bar:
            where = f"{check.combo}, " if self.several else ""
            self._say(f"{where}{check.title}: {check.status} ({tests}, {check.elapsed_s:.1f} s)")

    def _say(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(Text(line))
        else:
            print(_ascii(line), file=self.stream, flush=True)
