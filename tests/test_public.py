"""The names of the package: all there, lazy, and never hidden by a module of the same name."""

import subprocess
import sys

import attending as at

EVERYTHING = """
import importlib, pkgutil
import attending as at
for module in pkgutil.walk_packages(at.__path__, "attending."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(type(at.tap).__name__, type(at.diagnose).__name__, type(at.merge).__name__)
"""


def test_all_names_are_there() -> None:
    assert set(at.__all__) <= set(dir(at))
    for name in at.__all__:
        assert getattr(at, name) is not None


def test_an_unknown_name() -> None:
    assert not hasattr(at, "atention_state")


def test_no_module_hides_a_function() -> None:
    """Importing a submodule sets it on the package, so the two may not share a name."""
    run = subprocess.run(
        [sys.executable, "-c", EVERYTHING], capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["function", "function", "function"], run.stderr[-800:]
