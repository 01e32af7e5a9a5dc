"""``python -m qnative``: the command line."""

import sys

from qnative.cli import main

if __name__ == "__main__":
    sys.exit(main())
