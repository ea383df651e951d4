"""``compat report``: all saved runs as one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compat import store
from compat.commands import SHAPE, Usage, add_template, complain, templates_of
from compat.result import INCOMPLETE, OK

PAGE = Path(".compat", "report.html")
EXAMPLES = """\
examples:
  compat report --open                          write .compat/report.html and show it
  compat report -o report.html                  somewhere else; - prints it
  compat report --badge badge.svg               only a badge: checks that pass now (badge.json: for a badge server)

exit codes:
  0  the page is written, whatever it says of the target
  2  wrong usage
  3  could not complete: there are no runs, or the page cannot be written
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "report",
        help="all saved runs as one page",
        formatter_class=SHAPE,
        description="Write one self-contained HTML page about the runs saved here. Nothing is judged anew.",
        epilog=EXAMPLES,
    )
    command.add_argument("--open", action="store_true", help="show it in the browser")
    command.add_argument("-o", "--output", metavar="FILE", help=f"where to write it (default: {PAGE})")
    command.add_argument("--badge", metavar="FILE", help="write a badge there, .svg or .json, and no page without -o")
    runs = str(store.RUNS)
    command.add_argument("--runs", metavar="DIR", default=runs, help=f"where the runs are (default: {runs})")
    add_template(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from compat.reports.history import History
    from compat.reports.html import page
    from compat.reports.templating import TemplateBroken

    templates = templates_of(options)
    if options.badge and Path(options.badge).suffix not in (".svg", ".json"):
        raise Usage(f"--badge {options.badge}: a badge is FILE.svg, or FILE.json for a badge server")
    history = History.read(Path(options.runs))
    if not history.runs:
        unread = "".join(f"; not read: {text}" for text in history.unread[:3])
        return complain(f"there are no runs in {options.runs}: compat run makes one{unread}", INCOMPLETE)
    if options.badge:
        code = write_badge(history, Path(options.badge))
        if code or not (options.output or options.open):
            return code
    try:
        text = page(history, templates, options.runs)
    except TemplateBroken as error:
        return complain(str(error), INCOMPLETE)
    if options.output == "-":
        sys.stdout.write(text)
        return OK
    path = Path(options.output) if options.output else PAGE
    try:
        if not options.output:
            path.parent.mkdir(exist_ok=True)
        store.write_atomic(path, text.encode("utf-8"))
    except OSError as error:
        return complain(f"{path} was not written: {error.strerror or error}", INCOMPLETE)
    print(f"{path}: {len(history.runs)} runs, {len(text.encode('utf-8')) / 1000:.0f} kB")
    if options.open:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            return complain(f"no browser could be opened; {path} is written", OK)
    return OK


def write_badge(history, path: Path) -> int:
    from compat.reports.badge import shields, svg

    try:
        store.write_atomic(path, (svg if path.suffix == ".svg" else shields)(history).encode("utf-8"))
    except OSError as error:
        return complain(f"{path} was not written: {error.strerror or error}", INCOMPLETE)
    print(f"{path}: {len(history.runs)} runs")
    return OK
