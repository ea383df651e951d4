"""The command line: parse, call, print, exit code. Results on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path

from compat import store
from compat.combo import SCALES, Combo, UnknownCombo, load
from compat.combo import choose as choose_combos
from compat.reports.text import printable
from compat.result import INCOMPLETE, OK, USAGE, Run
from compat.suites import UnknownSuite, catalogue
from compat.suites import choose as choose_suites

LOG = "MODIFICATIONS_LOG.md"

EXIT_CODES = """\
exit codes:
  0  every check passed or was skipped with a reason
  1  a check failed: the target's doing
  2  wrong usage
  3  could not complete: nothing could be asked, interrupted, or an error of ours
"""
RUN_EXAMPLES = """\
examples:
  compat run                                    the model in this folder, default combo
  compat run ../my-fork --suite save_load       one check on a fork elsewhere
  compat run .@v0.2 --json run.json             a git ref, with a copy of the run
  compat run models.vlm:MyVLM --python .venv/bin/python
"""
LOCK_CODES = """\
exit codes:
  0  the lock is written, whatever it says of the target
  2  wrong usage
  3  could not complete: nothing could be asked, the file cannot be written, or an error of ours
"""
LOCK_EXAMPLES = """\
examples:
  compat lock . -o now.json                     the model in this folder, default combo
  compat lock ../my-fork@v0.2 > then.json       a git ref, on stdout
"""
COMPARE_CODES = """\
exit codes:
  0  identical, or only additions
  1  behaviour changed, or something breaks
  2  wrong usage
  3  could not complete: a side could not be asked, or an error of ours
"""
COMPARE_EXAMPLES = """\
examples:
  compat compare .@main .                       what the working tree changed
  compat compare ../nanoVLM ../my-fork          a fork against where it came from
  compat compare then.json now.json             two locks (compat lock): answers at once
