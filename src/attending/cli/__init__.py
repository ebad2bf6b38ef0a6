"""The command `attending`. `main` is its entry point; every command is a file of this folder."""

from attending.cli.app import main as main
