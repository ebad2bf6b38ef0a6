"""Diagnoses and pages that take a while to make, once for all tests; nothing may change them."""

from pathlib import Path

import pytest

from attending.diagnosis.record import Diagnosis
from tests.report import synthetic


@pytest.fixture(scope="session")
def speech() -> Diagnosis:
    return synthetic.encoder_decoder()


@pytest.fixture(scope="session")
def speech_html(speech: Diagnosis) -> str:
    return speech.to_html()


@pytest.fixture(scope="session")
def huge() -> Diagnosis:
    return synthetic.large()


@pytest.fixture(scope="session")
def huge_html(huge: Diagnosis) -> str:
    return huge.to_html()


@pytest.fixture(scope="session")
def speech_url(speech_html: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(speech_html, tmp_path_factory.mktemp("pages") / "speech.html")


@pytest.fixture(scope="session")
def huge_url(huge_html: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(huge_html, tmp_path_factory.mktemp("pages") / "huge.html")


def saved(html: str, path: Path) -> str:
    """The address of the page on disk."""
    path.write_text(html, encoding="utf-8")
    return path.as_uri()
