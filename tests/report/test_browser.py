"""The page in Chromium: what a reader clicks and what then appears."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from attending.diagnosis.record import Diagnosis, LayerRecord
from attending.report.html import link
from attending.report.text import printable, visible
from tests.report import synthetic
from tests.report.conftest import saved
from tests.report.hostile import TEXTS, saying

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser

# The map as Plotly has it, once it shows the selected head; the scale may be logarithmic.
MAP = "document.querySelector('#head-map .plot').data[0].z"
DRAWN = "() => document.querySelectorAll('#head-map .heatmaplayer image').length === 1"


@pytest.fixture(autouse=True)
def _nothing_leaves_the_page(page: "Page") -> Iterator[None]:
    """No page may ask for anything but itself, and no script from a text may have run."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.partition("#")[0]))
    yield
    documents = {url for url in asked if url.startswith("file:") and url.endswith(".html")}
    assert {url for url in asked if not url.startswith("data:")} <= documents
    assert page.evaluate("window.__pwned") is None


def words(locator: "Locator") -> str:
    """Its visible text in one line."""
    return " ".join(locator.inner_text().split())


def cell(page: "Page", layer: int, head: int) -> "Locator":
    return page.locator(f'.cell[data-layer="{layer}"][data-head="{head}"]')


def layer_of(diagnosis: Diagnosis, name: str) -> tuple[int, LayerRecord]:
    return next((i, one) for i, one in enumerate(diagnosis.layers) if one.name == name)


def show_linear(page: "Page") -> None:
    page.get_by_role("button", name="linear").click()
    page.wait_for_function(f"() => {MAP}.flat().every((v) => v === null || v >= 0)")


def assert_shows(page: "Page", diagnosis: Diagnosis, name: str, head: int) -> None:
    """The panel shows this head: its title, its strongest keys with their tokens, its map."""
    from playwright.sync_api import expect

    index, layer = layer_of(diagnosis, name)
    expect(page.locator("#head-name")).to_contain_text(name)
    assert words(page.locator("#head-title")).endswith(f", head {head}")
    expect(cell(page, index, head)).to_have_attribute("aria-selected", "true")
    assert page.locator('.cell[aria-selected="true"]').count() == 1
    assert page.locator("#choose-layer").input_value() == str(index)
    assert page.locator("#choose-head").input_value() == str(head)
    keys = layer.top_keys[head]
    items = page.locator("#head-keys li")
    assert items.count() == len(keys)
    for item, key in zip(items.all(), keys, strict=True):
        assert item.locator(".token").inner_text() == visible(key.token)
        assert item.locator("*").count() == 5  # spans and the meter: no element from a token
        assert f"position {key.position}, text {key.sequence}" in words(item)
        percent = float(words(item.locator(".value")).removesuffix("%"))
        assert percent == pytest.approx(100 * key.importance, rel=6e-3)
    page.wait_for_function(DRAWN)
    show_linear(page)
    expected = np.array(layer.pooled[head])
    page.wait_for_function(
        f"([value, peak]) => Math.abs(({MAP})[value[0]][value[1]] - peak) < 1e-3",
        arg=[
            [int(i) for i in np.unravel_index(expected.argmax(), expected.shape)],
            float(expected.max()),
        ],
    )
    drawn = np.array([[v or 0.0 for v in row] for row in page.evaluate(MAP)])
    np.testing.assert_allclose(drawn, expected, rtol=1e-3, atol=1e-7)


def test_a_click_on_a_head_shows_its_map_and_its_strongest_keys(
    page: "Page", speech: Diagnosis, speech_url: str
) -> None:
    page.goto(speech_url)
    index, layer = layer_of(speech, "model.decoder.layers.2.encoder_attn")
    cell(page, index, 4).click()
    assert page.url.endswith(link(layer.name, 4))
    assert words(page.locator("#head-title")) == "Layer 2, head 4"
    assert words(page.locator("#head-stack")) == "model.decoder.layers · cross-attention"
    assert_shows(page, speech, layer.name, 4)
    # A second click replaces all of it, and the way back in the history brings it back.
    cell(page, 0, 1).click()
    assert_shows(page, speech, speech.layers[0].name, 1)
    page.go_back()
    assert_shows(page, speech, layer.name, 4)


