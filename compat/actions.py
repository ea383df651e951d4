"""A step of GitHub Actions: nothing that is printed in it gives orders to the runner.

Unusual: a line that begins with ``::``, or holds ``##[``, is an order, whoever prints it. So all that a command
prints stands between ``::stop-commands::`` and a random word, and both streams share one pipe meanwhile, because
two are read by two threads and the order between them would be chance.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator


def here() -> bool:
    """Whether this process is a step of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


@contextlib.contextmanager
def commands_stopped(data_on_stdout: bool = False) -> Iterator[None]:
    """Nothing that is printed inside is taken for a workflow command. Elsewhere than on GitHub it does nothing.

    data_on_stdout: leave that stream alone, a program reads it; so does a file that it is redirected to.
    """
    if not here():
        yield
        return
    token = secrets.token_hex(16)
    apart = data_on_stdout or _is_file(sys.stdout)
    stream = sys.stderr if apart else sys.stdout
    flush()
    stderr = None if apart else _join_streams()
    print(f"::stop-commands::{token}", file=stream, flush=True)
    try:
        yield
    finally:
        flush()
        with contextlib.suppress(OSError):  # nobody reads any more
            print(f"\n::{token}::", file=stream, flush=True)  # whatever was printed last may not have ended its line
        if stderr is not None:
            os.dup2(stderr, 2)
            os.close(stderr)


def say(lines: list[str], data_on_stdout: bool = False) -> None:
    """Print workflow commands where the runner reads them."""
    stream = sys.stderr if data_on_stdout or _is_file(sys.stdout) else sys.stdout
    for line in lines:
        print(line, file=stream)
    stream.flush()


def _is_file(stream) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    return False


def _join_streams() -> int | None:
    """Let what goes to stderr go where stdout goes; the descriptor it had, to put back."""
    try:
        apart = os.dup(2)
        os.dup2(sys.stdout.fileno(), 2)
    except (OSError, ValueError):  # streams that are no files have no runner behind them
        return None
    return apart


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
