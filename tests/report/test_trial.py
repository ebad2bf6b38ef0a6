"""The page of a trial: complete, harmless whatever names and notes hold, and right in Chromium."""

from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings

from attending.report.page import policy
from attending.report.text import printable
from attending.report.trial_terminal import as_text, print_trial
from attending.report.trial_words import cell, verdict
from attending.trials.record import Trial, TrialRow
from attending.trials.samples import Measure, Samples
from tests.report.conftest import saved
from tests.report.hostile import TEXTS, texts

if TYPE_CHECKING:
    from playwright.sync_api import Page


class _Elements(HTMLParser):
    """What a page has besides text; the name of a contender is bold in a notebook's list."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (tag, attrs) != ("b", []):
            self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name in ("href", "src"):
                self.links.append(value or "")


PERPLEXITY = Measure("perplexity", "Perplexity", "", "What.", "lower", "geometric mean", "sequence")
DRIFT = Measure("drift", "Drift", "nats/token", "How far.", None, "mean", "sequence", True)
SPEED = Measure("speed", "Speed", "tokens/s", "How fast.", "higher", "median", "repeat")
MEMORY = Measure("memory", "Memory", "bytes", "How much.", "lower", "median", "repeat")


def row(name: str, factor: float, drift: float, speed: float, **more: object) -> TrialRow:
    samples = {
        "perplexity": Samples((8.0 * factor, 2.0 * factor, 4.0 * factor), (3.0, 3.0, 6.0)),
        "drift": Samples((drift, drift, 2 * drift)),
        "speed": Samples((100 * speed, 110 * speed, 90 * speed)),
        "memory": Samples((2e6,)),
    }
    return TrialRow(name, [f"{name}()"] if factor != 1 else [], samples=samples, **more)  # type: ignore[arg-type]


def made(*rows: TrialRow, words: str = "llama") -> Trial:
    return Trial(
        model=words,
        model_class="LlamaForCausalLM",
        parameters=10,
        device="CPU, 1 thread",
        inputs="3 sequences",
        repeats=3,
        seed=0,
        clock="wall-clock time",
        measures=[PERPLEXITY, DRIFT, SPEED, MEMORY],
        rows=[row("none", 1.0, 0.0, 1.0, texts=["one"]), *rows],
        prompts=["Once"],
        version="0",
    )


def usual() -> Trial:
    return made(
        row("good", 0.5, 0.1, 2.0, texts=["two"], counts={"edited": 3.0}),
        row("bad", 2.0, 0.2, 0.5, texts=["three"]),
        TrialRow("gone", ["gone()"], "not applicable", ["It sees nothing."]),
    )


def test_better_and_worse() -> None:
    trial = usual()
    assert verdict(trial, trial["good"], PERPLEXITY) == "better"
    assert verdict(trial, trial["bad"], PERPLEXITY) == "worse"
    assert verdict(trial, trial["good"], SPEED) == "better"
    assert verdict(trial, trial["bad"], SPEED) == "worse"
    assert verdict(trial, trial["bad"], DRIFT) == ""  # which way is better is not known
    assert verdict(trial, trial["bad"], MEMORY) == ""  # one sample has no spread
    assert verdict(trial, trial.plain, PERPLEXITY) == ""


def test_cells() -> None:
    trial = usual()
    assert cell(trial, trial["good"], PERPLEXITY).endswith("(x0.5)")
    assert cell(trial, trial["bad"], DRIFT) == "0.267 ±0.067"
    assert cell(trial, trial["good"], SPEED) == "200 ±20 /s (x2)"
    assert cell(trial, trial["good"], MEMORY) == "2 MB (x1)"
    assert cell(trial, trial.plain, MEMORY) == "2 MB"
    assert cell(trial, trial["gone"], MEMORY) == "-"


def test_more_contenders_than_fit_go_on_below() -> None:
    trial = made(*(row(f"contender number {n}", 0.9, 0.1, 1.0) for n in range(9)))
    shown = as_text(trial)
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.count("Perplexity") > 1
    for number in range(9):
        assert f"contender number {number}" in shown


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_terminal_of_any_width_shows_every_cell(width: int) -> None:
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    print_trial(usual(), Console(file=stream, width=width))
    shown = stream.getvalue()
    if width >= 60:
        assert "200 ±20 /s (x2)" in shown
    assert "gone: not applicable" in " ".join(shown.split())


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_is_markup(text: str) -> None:
    trial = made(
        row(text + "!", 0.5, 0.1, 2.0, notes=[text], texts=[text], counts={text: 1.0}), words=text
    )
    trial.prompts = [text]
    trial["none"].texts = [text]
    for page in (trial.to_html(), trial._repr_html_()):
        seen = _Elements()
        seen.feed(page)
        assert seen.tags.isdisjoint({"script", "img", "svg"})
        assert not any(name.startswith("on") for name in seen.attributes)
        assert all(link.startswith(("#", "data:,")) for link in seen.links)
    assert printable(text) in unescape(trial.to_html())
    print_trial(trial)
    assert Trial.from_json(trial.to_json()).to_html() == trial.to_html()


@settings(max_examples=30)
@given(texts, texts)
def test_any_text_can_be_shown(name: str, note: str) -> None:
    trial = made(row(f"{name}.", 0.5, 0.1, 2.0, notes=[note]))
    trial.to_html().encode("utf-8")
    assert trial._repr_html_()
    assert as_text(trial).isprintable() or "\n" in as_text(trial)


def test_numbers_that_are_none_can_be_shown() -> None:
    broken = row("broken", float("inf"), float("nan"), 0.0)
    trial = made(broken)
    assert "no number" in as_text(trial)
    assert "broken" in trial.to_html()
    assert "broken" in trial._repr_html_()


def test_the_page_runs_no_script() -> None:
    page = usual().to_html()
    assert "<script" not in page
    assert "script-src 'none'" in unescape(page)
    assert policy("sha256-x").count("'sha256-x'") == 1
    assert len(page) < 100_000


@pytest.mark.browser
def test_the_page_in_a_browser(page: "Page", tmp_path: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    url = saved(usual().to_html(), tmp_path / "trial.html")
    page.goto(url)
    assert asked == [url]
    assert page.locator("h1").inner_text() == "llama"
    table = page.locator("table.trial")
    assert table.locator("tbody tr").count() == 3
    assert "x0.5" in table.locator("tbody tr").nth(1).inner_text()
    # Perplexity: the line of plain stands between half (good) and twice (bad), in the middle.
    plot = page.locator('[data-measure="perplexity"]')
    places = [
        plot.locator("li").nth(0).locator(".dot").bounding_box(),
        plot.locator("li").nth(0).locator(".plain").bounding_box(),
        plot.locator("li").nth(1).locator(".dot").bounding_box(),
    ]
    good, plain, bad = (box["x"] + box["width"] / 2 for box in places if box is not None)
    assert good < plain < bad
    assert bad - plain == pytest.approx(plain - good, abs=2.0)
    assert plot.locator("li").nth(0).locator(".sample").count() == 3
    assert "better" in (plot.locator("li").nth(0).locator(".dot").get_attribute("class") or "")
    assert page.locator('[data-measure="memory"]').count() == 0  # nothing differs
    assert page.locator(".contender.not-applicable").inner_text().count("It sees nothing") == 1
    assert "two" in page.locator("#texts").inner_text()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) == 0


@pytest.mark.browser
def test_hostile_texts_do_nothing_in_a_browser(page: "Page", tmp_path: Path) -> None:
    rows = [
        row(f"{text}{n}", 0.5 + n / 50, 0.1, 2.0, notes=[text], texts=[text])
        for n, text in enumerate(TEXTS)
    ]
    page.goto(saved(made(*rows, words=TEXTS[0]).to_html(), tmp_path / "trial.html"))
    assert page.evaluate("window.__pwned") is None
    assert page.locator("h1").inner_text() == TEXTS[0]
    assert page.locator("table.trial tbody tr").count() == len(TEXTS) + 1
    assert page.locator("main script, main img, main b").count() == 0
