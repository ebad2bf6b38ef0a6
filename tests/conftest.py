"""What all tests share: no network, one thread, the same numbers every time, a browser."""

import os

# Before anything imports a Hugging Face library: a test that would download fails at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.distributed import Ranks

CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

SHAPELY_ROOMS = (
    "core",
    "nn",
    "losses",
    "probes",
    "models",
    "interventions",
    "sparse",
    "decoding",
    "diffusion",
)

# A first call may load kernels, so no deadline. Under CI the examples are the same in every run:
# what fails there fails here, too.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if CI else "dev")

# Tests run side by side (pytest -n 2), each on its own core.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes",
        action="store_true",
        help="check all annotations of the package as its functions run: shapes, dtypes, types",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before any test file imports the package."""
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        import tools.annotations  # noqa: F401 - the hook looks it up by name

        assert not any(name.startswith("attending.") for name in sys.modules)
        install_import_hook(
            [f"attending.{room}" for room in SHAPELY_ROOMS], "tools.annotations.checked"
        )
        settings.register_profile("shapes", deadline=None, derandomize=True, max_examples=8)
        settings.load_profile("shapes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --shapes, leave out what annotations forbid on purpose, and what compiles."""
    if not config.getoption("--shapes"):
        return
    forbidden = re.compile(r"pytest\.raises|torch\.compile|subprocess|# not typed")
    kept, left_out = [], []
    for item in items:
        function = getattr(item, "function", None)
        source = "" if function is None else inspect.getsource(inspect.unwrap(function))
        (left_out if forbidden.search(source) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run; under CI a missing browser is a failure."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("browser") and CHROMIUM is None:
        reason = "needs the browser `chromium` (Debian: apt-get install chromium)"
        if CI:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two_processes() -> "Iterator[Ranks]":
    """Two ranks of a gloo group, started by the first test that runs something in them."""
    from tests.distributed import Ranks

    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Headless Chromium, for tests marked `browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            chromium_sandbox=os.geteuid() != 0,
            args=["--disable-gpu", "--disable-quic", "--disable-component-update"],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: "Browser") -> "Iterator[Page]":
    """An empty page without a network; a test in which a script of the page fails, fails."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: errors.append(message.text) if message.type == "error" else None,
    )
    yield page
    context.close()
    assert errors == []
