"""``python -m nanovlm``."""

import sys

from nanovlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
