"""``compat migrate``: an old checkpoint under the keys of a new version, with the proof beside it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compat.combo import choose as choose_combos
from compat.commands import SHAPE, Usage, complain, seconds
from compat.result import INCOMPLETE, OK, REGRESSION

EXIT_CODES = """\
exit codes:
  0  written and proved, or nothing to convert: the checkpoint loads as it is
  1  no way to convert it was found or proved; nothing is written
  2  wrong usage
  3  could not complete: a side could not be asked, the folder cannot be written, or an error of ours
"""
EXAMPLES = """\
examples:
  compat migrate checkpoints/old --to . -o checkpoints/new
  compat migrate checkpoints/old --from .@v1 --to .        proved by equal logits, not by names and shapes alone
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "migrate",
        help="write an old checkpoint under the keys of a new version",
        formatter_class=SHAPE,
        description="Load the checkpoint in TARGET through renames, transpositions, fusions and splits of tensors,\n"
        "and write what TARGET saves, with migration.json beside it: how, and what proves it.",
        epilog=EXAMPLES + "\n" + EXIT_CODES,
    )
    command.add_argument("checkpoint", metavar="CKPT", help="a folder with config.json and safetensors files")
    command.add_argument("--to", required=True, metavar="TARGET", help="the version that shall load it")
    command.add_argument("--from", dest="old", metavar="TARGET", help="the version that saved it, to compare logits")
    command.add_argument("-o", "--output", metavar="FOLDER", help="where to write (default: CKPT-migrated)")
    command.add_argument("--combo", metavar="NAME", help="which backbones (default: the first default of compat list)")
    command.add_argument("--python", metavar="PATH", help="the interpreter of both versions (default: this one)")
    command.add_argument("--timeout", type=seconds, default=600.0, metavar="S", help="seconds a question may take")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, prove, write."""
    from compat.lock import LockFailed
    from compat.migrate import NotMigrated, migrate
    from compat.process import Child, CouldNotAsk
    from compat.target import TargetError, resolve

    source = Path(options.checkpoint)
    if not source.is_dir() or not (source / "config.json").is_file() or not any(source.glob("*.safetensors")):
        raise Usage(f"{source} is no checkpoint: a folder with config.json and safetensors files is one")
    folder = Path(options.output) if options.output else source.with_name(source.resolve().name + "-migrated")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Usage(f"{folder} is there already and is not written over: choose another -o FOLDER")
    if not folder.resolve().parent.is_dir():
        raise Usage(f"-o {folder}: there is no folder {folder.parent}")
    combo = choose_combos([options.combo] if options.combo else None)[0]
    limits = {"timeout_s": options.timeout, "run_timeout_s": 10 * options.timeout}
    told = {"python": options.python, "scale": "full", **limits}
    try:
        old = Child(resolve(options.old), **told) if options.old else None
        new = Child(resolve(options.to), **told)
    except TargetError as error:
        return complain(str(error), error.exit_code)
    try:
        said = migrate(source.resolve(), old, new, combo, folder)
    except NotMigrated as error:
        return complain(f"{error}; nothing was written", REGRESSION)
    except (CouldNotAsk, LockFailed) as error:
        return complain(str(error), INCOMPLETE)
    except OSError as error:
        return complain(f"{folder} was not written: {error.strerror or error}", INCOMPLETE)
    finally:
        for child in (old, new):
            if child:
                child.close()
    sys.stdout.write("\n".join(said) + "\n")
    return OK
