"""What goes wrong is one line on stderr that says what to do, and an exit code, before any work."""

import os
import sys
from pathlib import Path

import pytest

import attending
from attending.cli import diagnose
from attending.cli.app import app
from attending.cli.outputs import check_writable
from tests.cli.conftest import Run, is_one_line


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model ends the test: what is wrong has to be said before."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded before the check")

    monkeypatch.setattr("attending.cli.loading.load_model", load)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text; give at least a sentence"),
        (b" \n\t ", "holds no text"),
        (b"caf\xe9 au lait", "is not UTF-8 (byte 3 is 0xe9); convert it"),
    ],
)
def test_text_that_is_none(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    for result in (
        run("diagnose", "llama-stdlib", "--text", tmp_path / "text"),
        run("diagnose", "llama-stdlib", "--text", "-", stdin=content),
    ):
        assert is_one_line(result)
        assert message in result.err
        assert result.out == ""


@pytest.mark.usefixtures("no_work")
def test_text_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        result = run("diagnose", "llama-stdlib", "--text", path)
        assert is_one_line(result)
        assert str(path) in result.err
        assert reason in result.err


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("option", ["--html", "--json"])
def test_output_that_cannot_be_written(run: Run, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "x", "there is no folder"),
        (tmp_path / "file" / "x", "there is no folder"),
        (Path("/proc/attending"), "cannot be written"),  # even for root
    ):
        result = run("diagnose", "llama-stdlib", option, path)
        assert is_one_line(result)
        assert f"{option} {path}" in result.err
        assert reason in result.err


@pytest.mark.usefixtures("no_work")
def test_one_path_for_two_outputs(run: Run, tmp_path: Path) -> None:
    result = run("diagnose", "minilm", "--html", tmp_path / "x", "--json", tmp_path / "x")
    assert is_one_line(result)


def test_check_of_an_output_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "new", "--html")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_text("kept")
    check_writable(tmp_path / "old", "--html")
    assert (tmp_path / "old").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert is_one_line(run("diagnose", "minilm", "--html", tmp_path / "x"))


def test_models_and_devices(run: Run, tmp_path: Path) -> None:
    for arguments, message in (
        (["no-such-model"], "zoo models are"),
        ([tmp_path], "has no config.json"),
        (["llama-stdlib", "--device", "gpu"], "--device gpu is no device"),
    ):
        result = run("diagnose", *arguments)
        assert is_one_line(result)
        assert message in result.err


def test_path_with_markup_is_shown_as_it_is(run: Run) -> None:
    result = run("diagnose", "./[red]x[/red]\x1b[31m")
    assert is_one_line(result)
    assert "./[red]x[/red]\\u001b[31m" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["diagnose"],
        ["diagnose", "minilm", "--dtype", "int8"],
        ["diagnose", "minilm", "--max-tokens", "0"],
        ["diagnose", "minilm", "--bogus"],
        ["nothing"],
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Usage:" in result.err
    assert "Traceback" not in result.err


def test_debug_shows_the_traceback_wherever_it_stands(run: Run) -> None:
    for arguments in (["--debug", "diagnose", "no/such/m"], ["diagnose", "no/such/m", "--debug"]):
        result = run(*arguments)
        assert result.code == 2
        assert "Traceback" in result.err
        assert "HFValidationError" in result.err  # the cause, too
        assert result.err.strip().splitlines()[-1].startswith("error: ")


def test_a_fault_of_ours_is_no_wrong_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(diagnose, "check_writable", fail)
    result = run("diagnose", "minilm", "--html", "x")
    assert result.code == 1
    assert result.err.strip() == (
        "error: ZeroDivisionError: division by zero (a fault; --debug shows where)"
    )


def test_interrupt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnose, "check_writable", interrupt)
    result = run("diagnose", "minilm", "--html", "x")
    assert result.code == 130
    assert "Traceback" not in result.err


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"attending {attending.__version__}\n"
    for arguments in (["--help"], ["-h"], ["diagnose", "--help"], ["zoo", "train", "-h"]):
        result = run(*arguments)
        assert result.code == 0
        assert "Usage: attending" in result.out


def test_commands_are_documented() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__


def test_help_loads_nothing_slow(shell: Run) -> None:
    result = shell("--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.code == 0
    loaded = {line.rpartition("|")[2].strip() for line in result.err.splitlines()}
    assert "typer" in loaded
    assert not {"torch", "transformers", "numpy", "plotly", "jinja2"} & loaded


def test_python_minus_m(run: Run) -> None:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "attending", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"attending {attending.__version__}\n")
