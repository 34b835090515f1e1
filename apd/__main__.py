"""`python -m apd` is the command `apd`."""

import sys

from apd.cli import main

if __name__ == "__main__":
    sys.exit(main())