def test_tokens_are_visible_text(page: "Page", speech: Diagnosis, speech_url: str) -> None:
    page.goto(speech_url)
    preview = page.locator(".preview span").all_inner_texts()
    assert preview == [visible(token) for token in synthetic.TOKENS]
    assert synthetic.SCRIPT in preview
    # The head that looks most at the token that would be a script.
    found = [
        (key.importance, index, head)
        for index, layer in enumerate(speech.layers)
        for head, keys in enumerate(layer.top_keys)
        for key in keys
        if key.token == synthetic.SCRIPT
    ]
    _, index, head = max(found)
    cell(page, index, head).click()
    tokens = page.locator("#head-keys .token")
    assert synthetic.SCRIPT in tokens.all_inner_texts()
    assert tokens.get_by_text(synthetic.SCRIPT, exact=True).first.is_visible()


def test_the_page_opens_with_the_strongest_head_of_the_gravest_finding(
    page: "Page", speech: Diagnosis, speech_url: str
) -> None:
    page.goto(speech_url)
    gravest = next(finding for finding in speech.findings if finding.severity == "critical")
    first = gravest.evidence[0]
    assert first.head is not None
    assert_shows(page, speech, first.where, first.head)
    links = page.locator("#head-findings a")
    assert gravest.title in links.all_inner_texts()
    links.get_by_text(gravest.title).click()
    finding = page.locator("#" + page.url.partition("#")[2])
    assert words(finding.locator("h3")) == gravest.title
    assert finding.is_visible()
    assert_shows(page, speech, first.where, first.head)  # which did not change the head


def test_numbers_of_the_panel(page: "Page", speech: Diagnosis, speech_url: str) -> None:
    index, layer = layer_of(speech, "model.encoder.layers.3.self_attn")
    page.goto(speech_url + link(layer.name, 5))
    rows = page.locator("#head-statistics tr")
    assert rows.count() == 12
    shown = {words(row.locator("th")): words(row.locator("td").last) for row in rows.all()}
    sink = layer.statistics["sink"][5]
    assert float(shown["Strongest key"].split()[0]) == pytest.approx(100 * sink, rel=6e-3)
    assert shown["Mean distance"].endswith(" tokens")
    others = [value for other, value in enumerate(layer.similarity[5]) if other != 5]
    best = layer.similarity[5].index(max(others))
    assert words(page.locator("#head-similar .aside")).startswith(f"Most like head {best},")
    page.locator("#head-similar button").filter(has_text=str(best)).click()
    assert_shows(page, speech, layer.name, best)
    assert cell(page, index, best).get_attribute("aria-selected") == "true"


def test_choosing_a_statistic_recolours_the_heads(
    page: "Page", speech: Diagnosis, speech_url: str
) -> None:
    from playwright.sync_api import expect

    page.goto(speech_url)
    sink = [v for layer in speech.layers for v in layer.statistics["sink"]]
    colour = "(cell) => getComputedStyle(cell).backgroundColor"
    before = page.locator(".cell").evaluate_all(f"(all) => all.map({colour})")
    page.get_by_role("radio", name="Strongest key").click()
    expect(page.locator("#statistic-label")).to_have_text("Strongest key")
    expect(page.locator("#statistic-description")).to_contain_text("largest mean attention")
    assert page.locator('#statistics [aria-checked="true"]').count() == 1
    after = page.locator(".cell").evaluate_all(f"(all) => all.map({colour})")
    assert len(after) == len(sink) == 141
    assert sum(a != b for a, b in zip(before, after, strict=True)) > 100
    # Much is dark on a light page: lightness falls as the value grows.
    order = np.argsort(values_in_page_order(page, "sink"), kind="stable")
    light = [sum(map(int, re.findall(r"\d+", after[i]))) for i in order]
    assert all(a >= b for a, b in itertools.pairwise(light))
    label = cell(page, 0, 0).get_attribute("aria-label")
    assert label is not None
    assert label.startswith("Layer 0, head 0: ")
    assert float(re.findall(r"([\d.]+)\s%", label)[0]) == pytest.approx(100 * sink[0], rel=6e-3)
    # By the arrow keys, too, as radio buttons are.
    page.keyboard.press("ArrowRight")
    expect(page.locator("#statistic-label")).to_have_text("First token")


def values_in_page_order(page: "Page", statistic: str) -> list[float]:
    return page.locator(".cell").evaluate_all(
        f"(all) => all.map((c) => layers[c.dataset.layer].values.{statistic}[c.dataset.head])"
    )


