"""One process that imports once and answers from copies of itself, one copy a tree.

Unusual: a copy inherits both pipes and answers by them, while the process it is a copy of waits behind it; so
nothing is passed on, and a copy that dies takes its original with it, as any process that dies while it answers.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys

from .discover import parse, python_files, read_classes
from .scripts import flags

QUESTIONS = ("preload", "fork", "join", "loaded")


def answered_elsewhere(request):
    """Whether this process is not the one to answer: the original while its copy lives. Ends the copy at "join"."""
    if request["question"] == "join":  # not answered: what follows on the pipe is for the original
        os._exit(0)
    if request["question"] != "fork":
        return False
    gc.freeze()  # or each copy's collector walks over, and so copies, all that was imported
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if status:
            os._exit(status >> 8 or 128 + (status & 127))
    return bool(pid)


def answer(request, folder):
    """The answers of "preload", "fork" and "loaded"."""
    if request["question"] == "preload":
        for name in request["parameters"]["modules"]:
            with contextlib.suppress(Exception):  # what cannot be imported now is imported by whom it concerns
                importlib.import_module(name)
        folder = os.path.realpath(request["parameters"]["folder"])
        for path in python_files(folder):
            with contextlib.suppress(Exception):  # as above
                read_classes(path, parse(path))
        with contextlib.suppress(Exception):
            flags(folder, "")
    if request["question"] == "loaded":
        return loaded(os.path.realpath(folder) + os.sep)
    return {}


def loaded(folder):
    """{"mine": files below ``folder`` that are loaded as modules, "others": names of all other modules}."""
    mine, others = [], []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and os.path.isabs(file) and os.path.realpath(file).startswith(folder):
            mine.append(os.path.realpath(file)[len(folder) :])
        elif isinstance(file, str) and name != "__main__":
            others.append(name)
    return {"mine": sorted(set(mine)), "others": others}
