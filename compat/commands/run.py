"""``compat run``: every check against one target, a table, an entry in the log."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

from compat import store
from compat.combo import choose as choose_combos
from compat.commands import (
    SHAPE,
    Usage,
    add_asking,
    add_template,
    complain,
    keep,
    outputs,
    templates_of,
    write_json,
)
from compat.reports.text import printable
from compat.result import INCOMPLETE, Run
from compat.suites import choose as choose_suites

LOG = "MODIFICATIONS_LOG.md"
EXIT_CODES = """\
exit codes:
  0  every check passed or was skipped with a reason
  1  a check failed: the target's doing
  2  wrong usage
  3  could not complete: nothing could be asked, interrupted, or an error of ours
"""
EXAMPLES = """\
examples:
  compat run                                    the model in this folder, default combo
  compat run ../my-fork --suite save_load       one check on a fork elsewhere
  compat run .@v0.2 --json run.json             a git ref, with a copy of the run
  compat run models.vlm:MyVLM --python .venv/bin/python
  compat run ../my-fork --watch                 again after each change, only what it can affect
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "run",
        help="run the checks and log what they say",
        formatter_class=SHAPE,
        description="Run every check against TARGET, show a table, and append to the log.\n"
        "Running a fork runs its code: its environment is scrubbed, but that is no sandbox.",
        epilog=EXAMPLES + "\n" + EXIT_CODES,
    )
    command.add_argument(
        "target",
        nargs="?",
        default=".",
        metavar="TARGET",
        help="folder (default: .), FOLDER@REF, package.module:Class or file.py:Class",
    )
    command.add_argument(
        "--combo",
        action="append",
        metavar="NAME",
        help="which backbones; may be given again (see compat list)",
    )
    command.add_argument(
        "--suite",
        action="append",
        metavar="NAME",
        help="only this check; may be given again (see compat list)",
    )
    add_asking(command)
    command.add_argument(
        "--json", metavar="FILE", help="also write the run here; - prints it instead of the table"
    )
    log = command.add_mutually_exclusive_group()
    log.add_argument(
        "--log", metavar="FILE", help="append the entry here (default: ./MODIFICATIONS_LOG.md, in CI nowhere)"
    )
    log.add_argument("--no-log", action="store_true", help="write no log entry")
    outputs.add_arguments(command)
    add_template(command)
    loud = command.add_mutually_exclusive_group()
    loud.add_argument("-q", "--quiet", action="store_true", help="verdict and failures only")
    loud.add_argument(
        "-v", "--verbose", action="store_true", help="name every test, show what the target printed"
    )
    command.add_argument(
        "--watch", action="store_true", help="stay, and after each change ask what it can affect; nothing is kept"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Judge the target; save the run, log it, show it."""
    # Here, not above: --help and list answer without pytest, rich or numpy.
    from compat import process
    from compat.checkout import tags
    from compat.parallel import places
    from compat.plugin import run_limit_s
    from compat.reports.terminal import Watcher
    from compat.several import judge_several
    from compat.target import TargetError, resolve

    combos, suites = choose_combos(options.combo), choose_suites(options.suite)
    if why := outputs.why_not(options):
        return complain(why, INCOMPLETE)
    try:
        target = resolve(options.target)
    except TargetError as error:
        return complain(str(error), error.exit_code)
    if options.watch:
        return watch_target(options, target, combos, suites)
    log = log_path(options, target.folder)
    templates = templates_of(options)
    described = {
        "label": target.label,
        "folder": str(target.folder),
        "ref": target.ref,
        "commit": target.commit,
        "dirty": target.dirty,
        "tags": tags(target.folder),
    }
    run = Run.begin(described, options.scale, [combo.name for combo in combos])
    limit_s = run_limit_s(options.timeout)
    watcher = Watcher(level=0 if options.quiet else 2 if options.verbose else 1, several=len(combos) > 1)
    told = {"python": options.python, "timeout_s": options.timeout, "device": options.device, "scale": options.scale}
    at_once = places(len(combos), options.scale, options.device)
    try:
        make_child = functools.partial(process.Child, target, run_timeout_s=limit_s, **told)
        judge_several(run, make_child, combos, suites, limit_s, watcher, at_once)
    finally:
        watcher.stop()
    if not run.results:
        if options.json:
            write_json(run, options.json)
        outputs.write(options, run)
        if options.verbose and run.output.strip():
            print(printable(run.output).rstrip(), file=sys.stderr)
        return complain(run.incomplete, INCOMPLETE)
    return keep_and_show(run, options, log, templates)


def watch_target(options: argparse.Namespace, target, combos, suites) -> int:
    """Until Ctrl-C; the exit code is that of the last run."""
    from compat.asking import described
    from compat.plugin import run_limit_s
    from compat.reports.terminal import Watcher, show
    from compat.several import judge_several
    from compat.watch import Loaded, Observed, finder, watch

    if target.ref:
        raise Usage(f"--watch {target.label}: a commit does not change; name the folder")
    if outputs.asked(options) or options.json or options.log:
        raise Usage("--watch keeps nothing: leave out --json, --log, --junit, --sarif and --comment")
    told = {"python": options.python, "timeout_s": options.timeout, "device": options.device, "scale": options.scale}
    limit_s, codes = run_limit_s(options.timeout), [INCOMPLETE]

    def ask(titles: tuple[str, ...]) -> tuple[dict, bool]:
        run = Run.begin(described(target), options.scale, [combo.name for combo in combos])
        level = 0 if options.quiet else 2 if options.verbose else 1
        loaded = Loaded(Watcher(level=level, several=len(combos) > 1))

        def make_child() -> Observed:
            loaded.child = Observed(target, run_timeout_s=limit_s, **told)
            return loaded.child

        try:
            judge_several(run, make_child, combos, [s for s in suites if s.title in titles], limit_s, loaded)
        finally:
            loaded.stop()
        loaded.note()
        codes.append(run.exit_code)
        show(run, None, quiet=options.quiet, verbose=options.verbose)
        if run.incomplete.startswith("interrupted"):
            raise KeyboardInterrupt
        return loaded.by_check, not run.incomplete

    def tell(line: str) -> None:
        print(f"compat: {printable(line)}", file=sys.stderr, flush=True)

    try:
        watch(target.folder, [suite.title for suite in suites], ask, tell, finder(target))
    except KeyboardInterrupt:
        tell("no longer watching")
    return codes[-1]


def keep_and_show(run: Run, options: argparse.Namespace, log: Path | None, templates) -> int:
    """Save, log and print. What cannot be written is said on stderr; the exit code stays the run's."""
    from compat.reports.terminal import show

    saved = keep(run, log, templates)
    wrote = [not options.json or write_json(run, options.json), outputs.write(options, run)]
    if options.json != "-":
        try:
            show(run, str(store.path_of(run)) if saved else None, quiet=options.quiet, verbose=options.verbose)
            sys.stdout.flush()
        except BrokenPipeError:  # `compat run | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return run.exit_code if all(wrote) else run.exit_code or INCOMPLETE


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