def test_stretched_colours_span_the_data(page: "Page", speech: Diagnosis, speech_url: str) -> None:
    page.goto(speech_url)
    page.get_by_role("radio", name="Normalized entropy").click()
    ends = ("#scale-low", "#scale-high")
    assert [words(page.locator(end)) for end in ends] == ["0", "1"]
    page.get_by_label("stretch colours to the data").check()
    values = [v for layer in speech.layers for v in layer.statistics["normalized_entropy"]]
    shown = [float(words(page.locator(end))) for end in ends]
    assert shown == pytest.approx([min(values), max(values)], abs=0.006)


def test_the_keyboard_reaches_every_head(page: "Page", speech: Diagnosis, speech_url: str) -> None:
    index, layer = layer_of(speech, "model.decoder.layers.1.self_attn")
    page.goto(speech_url + link(layer.name, 6))
    entries = page.locator('.cell[tabindex="0"]')
    assert entries.count() == 3  # one for each stack, and here it is the selected head
    cell(page, index, 6).focus()

    def focused() -> tuple[str, int]:
        data = page.evaluate("({ ...document.activeElement.dataset })")
        return speech.layers[int(data["layer"])].name, int(data["head"])

    page.keyboard.press("ArrowRight")
    assert focused() == (layer.name, 7)
    page.keyboard.press("ArrowRight")
    assert focused() == (layer.name, 7)  # the last one
    page.keyboard.press("ArrowDown")
    assert focused() == ("model.decoder.layers.2.self_attn", 4)  # which has 5 heads
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert focused() == ("model.decoder.layers.0.self_attn", 0)
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#tip").is_visible()
    assert_shows(page, speech, layer.name, 6)  # so far nothing is chosen
    cell(page, layer_of(speech, "model.decoder.layers.0.self_attn")[0], 6).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => selection.head === 6 && location.hash.includes('layers.0.')")
    assert focused() == ("model.decoder.layers.0.self_attn", 6)  # so that the arrows go on
    assert_shows(page, speech, "model.decoder.layers.0.self_attn", 6)


def test_the_link_of_a_finding_selects_its_head(
    page: "Page", speech: Diagnosis, speech_url: str
) -> None:
    from playwright.sync_api import expect

    page.goto(speech_url)
    collapsed = next(finding for finding in speech.findings if finding.kind == "collapsed")
    article = page.locator("article").filter(has=page.get_by_role("heading", name=collapsed.title))
    third = collapsed.evidence[2]
    assert third.head is not None
    article.get_by_role("link").nth(2).click()
    expect(page.locator("#head-title")).to_be_in_viewport()
    assert_shows(page, speech, third.where, third.head)
    expect(page.locator("#head-findings")).to_contain_text(collapsed.title)
    # Those that are folded at first.
    ninth = collapsed.evidence[8]
    assert ninth.head is not None
    assert not article.get_by_role("link").nth(8).is_visible()
    article.locator("summary").click()
    article.get_by_role("link").nth(8).click()
    assert_shows(page, speech, ninth.where, ninth.head)


def test_an_address_can_name_a_head(page: "Page", speech: Diagnosis, speech_url: str) -> None:
    from playwright.sync_api import expect

    name = "model.encoder.layers.4.self_attn"
    page.goto(speech_url + link(name, 2))
    expect(page.locator("#head-title")).to_be_in_viewport()
    assert_shows(page, speech, name, 2)


FIRST = "#model.encoder.layers.4.self_attn/1"


def test_an_address_that_names_nothing_is_ignored(
    page: "Page", speech: Diagnosis, speech_url: str
) -> None:
    page.goto(speech_url + "#%E0%A4%A/1")
    first = next(f for f in speech.findings if f.severity == "critical").evidence[0]
    assert words(page.locator("#head-name")).startswith(first.where)
    page.goto(speech_url + FIRST)
    page.wait_for_function("() => selection.layer === 4 && selection.head === 1")
    for fragment in ("#", "#nowhere/3", "#/", "#findings", FIRST[:-1] + "99", FIRST[:-1] + "-1",
                     FIRST + ".5", "#%E0%A4%A/1"):  # fmt: skip
        page.goto(speech_url + fragment)
        assert page.evaluate("[selection.layer, selection.head]") == [4, 1]
    assert words(page.locator("#head-title")) == "Layer 4, head 1"


