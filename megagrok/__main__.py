"""`python -m megagrok` is the `megagrok` command."""

import sys

from megagrok.cli import main

if __name__ == "__main__":
    sys.exit(main())