"""


class Usage(ValueError):
    """The arguments contradict each other or the rules; the message says how."""


def parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "compat",
        description="Judge a nanoVLM-style model in a process of its own.",
        epilog=EXIT_CODES,
        formatter_class=shape,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run the checks and log what they say",
        formatter_class=shape,
        description="Run every check against TARGET, show a table, and append to the log.\n"
        "Running a fork runs its code: its environment is scrubbed, but that is no sandbox.",
        epilog=RUN_EXAMPLES + "\n" + EXIT_CODES,
    )
    run.add_argument(
        "target",
        nargs="?",
        default=".",
        metavar="TARGET",
        help="folder (default: .), FOLDER@REF, package.module:Class or file.py:Class",
    )
    run.add_argument(
        "--combo",
        action="append",
        metavar="NAME",
        help="which backbones; may be given again (see compat list)",
    )
    run.add_argument(
        "--suite",
        action="append",
        metavar="NAME",
        help="only this check; may be given again (see compat list)",
    )
    run.add_argument(
        "--scale",
        choices=SCALES,
        default="tiny",
        help="tiny: same shape, small sizes (default); full: real sizes",
    )
    run.add_argument(
        "--python", metavar="PATH", help="the interpreter the target runs in (default: this one)"
    )
    run.add_argument(
        "--timeout", type=seconds, default=60.0, metavar="S", help="seconds a question may take (default: 60)"
    )
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument(
        "--json", metavar="FILE", help="also write the run here; - prints it instead of the table"
    )
    log = run.add_mutually_exclusive_group()
    log.add_argument(
        "--log", metavar="FILE", help="append the entry here (default: ./MODIFICATIONS_LOG.md, in CI nowhere)"
    )
    log.add_argument("--no-log", action="store_true", help="write no log entry")
    loud = run.add_mutually_exclusive_group()
    loud.add_argument("-q", "--quiet", action="store_true", help="verdict and failures only")
    loud.add_argument(
        "-v", "--verbose", action="store_true", help="name every test, show what the target printed"
    )
    run.set_defaults(call=command_run)

    lock = commands.add_parser(
        "lock",
        help="write down everything a model does, one fact a line",
        formatter_class=shape,
        description="Ask TARGET everything in one combo and write the answers as a lock: on stdout, or to FILE.\n"
        "What the target does not have, or fails at, is a fact of it too.",
        epilog=LOCK_EXAMPLES + "\n" + LOCK_CODES,
    )
    lock.add_argument("target", nargs="?", default=".", metavar="TARGET", help="as in compat run (default: .)")
    lock.add_argument("--combo", metavar="NAME", help="which backbones (default: the first default of compat list)")
    lock.add_argument("--scale", choices=SCALES, default="tiny", help="tiny (default) or full: real sizes")
    lock.add_argument("--python", metavar="PATH", help="the interpreter the target runs in (default: this one)")
    lock.add_argument("--timeout", type=seconds, default=60.0, metavar="S", help="seconds a question may take")
    lock.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    lock.add_argument("-o", "--output", metavar="FILE", help="write the lock here and say how much it holds")
    lock.set_defaults(call=command_lock)

    compare = commands.add_parser(
        "compare",
        help="say what changed between two models, and for whom",
        formatter_class=shape,
        description="Compare A with B: lock files, or targets as in compat run, which are locked first.",
        epilog=COMPARE_EXAMPLES + "\n" + COMPARE_CODES,
    )
    compare.add_argument("a", metavar="A", help="the old side: a lock file or a target")
    compare.add_argument("b", metavar="B", help="the new side")
    compare.add_argument("--combo", metavar="NAME", help="which backbones (default: the lock's, or the first)")
    compare.add_argument("--scale", choices=SCALES, help="tiny or full (default: the lock's, or tiny)")
    compare.add_argument("--python", metavar="PATH", help="the interpreter targets run in (default: this one)")
    compare.add_argument("--timeout", type=seconds, default=60.0, metavar="S", help="seconds a question may take")
    compare.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    compare.add_argument("--json", metavar="FILE", help="also write the findings here; - prints them, not the table")
    compare.set_defaults(call=command_compare)

    explain = commands.add_parser("explain", help="what a rule means, and how to mend what it finds")
    explain.add_argument("rule", nargs="?", metavar="RULE", help="such as LOAD.key_removed; without it, all of them")
    explain.set_defaults(call=command_explain)

    listing = commands.add_parser("list", help="what there is to choose from: combos and checks")
    listing.set_defaults(call=command_list)
    return top


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:  # NaN fails this too
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (see EXIT_CODES). argparse itself exits with 2."""
    options = parser().parse_args(argv)
    try:
        code = options.call(options)
        sys.stdout.flush()  # a full disk or a closed pipe behind stdout shows here, not after the exit code is set
        return code
    except (UnknownCombo, UnknownSuite, Usage) as error:
        return complain(str(error), USAGE)
    except KeyboardInterrupt:
        return complain("interrupted before anything was answered", INCOMPLETE)
    except BrokenPipeError:  # the reader had enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INCOMPLETE
    except Exception as error:  # Python would exit with 1, which says that the target failed
        traceback.print_exc()
        return complain(f"an error of ours, no verdict on the target: {type(error).__name__}: {error}", INCOMPLETE)


def complain(message: str, code: int) -> int:
    print(f"compat: {message}", file=sys.stderr)
    return code


def command_list(options: argparse.Namespace) -> int:
    print("combos (--combo)")
    for combo in load().values():
        print(f"  {combo.name:18} {combo.vision} + {combo.language}{'  (default)' if combo.default else ''}")
    print("\nchecks (--suite)")
    for suite in catalogue():
        print(f"  {suite.name:14} {suite.title:28} {suite.about}")
    return OK