def test_lists_and_arrows_choose_a_head(page: "Page", speech: Diagnosis, speech_url: str) -> None:
    page.goto(speech_url)
    index, layer = layer_of(speech, "model.decoder.layers.2.self_attn")
    page.select_option("#choose-layer", str(index))
    page.select_option("#choose-head", "4")
    assert_shows(page, speech, layer.name, 4)
    assert page.locator("#choose-head option").count() == 5
    page.get_by_role("button", name="Next head").click()
    assert_shows(page, speech, "model.decoder.layers.3.self_attn", 0)
    page.get_by_role("button", name="Previous head").click()
    assert_shows(page, speech, layer.name, 4)
    groups = page.locator("#choose-layer optgroup").evaluate_all("(all) => all.map((g) => g.label)")
    assert groups == [
        "model.encoder.layers (self-attention)",
        "model.decoder.layers (self-attention, causal)",
        "model.decoder.layers (cross-attention)",
    ]


def test_a_map_can_be_logarithmic(page: "Page", speech: Diagnosis, speech_url: str) -> None:
    index, layer = layer_of(speech, "model.encoder.layers.2.self_attn")
    page.goto(speech_url + link(layer.name, 0))
    page.wait_for_function(DRAWN)
    page.get_by_role("button", name="log", exact=True).click()
    page.wait_for_function(f"() => {MAP}.flat().some((v) => v < 0)")
    drawn = np.array(page.evaluate(MAP), dtype=float)
    pooled = np.array(layer.pooled[0])
    expected = np.log10(np.maximum(pooled, pooled.max() * 1e-4))
    empty = np.isnan(drawn)  # below what half precision holds
    assert pooled[empty].max(initial=0) < 6e-8
    np.testing.assert_allclose(drawn[~empty], expected[~empty], atol=1e-3)
    # An even map does not have its noise stretched over all colours: 3 times the mean each way.
    low, high = page.evaluate(
        "(({ zmin, zmax }) => [zmin, zmax])(document.querySelector('#head-map .plot').data[0])"
    )
    mean = math.log10(pooled[pooled > 0].mean())
    assert low <= mean - math.log10(3) + 1e-3
    assert high >= mean + math.log10(3) - 1e-3
    # The choice stays when another head is selected.
    cell(page, index, 1).click()
    pressed = page.locator('.switch [aria-pressed="true"]')
    assert pressed.all_inner_texts() == ["log"]


def test_a_pointer_is_told_the_value(page: "Page", speech: Diagnosis, speech_url: str) -> None:
    page.goto(speech_url)
    cell(page, 1, 2).hover()
    entropy = speech.layers[1].statistics["entropy"][2]
    place, value, unit = words(page.locator("#tip")).rsplit(" ", 2)
    assert (place, unit) == ("Layer 1, head 2", "nats")
    assert float(value) == pytest.approx(entropy, abs=0.006)
    page.mouse.move(2, 2)
    assert not page.locator("#tip").is_visible()


def test_dark_screens_get_dark_colours(page: "Page", speech_url: str) -> None:
    page.emulate_media(color_scheme="light")
    page.goto(speech_url)
    page.wait_for_function(DRAWN)
    look = """() => [document.body, document.querySelector('.cell'),
                     document.querySelector('#head-map .plot .bglayer .bg')].map(
        (one) => getComputedStyle(one)[one.tagName === 'rect' ? 'fill' : 'backgroundColor'])"""

    def lightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / (3 * 255)

    light = [lightness(colour) for colour in page.evaluate(look)]
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "() => document.querySelector('#head-map .plot').layout.plot_bgcolor === RAMPS.dark[0]"
    )
    dark = [lightness(colour) for colour in page.evaluate(look)]
    assert (light[0], light[2]) > (0.9, 0.9)
    assert dark[0] < 0.1
    assert dark[2] < 0.2
    # Much stands out: darker than little on light, lighter on dark.
    page.get_by_role("radio", name="First token").click()
    values = values_in_page_order(page, "first_token")
    colours = page.locator(".cell").evaluate_all(
        "(all) => all.map((cell) => getComputedStyle(cell).backgroundColor)"
    )
    assert lightness(colours[int(np.argmax(values))]) > lightness(colours[int(np.argmin(values))])


