"""The command as users start it: `run` in this process, which is quick, `shell` in its own."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from attending.cli import main
from tests.cli import models

COMMAND = Path(sys.executable).with_name("attending")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("diagnose", "minilm", stdin=b"...")`: exit code, stdout, stderr."""

    def call(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return Result(int(exit_.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def shell(tmp_path: Path) -> Run:
    """The same through the installed entry point, in an empty folder."""
    folder = tmp_path / "working"
    folder.mkdir()

    def call(*arguments: object, stdin: bytes = b"", **environment: str) -> Result:
        done = subprocess.run(
            [COMMAND, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment},
            timeout=120,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `models`, saved once; tests must leave it as it is."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        path = root / kind
        return path if path.exists() else getattr(models, kind)(path)

    return folder


def is_one_line(result: Result) -> bool:
    """Whether a command ended as a wrong input should: exit code 2, one line, no traceback."""
    lines = result.err.strip().splitlines()
    return result.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
