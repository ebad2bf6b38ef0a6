"""`python -m attending` is the command `attending`."""

from attending.cli import main

if __name__ == "__main__":
    main()
