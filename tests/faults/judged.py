"""Changed copies of our model through the very lock and comparison that users get (compat.forks)."""

from __future__ import annotations

from concurrent.futures import Future

from compat.combo import load
from compat.forks import Bench
from compat.rules import Comparison
from compat.target import resolve
from tests.faults.cases import Case
from tests.house.tree import ROOT

LIMIT_S = 600.0  # of one lock, on a machine that does other things too
CODE = ("nanovlm",)  # what is copied: nothing else of this repository is the model's


class Judge(Bench):
    """``ask`` begins, the Future's result is the Comparison."""

    def __init__(self) -> None:
        super().__init__(resolve(str(ROOT)), CODE, limit_s=LIMIT_S)

    def ask(self, case: Case) -> Future[Comparison]:
        return self.pool.submit(lambda: self.compared(case.files(), load()[case.combo], LIMIT_S))
