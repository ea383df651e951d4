"""A process with an environment of its own, which calls what it is sent; for libraries that read it once."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

CLIENT_SECONDS = 120


class Raised(Exception):
    """What a function raised in a `Client`; `kinds` are the names of its type and of that type's bases."""

    def __init__(self, kinds: list[str], message: str):
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message = kinds, message

    def __reduce__(self):  # Exception's own would call it with the one text
        return Raised, (self.kinds, self.message)


class Client:
    """A child process with its own environment: called with a function and arguments, it calls it there.

    The function travels by name, so it stands at the top of a module; arguments and result are pickled.
    What it raises arrives as `Raised`. A context manager.
    """

    def __init__(self, environment: dict[str, str]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_answer_calls, args=(theirs, environment), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the child is the end of the pipe

    def __call__(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        self.pipe.send((function, arguments, options))
        if not self.pipe.poll(CLIENT_SECONDS):
            raise TimeoutError(f"{function.__name__}: no answer in {CLIENT_SECONDS} s")
        value, raised, trace = self.pipe.recv()
        if raised:
            raise raised from RuntimeError(f"in the client:\n{trace}")
        return value

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.close()  # it ends by itself, unless it hangs
        self.process.join(CLIENT_SECONDS / 10)
        self.process.kill()
        self.process.join()


def _answer_calls(pipe: Any, environment: dict[str, str]) -> None:
    from conftest import _loopback_only

    os.environ.clear()  # nothing imported so far reads it
    os.environ.update(environment)
    _loopback_only()
    while True:
        try:
            function, arguments, options = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*arguments, **options), None, ""))
        except Exception as error:  # the caller judges it; the Hub's own errors cannot be pickled
            kinds = [kind.__name__ for kind in type(error).__mro__]
            pipe.send((None, Raised(kinds, str(error)), traceback.format_exc()))
