"""`python -m attending` is the command `attending`."""

import sys

from attending.cli import main

if __name__ == "__main__":
    sys.exit(main())