def command_run(options: argparse.Namespace) -> int:
    """Judge the target; save the run, log it, show it."""
    # Here, not above: --help and list answer without pytest, rich or numpy.
    from compat.plugin import judge, run_limit_s
    from compat.process import Child, CouldNotAsk
    from compat.reports.terminal import Watcher
    from compat.target import TargetError, resolve

    combos, suites = choose_combos(options.combo), choose_suites(options.suite)
    try:
        target = resolve(options.target)
    except TargetError as error:
        return complain(str(error), error.exit_code)
    log = log_path(options, target.folder)
    described = {
        "label": target.label,
        "folder": str(target.folder),
        "ref": target.ref,
        "commit": target.commit,
        "dirty": target.dirty,
    }
    run = Run.begin(described, options.scale, [combo.name for combo in combos])
    limit_s = run_limit_s(options.timeout)
    watcher = Watcher(level=0 if options.quiet else 2 if options.verbose else 1, several=len(combos) > 1)
    child = Child(
        target,
        python=options.python,
        timeout_s=options.timeout,
        run_timeout_s=limit_s,
        device=options.device,
        scale=options.scale,
    )
    try:
        judge(run, child, combos, suites, limit_s, watcher)
    except CouldNotAsk as error:
        run.incomplete, run.output = str(error), child.output
    finally:
        watcher.stop()
        child.close()
    if not run.results:
        if options.json:
            write_json(run, options.json)
        if options.verbose and run.output.strip():
            print(printable(run.output).rstrip(), file=sys.stderr)
        return complain(run.incomplete, INCOMPLETE)
    return keep_and_show(run, options, log)


def command_lock(options: argparse.Namespace) -> int:
    """Ask everything in one combo; print the lock, or write it and say how much it holds."""
    from compat import lock
    from compat.process import Child, CouldNotAsk
    from compat.target import TargetError, resolve

    combo = choose_combos([options.combo] if options.combo else None)[0]
    if options.output and not Path(options.output).resolve().parent.is_dir():
        raise Usage(f"-o {options.output}: there is no folder {Path(options.output).parent}")
    try:
        target = resolve(options.target)
    except TargetError as error:
        return complain(str(error), error.exit_code)
    limit_s = lock.limit_s(options.timeout, options.scale)
    told = {"python": options.python, "timeout_s": options.timeout, "device": options.device, "scale": options.scale}
    try:
        with Child(target, run_timeout_s=limit_s, **told) as child:
            made = lock.make(child, combo, options.scale)
    except (CouldNotAsk, lock.LockFailed) as error:
        return complain(str(error), INCOMPLETE)
    if not options.output:
        sys.stdout.write(lock.dumps(made))
        return OK
    try:
        lock.write(Path(options.output), made)
    except OSError as error:
        return complain(f"{options.output} was not written: {error.strerror or error}", INCOMPLETE)
    print(f"{options.output}: {lock.summary(made)}")
    return OK


