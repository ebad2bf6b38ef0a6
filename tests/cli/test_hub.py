"""Hub ids: from the cache without a network, and one line where the hub says no."""

import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run, is_one_line

HASH = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for what is not there, and for what is not for everyone."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def online(endpoint: str, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
    }


def test_not_found(shell: Run, tmp_path: Path, endpoint: str) -> None:
    result = shell("diagnose", "someone/something", **online(endpoint, tmp_path))
    assert is_one_line(result)
    assert "no public model of the hub of that name" in result.err


def test_gated(shell: Run, tmp_path: Path, endpoint: str) -> None:
    result = shell("diagnose", "someone/gated", **online(endpoint, tmp_path))
    assert is_one_line(result)
    assert "ask on its page, then run `hf auth login`" in result.err


def test_hub_out_of_reach(shell: Run, tmp_path: Path) -> None:
    # Port 9 is that of the discard service, which nobody runs.
    result = shell("diagnose", "someone/something", **online("http://127.0.0.1:9", tmp_path))
    assert is_one_line(result)
    assert "the hub cannot be reached" in result.err


def test_offline_and_not_in_the_cache(shell: Run, tmp_path: Path) -> None:
    result = shell("diagnose", "someone/something", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert is_one_line(result)
    assert "not in the cache" in result.err


def test_offline_from_the_cache(shell: Run, tmp_path: Path, saved: Callable[[str], Path]) -> None:
    repository = tmp_path / "hub" / "models--someone--something"
    shutil.copytree(saved("llama"), repository / "snapshots" / HASH)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HASH)
    result = shell(
        "diagnose", "someone/something", "--json", tmp_path / "out.json",
        HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "someone/something" in result.out
    assert os.path.getsize(tmp_path / "out.json") > 0
