"""A catalogue that has one more paper: `pi.py` of this folder, as a module of the package."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attending import papers
from attending.papers._experiment import Experiment
from tests.papers import pi


@pytest.fixture
def pi_experiment() -> Experiment:
    return Experiment(
        paper=pi.PAPER, reproduce=pi.reproduce, settings=pi.settings, sources=(Path(pi.__file__),)
    )


@pytest.fixture
def with_pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The catalogue finds `pi_points.py`; gives the file, which a test may edit."""
    module = tmp_path / "more_papers" / "pi_points.py"
    module.parent.mkdir()
    shutil.copy(pi.__file__, module)
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(module.parent)])
    yield module
    sys.modules.pop("attending.papers.pi_points", None)
    vars(papers).pop("pi_points", None)
