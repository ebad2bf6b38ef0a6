"""The benchmarks run, in short, and write what they say they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py")))
def test_quick_run(name: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--out", str(out)]
    if (
        name == "operators"
    ):  # all rows would take minutes; each has its own tests of what it computes
        command += ["--only", "flow", "hierarchical", "taylor"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["machine"]["threads"] == 1
    assert figures["machine"]["torch"]
    if name == "map_statistics":
        assert max(figures["difference from the eager map"].values()) < 1e-4
        assert set(figures["lengths"]) == {"256", "512"}
        for length in figures["lengths"].values():
            assert length["SDPA forward"]["over SDPA"] == 1
            assert all(found["seconds"] > 0 for found in length.values())
    if name == "diagnose":
        assert figures["diagnose over forward"] > 1
