"""The fragment for notebooks: text and pictures, and nothing that reaches the notebook around."""

import math
import re

import pytest
from hypothesis import given, settings

from attending.diagnosis.record import Diagnosis
from tests.report import synthetic
from tests.report.hostile import TEXTS, saying, texts
from tests.report.test_html import Parsed

ELEMENTS = {"div", "span", "ul", "li", "b", "br", "code", "svg", "path"}
ATTRIBUTES = {
    "style", "role", "aria-label", "viewBox", "viewbox", "width", "height", "d", "opacity",
    "stroke", "stroke-width", "fill",
}  # fmt: skip


def test_a_notebook_gets_no_script_and_no_style_for_others(speech: Diagnosis) -> None:
    parsed = Parsed(speech._repr_html_())
    assert {tag for tag, _ in parsed.elements} <= ELEMENTS
    assert {name for _, names in parsed.elements for name in names} <= ATTRIBUTES
    styles = [value for _, name, value in parsed.attributes if name == "style"]
    assert not [style for style in styles if re.search(r"url\(|position|!important", style)]


def test_every_element_is_closed(speech: Diagnosis) -> None:
    html = speech._repr_html_()
    for tag in ("div", "span", "ul", "li", "b", "code", "svg"):
        assert len(re.findall(f"<{tag}[ >]", html)) == html.count(f"</{tag}>")


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_texts_are_only_text(text: str) -> None:
    plain = Parsed(saying("attn", "token", "words")._repr_html_())
    parsed = Parsed(saying(text)._repr_html_())
    assert parsed.elements == plain.elements
    assert parsed.odd == []


@given(texts, texts)
@settings(max_examples=60)
def test_any_text_is_only_text(name: str, words: str) -> None:
    html = saying(name, name, words)._repr_html_()
    html.encode("utf-8")
    assert Parsed(html).elements == Parsed(saying("a", "b", "c")._repr_html_()).elements


def test_findings_are_told_gravest_first(speech: Diagnosis) -> None:
    told = " ".join(Parsed(speech._repr_html_()).texts)
    assert told.index("Attention sink") < told.index("Collapsed heads") < told.index("Duplicate")
    assert "1 critical, 2 warnings, 1 note" in told


def test_many_findings_are_counted(speech: Diagnosis) -> None:
    many = Diagnosis.from_json(speech.to_json())
    many.findings = many.findings * 3
    assert "and 6 more findings" in many._repr_html_()


def test_a_square_per_head_and_map(speech: Diagnosis) -> None:
    heads = sum(layer.num_heads for layer in speech.layers)
    parsed = Parsed(speech._repr_html_())
    squares = sum(value.count("M") for tag, name, value in parsed.attributes if name == "d")
    assert squares == 2 * heads
    assert len([tag for tag, _ in parsed.elements if tag == "svg"]) == 2 * 3  # maps by stacks


def test_the_strongest_head_has_the_full_colour(speech: Diagnosis) -> None:
    sinks = [value for layer in speech.layers for value in layer.statistics["sink"]]
    full = sum(value >= 7 / 8 * max(sinks) for value in sinks)
    html = speech._repr_html_().partition("Strongest key")[2]
    strong = re.findall(r'<path opacity="1.0" d="([^"]*)"', html)
    assert sum(path.count("M") for path in strong) == full > 0


def test_no_number_leaves_a_gap() -> None:
    diagnosis = saying("attn")
    diagnosis.layers[0].statistics = {"entropy": [math.nan, 1.0], "sink": [math.nan, math.inf]}
    html = diagnosis._repr_html_()
    assert "Strongest key" not in html
    assert html.count("M1 0") == 1
    assert html.count("M0 0") == 0


def test_nothing_found_and_nothing_seen() -> None:
    healthy = synthetic.healthy()
    assert "Nothing found" in healthy._repr_html_()
    healthy.layers = []
    assert "<svg" not in healthy._repr_html_()


def test_a_notebook_stays_small(huge: Diagnosis) -> None:
    # A notebook keeps its outputs in the file, so 5,120 heads have to do with about 10 bytes for
    # each square.
    assert len(huge._repr_html_()) < 120_000