CONTRAST = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const channel = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const one of document.querySelectorAll('body *')) {
    const text = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!text || !one.checkVisibility() || one.closest('svg, script, noscript, option')) continue;
    const [a, b] = [parse(getComputedStyle(one).color), ground(one)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([one.tagName, one.className, one.textContent.slice(0, 20), ratio]);
  }
  return low;
}"""


def test_text_has_contrast(page: "Page", speech_url: str) -> None:
    """At least 4.5 to 1 (WCAG 2.2, level AA), the small squares of similar heads included."""
    page.goto(speech_url)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.wait_for_function(
            "(scheme) => document.querySelector('#head-map .plot').layout?.plot_bgcolor"
            " === RAMPS[scheme][0]",
            arg=scheme,
        )
        assert page.evaluate(CONTRAST) == [], scheme


def assert_fits(page: "Page", width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing sticks out of the page, except what scrolls in itself.
    outside = page.evaluate(
        """() => [...document.querySelectorAll('main *, header *, footer *')].filter((one) =>
             !one.closest('#statistics, svg, .preview') && one.checkVisibility() &&
             one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.outerHTML)"""
    )
    assert outside == []


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_no_width_scrolls_sideways(width: int, page: "Page", speech_url: str) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(speech_url)
    page.wait_for_function(DRAWN)
    assert_fits(page, width)
    for other in (400, 768, 1024, 1920):  # and when the window changes
        page.set_viewport_size({"width": other, "height": 800})
        page.wait_for_function(f"() => innerWidth === {other}")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")
        assert_fits(page, other)


def test_on_a_phone_a_tap_brings_the_panel_into_view(
    page: "Page", speech: Diagnosis, speech_url: str
) -> None:
    from playwright.sync_api import expect

    page.emulate_media(reduced_motion="reduce")
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto(speech_url)
    cell(page, 2, 3).click()
    expect(page.locator("#head-title")).to_be_in_viewport()
    assert_shows(page, speech, speech.layers[2].name, 3)


def test_5120_heads_at_once(page: "Page", huge: Diagnosis, huge_url: str) -> None:
    page.goto(huge_url)
    assert page.locator(".cell").count() == 5120
    cell(page, 79, 63).click()
    assert_shows(page, huge, "model.layers.79.self_attn", 63)
    box = cell(page, 40, 30).bounding_box()
    assert box is not None
    assert min(box["width"], box["height"]) >= 6  # can be seen and hit
    page.set_viewport_size({"width": 400, "height": 800})
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")
    assert_fits(page, 400)


def test_hostile_texts_do_nothing(page: "Page", tmp_path: Path) -> None:
    names = [text for text in dict.fromkeys(TEXTS) if text]
    diagnosis = saying("\n".join(TEXTS))
    for part in ("layers", "hidden", "findings"):
        parts = [getattr(saying(text), part)[0] for text in names]
        setattr(diagnosis, part, parts)
    page.goto(saved(diagnosis.to_html(), tmp_path / "hostile.html"))
    page.wait_for_function(DRAWN)
    assert "how it attends" in page.title()
    # Every head by the link of its finding, as a click would follow it.
    panels = page.evaluate(
        """async () => {
          const panels = [];
          for (const article of document.querySelectorAll('article')) {
            const changed = new Promise((done) => addEventListener('hashchange', done));
            article.querySelector('a').click();
            await changed;
            const texts = (id) => [...document.querySelectorAll(id)].map((one) => one.innerText);
            panels.push([selection.layer, selection.head, texts('#head-keys .token'),
                         texts('#head-name'), article.querySelectorAll('a').length]);
          }
          return panels;
        }"""
    )
    assert len(panels) == len(names)
    for index, (text, (layer, head, tokens, [name], links)) in enumerate(
        zip(names, panels, strict=True)
    ):
        assert (layer, head, tokens) == (index, 1, [visible(text)])
        assert name.startswith(printable(text)[:20].strip())
        assert links == 1  # of three pieces of evidence one names a head
    cell(page, 0, 1).click()
    page.wait_for_function("() => selection.layer === 0")
    # What Plotly writes is text, too: no link and no markup from a token.
    chart = page.locator("#chart-activations")
    page.wait_for_function("() => document.querySelector('#chart-activations .point')")
    chart.scroll_into_view_if_needed()
    for point in chart.locator(".point").all()[:: len(names) // 4]:
        point.hover(force=True)
    assert chart.locator(".hoverlayer text").count() > 0
    assert chart.locator("svg a").count() == 0
    assert page.locator("#depth script, #depth b, #depth img").count() == 0


def test_a_script_that_got_in_would_not_run(browser: "Browser", speech_url: str) -> None:
    """The policy of the page is in force: scripts, images and requests from elsewhere fail."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(speech_url)
    blocked = page.evaluate(
        """async () => {
          const blocked = [];
          document.addEventListener('securitypolicyviolation',
            (e) => blocked.push(e.effectiveDirective));
          const script = document.createElement('script');
          script.textContent = 'window.__pwned = 1';
          document.body.append(script);
          const box = document.createElement('div');
          box.innerHTML = '<img src=x onerror="window.__pwned = 2">';
          document.body.append(box);
          await fetch('https://example.org').catch(() => null);
          await new Promise((done) => setTimeout(done, 200));
          return blocked;
        }"""
    )
    assert {"script-src-elem", "img-src", "connect-src"} <= set(blocked)
    assert page.evaluate("window.__pwned") is None
    context.close()


