"""``compat doctor``: what is missing on this machine, and how to get it."""

from __future__ import annotations

import argparse
import json
import sys

from compat.commands import SHAPE, complain, unwritable
from compat.result import INCOMPLETE

EXAMPLES = """\
examples:
  compat doctor                                 this machine, and this interpreter
  compat doctor --python ../my-fork/.venv/bin/python
                                                the fork's interpreter instead, for what asks the fork

exit codes:
  0  everything that is needed is there; what is only absent is said, with what it would be for
  1  something that is needed is missing
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "doctor",
        help="what is missing on this machine, and how to get it",
        formatter_class=SHAPE,
        description="Look at interpreter, packages, programs, memory, disk and folders. Nothing is judged or changed.",
        epilog=EXAMPLES,
    )
    command.add_argument("--python", metavar="PATH", help="the interpreter that targets run in (default: this one)")
    command.add_argument("--json", metavar="FILE", help="also write the answers here; - prints them instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from compat import store
    from compat.doctor import as_json, examine, exit_code
    from compat.reports.text import one_line

    if why := unwritable(options.json):
        return complain(why, INCOMPLETE)
    answers = examine(options.python)
    if options.json:
        text = json.dumps(as_json(answers), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
            return exit_code(answers)
        try:
            store.write_atomic(Path(options.json), text.encode("utf-8", "replace"))
        except OSError as error:
            return complain(f"{options.json} was not written: {error.strerror or error}", INCOMPLETE)
    wide = max(len(answer.name) for answer in answers)
    for answer in answers:
        print(f"{answer.word:8} {answer.name:{wide}}  {one_line(answer.found, 200)}")
        if not answer.ok:
            print(f"{'':8} {'':{wide}}  {one_line(answer.get, 300)}")
    missing = [answer.name for answer in answers if answer.needed and not answer.ok]
    print(f"\n{'missing: ' + ', '.join(missing) if missing else 'everything that is needed is here'}")
    return exit_code(answers)
