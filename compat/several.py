"""One run over several combos, a child each for as many of them as the machine has room for.

Unusual: every part is a whole pytest session of its own in a forked process; what it tells as it goes comes here,
and a check is passed on to the one Watcher when all its tests are in, so that parts never mix on the screen.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from compat.combo import Combo
from compat.parallel import together
from compat.process import Child, CouldNotAsk
from compat.result import OUTPUT_CHARS, Result, Run, bounded
from compat.suites import Suite


def judge_several(
    run: Run,
    make_child: Callable[[], Child],
    combos: list[Combo],
    suites: list[Suite],
    limit_s: float = 600.0,
    watcher=None,
    at_once: int = 1,
) -> Run:
    """Fill in ``run`` as judge() does, results in the order of ``combos``. ``at_once`` children share them.

    When nothing can be asked there are no results, and run.incomplete says why.
    """
    began = time.monotonic()
    parts = [combos[place::at_once] for place in range(at_once)]
    from compat.plugin import Silent

    told = Told(watcher or Silent(), whole=at_once == 1)
    answers = together([_part(run, make_child, part, suites, limit_s, len(part) / len(combos)) for part in parts], told)
    told.finish()
    merge(run, answers)
    run.elapsed_s = round(time.monotonic() - began, 3)
    return run


def _part(run: Run, make_child, combos: list[Combo], suites: list[Suite], limit_s: float, share: float) -> Callable:
    def work(tell) -> Run:
        part = Run(run.id, run.started, run.target, run.scale, run.combos)
        child = make_child()
        try:
            return judged(part, child, combos, suites, limit_s, Teller(tell, share))
        finally:
            child.close()

    return work


def judged(part: Run, child: Child, combos: list[Combo], suites: list[Suite], limit_s: float, watcher) -> Run:
    """judge(), with what stopped it in part.incomplete."""
    from compat.plugin import interruption, judge  # pytest and numpy: nobody waits for them who merges known runs

    try:
        judge(part, child, combos, suites, limit_s, watcher)
    except CouldNotAsk as error:
        part.incomplete, part.output = str(error), child.output
    except KeyboardInterrupt as error:
        part.incomplete = interruption(error)
    return part


def merge(run: Run, parts: list[Run]) -> None:
    """Put what the parts found into ``run``."""
    order = {name: place for place, name in enumerate(run.combos)}
    run.results = sorted((r for part in parts for r in part.results), key=lambda r: order.get(r.combo, -1))
    stops = dict.fromkeys(part.incomplete for part in parts if part.incomplete)
    # an interruption outranks the rest: run.exit_code looks at how the text begins
    run.incomplete = "; ".join(sorted(stops, key=lambda text: not text.startswith("interrupted")))
    for part in parts:
        run.environment |= part.environment
        run.notes += [note for note in part.notes if note not in run.notes]
        run.cost |= part.cost
        run.facts |= part.facts
    run.output = bounded("".join(part.output for part in parts), OUTPUT_CHARS, tail=True)
    run.start_s = max((part.start_s for part in parts), default=0.0)


class Teller:
    """A Watcher in a part's process: passes everything on. share: of all tests, those that this one will see."""

    def __init__(self, tell: Callable[[tuple], None], share: float = 1.0):
        self.tell, self.share = tell, share

    def start(self, total: int) -> None:
        self.tell(("start", round(total / self.share)))

    def asking(self, check: str, test: str) -> None:
        self.tell(("asking", check, test))

    def started(self, hello: dict, elapsed_s: float) -> None:
        self.tell(("started", hello, elapsed_s))

    def answered(self, result: Result) -> None:
        self.tell(("answered", result))


class Told:
    """What the parts tell, in an order that one Watcher understands: called with (part, event).

    whole: there is one part, whose tests need not wait for each other.
    """

    def __init__(self, watcher, whole: bool = False):
        self.watcher, self.whole = watcher, whole
        self.began: set[str] = set()
        self.waiting: dict[int, list[Result]] = {}

    def __call__(self, part: int, event: tuple) -> None:
        name, *values = event
        if name in ("start", "started"):
            if name not in self.began:
                getattr(self.watcher, name)(*values)
            self.began.add(name)
        elif name == "asking":
            self.watcher.asking(*values)
        elif name == "answered":
            held = self.waiting.setdefault(part, [])
            if held and (held[-1].check, held[-1].combo) != (values[0].check, values[0].combo):
                self._pass_on(held)
            held.append(values[0])
            if self.whole:
                self._pass_on(held)

    def finish(self) -> None:
        for held in self.waiting.values():
            self._pass_on(held)

    def _pass_on(self, held: list[Result]) -> None:
        for result in held:
            self.watcher.answered(result)
        held.clear()