def test_gaps_are_shown_as_gaps(page: "Page", tmp_path: Path) -> None:
    diagnosis = saying("attn", "token", "words", "block")
    layer = diagnosis.layers[0]
    layer.statistics = {"entropy": [math.nan, 1.0], "sink": [0.5, 0.25]}
    layer.similarity = [[1.0, math.nan], [math.nan, 1.0]]
    layer.pooled = [[[math.nan, 0.5], [0.5, 0.5]], [[0.0, 0.0], [0.0, 0.0]]]
    layer.top_keys = [[dataclasses.replace(layer.top_keys[0][0], importance=math.nan)], []]
    diagnosis.hidden[0].max_abs = math.nan
    page.goto(saved(diagnosis.to_html(), tmp_path / "gaps.html"))
    cell(page, 0, 0).click()
    page.wait_for_function(DRAWN)
    assert cell(page, 0, 0).get_attribute("aria-label") == "attn, head 0: –"
    assert "unknown" in (cell(page, 0, 0).get_attribute("class") or "")
    assert words(page.locator("#head-keys li").first).endswith("–")
    assert words(page.locator("#head-statistics tr").first.locator("td").last) == "–"
    assert page.evaluate(MAP)[0][0] is None
    assert page.locator("#head-similar .aside").inner_text() == ""
    cell(page, 0, 1).click()
    assert words(page.locator("#head-keys")) == "None were recorded."
    assert words(page.locator("#head-title")) == "attn, head 1"


def test_what_was_not_recorded_is_not_drawn(page: "Page", tmp_path: Path) -> None:
    diagnosis = synthetic.healthy()
    diagnosis.hidden = []
    for layer in diagnosis.layers:
        layer.pooled, layer.similarity, layer.top_keys, layer.class_mass = [], [], [], {}
    diagnosis.layers[1].statistics = {}
    page.goto(saved(diagnosis.to_html(), tmp_path / "bare.html"))
    assert page.get_by_text("Nothing found").is_visible()
    assert page.get_by_text("No map was recorded.").is_visible()
    assert page.locator(".cell").count() == 12
    cell(page, 3, 2).click()
    assert words(page.locator("#head-title")) == "Layer 3, head 2"
    diagnosis.layers = []
    page.goto("about:blank")
    page.goto(saved(diagnosis.to_html(), tmp_path / "empty.html"))
    assert page.get_by_text("Nothing found").is_visible()
    assert page.locator("nav a").all_inner_texts() == ["Findings"]


@pytest.mark.parametrize("background", ["white", "rgb(30, 30, 30)"])
def test_a_notebook_keeps_its_looks(
    background: str, page: "Page", speech: Diagnosis, tmp_path: Path
) -> None:
    around = '<p id="p">text <code>code</code></p><ul><li id="li">item</li></ul>'
    html = "<!doctype html><meta charset=utf-8><link rel=icon href='data:,'><body style='{}'>{}"
    colours = f"background: {background}; color: {'black' if background == 'white' else 'white'}"
    look = """() => ['p', 'li'].map((id) => {
        const s = getComputedStyle(document.getElementById(id));
        return [s.font, s.color, s.margin, s.listStyleType];
    })"""
    page.goto(saved(html.format(colours, around), tmp_path / "before.html"))
    before = page.evaluate(look)
    page.goto("about:blank")
    page.goto(saved(html.format(colours, around + speech._repr_html_()), tmp_path / "after.html"))
    assert page.evaluate(look) == before
    assert page.get_by_text("Attention sink on the first token").is_visible()
    assert page.locator("svg").count() == 6
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
