"""`python -m compat`. The current directory leaves the import path unless we ourselves live in it: a fork
under judgement owns top-level modules, and none of them may stand in for ours."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
if sys.path and os.path.realpath(sys.path[0] or ".") == os.getcwd() != str(HERE):
    del sys.path[0]

from compat.cli import main  # noqa: E402  (the path is put right first)

if __name__ == "__main__":
    sys.exit(main())