def command_compare(options: argparse.Namespace) -> int:
    """Read or make two locks, compare them, show what changed."""
    from compat import lock
    from compat.process import CouldNotAsk
    from compat.reports.comparison import show
    from compat.rules import NotComparable, compare
    from compat.target import TargetError

    try:
        sides = [lock.read(Path(text)) if is_lock_file(text) else None for text in (options.a, options.b)]
        held = next((side for side in sides if side), {"combo": None, "scale": "tiny"})
        for name in ("combo", "scale"):
            wanted = getattr(options, name) or held[name]
            for side in sides:
                if side and side[name] != wanted:
                    raise Usage(f"a lock is of {name} {side[name]}, but {wanted} is wanted: both must be of one")
        if options.combo or None in sides:
            name = options.combo or held["combo"]
            combo, scale = choose_combos([name] if name else None)[0], options.scale or held["scale"]
            texts = (options.a, options.b)
            sides = [side or made_lock(text, combo, scale, options) for side, text in zip(sides, texts, strict=True)]
        found = compare(*sides)
    except (lock.NotALock, NotComparable) as error:
        return complain(str(error), USAGE)
    except TargetError as error:
        return complain(str(error), error.exit_code)
    except (CouldNotAsk, lock.LockFailed, OSError) as error:
        return complain(str(error), INCOMPLETE)
    if options.json:
        text = json.dumps(found.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
            return found.exit_code
        try:
            store.write_atomic(Path(options.json), text.encode("utf-8"))
        except OSError as error:
            complain(f"{options.json} was not written: {error.strerror or error}", found.exit_code)
    try:
        show(found)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return found.exit_code


def is_lock_file(text: str) -> bool:
    """A file, but not file.py:Class, which does not exist under that name."""
    return Path(text).is_file() or text.endswith(".json")


def made_lock(text: str, combo: Combo, scale: str, options: argparse.Namespace) -> dict:
    """The lock of a target, through a child of its own. Raises TargetError, CouldNotAsk, LockFailed."""
    from compat import lock
    from compat.process import Child
    from compat.target import resolve

    target = resolve(text)
    print(f"compat: asking {target.label}", file=sys.stderr)
    told = {"python": options.python, "timeout_s": options.timeout, "device": options.device, "scale": scale}
    with Child(target, run_timeout_s=lock.limit_s(options.timeout, options.scale), **told) as child:
        return lock.make(child, combo, scale)


def command_explain(options: argparse.Namespace) -> int:
    from compat.reports.comparison import explain, listing
    from compat.rules import UnknownRule, find_rule

    try:
        print(explain(find_rule(options.rule)) if options.rule else listing())
    except UnknownRule as error:
        return complain(f"{error} (compat explain lists them all)", USAGE)
    return OK


def keep_and_show(run: Run, options: argparse.Namespace, log: Path | None) -> int:
    """Save, log and print. What cannot be written is said on stderr; the exit code stays the run's."""
    from compat.reports.log import LogNotWritten, append, entry
    from compat.reports.terminal import show

    path = str(store.path_of(run))
    if log:
        run.log = {"path": str(log), "entry": entry(run, path), "error": ""}
    saved = save(run)  # before the log names it
    if log:
        try:
            append(log, run.log["entry"])
        except LogNotWritten as error:
            run.log["error"] = str(error)
            complain(f"{error}; the entry is kept in {path if save(run) else 'no file'}", run.exit_code)
    if options.json:
        write_json(run, options.json)
    if options.json != "-":
        try:
            show(run, path if saved else None, quiet=options.quiet, verbose=options.verbose)
            sys.stdout.flush()
        except BrokenPipeError:  # `compat run | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return run.exit_code


def save(run: Run) -> bool:
    try:
        store.save(run)
    except OSError as error:
        complain(f"the run was not saved in {store.RUNS}: {error.strerror or error}", run.exit_code)
        return False
    return True


def write_json(run: Run, where: str) -> None:
    if where == "-":
        sys.stdout.write(store.dumps(run).decode("utf-8"))
        return
    try:
        store.write_atomic(Path(where), store.dumps(run))
    except OSError as error:
        complain(f"{where} was not written: {error.strerror or error}", run.exit_code)


def log_path(options: argparse.Namespace, folder: Path) -> Path | None:
    """Where the entry goes; None for nowhere. Raises Usage for a file inside the target.

    The target's own log is written only from inside it: judging somebody's fork leaves its files alone.
    """
    if options.no_log:
        return None
    here, folder = Path.cwd().resolve(), folder.resolve()
    if options.log:
        path = Path(options.log)
        if path.resolve().is_relative_to(folder) and here != folder:
            raise Usage(
                f"--log {path} lies inside the target {folder}, which is not written to; "
                "choose another file, or run from inside the target"
            )
        return path
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return None
    if here != folder and here.is_relative_to(folder):
        print(
            f"compat: not logged: this folder is part of the target {folder}; use --log FILE", file=sys.stderr
        )
        return None
    return Path(LOG)
