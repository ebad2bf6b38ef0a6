"""The page as text: what a parser makes of it. What a browser makes of it: test_browser."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.diagnosis.record import Diagnosis, Evidence
from attending.report.html import MANY, embed_json, link
from attending.report.page_data import packed, page_data, statistics_of, values_of
from tests.report import synthetic
from tests.report.hostile import TEXTS, saying, texts


class Parsed(HTMLParser):
    """The elements of a page with the names of their attributes, its scripts and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self.odd: list[str] = []
        self._script: dict[str, str | None] | None = None
        self._in_style = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._in_style = tag == "style"
        if tag == "script":
            self._script = dict(attrs)
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag: str) -> None:
        self._script = None
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif not self._in_style:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.odd.append(data)

    def unknown_decl(self, data: str) -> None:
        self.odd.append(data)

    def script(self, name: str | None) -> str:
        [found] = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return found


def without_plotly(html: str) -> str:
    """The page without the largest part of it, which is the same in all pages."""
    return re.sub(r'(id="plotly">)[^<]*', r"\1", html)


def data_of(html: str) -> dict[str, object]:
    data = json.loads(Parsed(without_plotly(html)).script("data"))
    assert isinstance(data, dict)
    return data


# ---------------------------------------------------------------------------------- escaping


@pytest.fixture(scope="module")
def plain() -> Parsed:
    return Parsed(without_plotly(saying("attn", "token", "words").to_html()))


def assert_only_text(html: str, plain: Parsed) -> None:
    parsed = Parsed(without_plotly(html))
    assert parsed.elements == plain.elements
    assert parsed.odd == plain.odd == []
    assert [attributes for attributes, _ in parsed.scripts] == [a for a, _ in plain.scripts]
    assert parsed.script(None) == plain.script(None)


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_texts_are_only_text(text: str, plain: Parsed) -> None:
    assert_only_text(saying(text).to_html(), plain)


@given(name=texts, token=texts, words=texts)
@settings(max_examples=60)
def test_any_text_is_only_text(name: str, token: str, words: str, plain: Parsed) -> None:
    html = saying(name, token, words).to_html()
    html.encode("utf-8")
    assert_only_text(html, plain)


def test_a_reader_sees_the_text_as_it_is() -> None:
    html = saying("attn", "<script>alert(1)</script>", "a < b & 'c'").to_html()
    parsed = Parsed(without_plotly(html))
    assert parsed.texts.count("<script>alert(1)</script>") == 2  # in the preview
    assert parsed.texts.count("a < b & 'c'") >= 4
    assert data_of(html)["layers"][0]["keys"][0][0][0] == "<script>alert(1)</script>"  # type: ignore[index]


anything = st.recursive(
    texts | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@given(anything)
def test_embedded_json_cannot_end_its_element_and_means_the_same(data: object) -> None:
    text = embed_json(data)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == data


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embedded_json_refuses_what_is_no_number(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        embed_json({"x": [value]})


def test_a_link_names_a_module_and_a_head() -> None:
    assert link("model.layers.3.attn#1", 2) == "#model.layers.3.attn%231/2"
    assert link("a/b c%<", 0) == "#a%2Fb%20c%25%3C/0"
    assert link("\ud800", 0) == "#%5Cud800/0"


# ------------------------------------------------------------------------ offline and policy


def test_the_page_refers_to_nothing_outside(speech_html: str) -> None:
    parsed = Parsed(without_plotly(speech_html))
    addresses = [v for _, name, v in parsed.attributes if name in ("src", "href", "action")]
    assert addresses
    assert {a for a in addresses if not a.startswith("#")} == {"data:,"}
    assert not any(name.startswith("on") for _, name, _ in parsed.attributes)
    assert {tag for tag, _ in parsed.elements} & {
        "iframe",
        "img",
        "object",
        "embed",
        "base",
    } == set()
    style = speech_html.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)


def test_every_link_leads_somewhere(speech_html: str, speech: Diagnosis) -> None:
    parsed = Parsed(without_plotly(speech_html))
    ids = {value for _, name, value in parsed.attributes if name == "id"}
    heads = {"#" + link(one.name, h)[1:] for one in speech.layers for h in range(one.num_heads)}
    targets = {v for tag, name, v in parsed.attributes if tag == "a" and name == "href"}
    assert {t for t in targets if t[1:] not in ids} <= heads
    assert len(targets & heads) > 20


def test_ids_are_unique(speech_html: str) -> None:
    ids = [v for _, name, v in Parsed(without_plotly(speech_html)).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def policy_of(html: str) -> dict[str, list[str]]:
    parsed = Parsed(without_plotly(html))
    [content] = [
        v for tag, name, v in parsed.attributes
        if tag == "meta" and name == "content" and "default-src" in v
    ]  # fmt: skip
    return {rule.split()[0]: rule.split()[1:] for rule in content.split(";")}


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_allows_the_two_scripts_and_nothing_else(speech_html: str) -> None:
    policy = policy_of(speech_html)
    parsed = Parsed(speech_html)
    plotly = zlib.decompress(base64.b64decode(parsed.script("plotly"))).decode()
    assert policy["script-src"] == [sha256(parsed.script(None)), sha256(plotly)]
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert set(policy) == {
        "default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"
    }  # fmt: skip
    assert policy["img-src"] == ["data:"]
    assert "plotly.js v" in plotly[:400]


def test_scripts_without_a_type_that_runs_are_data(speech_html: str) -> None:
    types = [(a.get("id"), a.get("type")) for a, _ in Parsed(speech_html).scripts]
    assert types == [("data", "application/json"), ("plotly", "text/plain"), (None, None)]


def test_the_policy_comes_before_all_else_that_could_run(speech_html: str) -> None:
    head = speech_html.partition("<script")[0]
    assert "Content-Security-Policy" in head


def test_the_page_on_disk_is_the_text(tmp_path: Path) -> None:
    diagnosis = saying("\ud800 猫")
    text = diagnosis.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == text.encode("utf-8")


# ---------------------------------------------------------------------------------- the data


def unpacked(entry: object) -> np.ndarray:
    assert isinstance(entry, dict)
    raw = zlib.decompress(base64.b64decode(entry["data"]))
    return np.frombuffer(raw, "<f2").reshape(entry["shape"])


def test_the_data_are_those_of_the_diagnosis(speech: Diagnosis, speech_html: str) -> None:
    data = data_of(speech_html)
    for entry, layer in zip(data["layers"], speech.layers, strict=True):  # type: ignore[call-overload]
        assert entry["name"] == layer.name
        np.testing.assert_allclose(unpacked(entry["maps"]), layer.pooled, rtol=1e-3, atol=6e-8)
        np.testing.assert_allclose(unpacked(entry["similarity"]), layer.similarity, rtol=1e-3)
        for name, values in layer.statistics.items():
            np.testing.assert_allclose(entry["values"][name], values, rtol=1e-3)
        assert [[key[1] for key in head] for head in entry["keys"]] == [
            [key.position for key in head] for head in layer.top_keys
        ]


def test_findings_name_their_heads_strongest_first(speech: Diagnosis) -> None:
    data = page_data(speech)
    first = data["findings"][0]  # type: ignore[index]
    evidence = next(f for f in speech.findings if f.severity == "critical").evidence
    assert [(speech.layers[i].name, head) for i, head in first["heads"]] == [
        (e.where, e.head) for e in evidence
    ]


def test_heads_that_do_not_exist_are_not_linked() -> None:
    diagnosis = saying("attn")
    finding = dataclasses.replace(
        diagnosis.findings[0],
        evidence=(
            Evidence("attn", 7, 0.5, "beyond the last"),
            Evidence("attn", -1, 0.5, "before the first"),
            Evidence("elsewhere", 0, 0.5, "no such module"),
        ),
    )
    diagnosis.findings = [finding]
    html = diagnosis.to_html()
    assert data_of(html)["findings"][0]["heads"] == []  # type: ignore[index]
    links = [
        v for tag, n, v in Parsed(without_plotly(html)).attributes if (tag, n) == ("a", "href")
    ]
    assert not [target for target in links if "/" in target]


def test_what_is_no_number_is_shown_as_none() -> None:
    diagnosis = saying("attn", "t", "w")
    layer = diagnosis.layers[0]
    layer.statistics["entropy"] = [math.nan, math.inf]
    layer.similarity = [[1.0, math.nan], [math.nan, 1.0]]
    layer.top_keys[0] = [dataclasses.replace(layer.top_keys[0][0], importance=math.nan)]
    diagnosis.hidden[0].max_abs = math.inf
    diagnosis.thresholds = {"least": math.nan}
    html = diagnosis.to_html()
    entry = data_of(html)["layers"][0]  # type: ignore[index]
    assert entry["values"]["entropy"] == [None, None]
    assert entry["keys"][0][0][3] is None
    assert data_of(html)["blocks"][0]["rows"][0]["max_abs"] is None  # type: ignore[index]
    assert "no number" in Parsed(without_plotly(html)).texts


def test_a_layer_without_a_statistic_has_no_values() -> None:
    layer = saying("attn", "t", "w").layers[0]
    assert values_of(layer, "first_token") == [None, None]
    assert values_of(layer, "mass_w") == [0.1, 0.2]
    layer.class_mass["w"] = [0.1]
    assert values_of(layer, "mass_w") == [0.1, None]


def test_statistics_come_in_the_order_of_the_record(speech: Diagnosis) -> None:
    labels = [statistic.name for statistic in statistics_of(speech)]
    assert labels[:3] == ["entropy", "normalized_entropy", "effective_keys"]
    assert labels[-2:] == ["mass_special", "mass_punctuation"]


@given(
    st.lists(st.lists(st.floats(0, 1, width=16), min_size=3, max_size=3), min_size=1, max_size=4)
)
def test_packing_is_exact_for_half_precision(values: list[list[float]]) -> None:
    assert unpacked(packed(values)).tolist() == values
    assert packed([]) is None
    assert packed([[]]) is None


def test_packing_does_not_warn_about_what_is_no_number() -> None:
    assert math.isnan(unpacked(packed([math.nan, 1.0]))[0])
    assert struct.pack("<e", 1.0) == unpacked(packed([math.nan, 1.0])).tobytes()[2:]


# ------------------------------------------------------------------------- sizes and gaps


def test_sizes(speech_html: str, huge_html: str, huge: Diagnosis) -> None:
    plotly = len(Parsed(speech_html).script("plotly"))
    # Deflated, Plotly is a third of its 4.8 MB: every page is about as large as a photograph.
    assert plotly < 2_200_000
    # 141 heads with maps of 32 x 32, which `diagnose` makes, are not much beside it,
    assert len(speech_html) - plotly < 500_000
    # and 5,120 heads with maps of 16 x 16, half of them above the diagonal, take under 1 kB each:
    # the page of a model of 70 B parameters can still be sent by mail.
    heads = sum(layer.num_heads for layer in huge.layers)
    assert heads == 5120
    assert (len(huge_html) - plotly) / heads < 1000


def test_evidence_beyond_many_is_left_out_and_counted(huge_html: str, huge: Diagnosis) -> None:
    most = max(len(finding.evidence) for finding in huge.findings)
    assert most > MANY
    text = " ".join(" ".join(Parsed(without_plotly(huge_html)).texts).split())
    assert f"{most - MANY:,} more are in" in text
    assert huge_html.count("<li>") < 4 * MANY


def test_one_piece_of_evidence_is_not_folded() -> None:
    diagnosis = saying("attn")
    [finding] = diagnosis.findings
    for pieces, folds in ((5, False), (6, True)):
        diagnosis.findings = [dataclasses.replace(finding, evidence=finding.evidence[:1] * pieces)]
        assert ("<summary>2 more" in diagnosis.to_html()) is folds


def test_a_healthy_model_is_told_so() -> None:
    texts = Parsed(without_plotly(synthetic.healthy().to_html())).texts
    assert "Nothing found" in texts


@pytest.mark.parametrize("heads", [False, True])
def test_a_model_without_attention_has_no_section_for_it(heads: bool) -> None:
    diagnosis = synthetic.healthy()
    layer = dataclasses.replace(
        diagnosis.layers[0], statistics={}, class_mass={}, top_keys=[], pooled=[], similarity=[]
    )
    diagnosis.layers = [layer] if heads else []
    ids = [v for _, name, v in Parsed(diagnosis.to_html()).attributes if name == "id"]
    assert "heads" not in ids
    assert "depth" in ids
    diagnosis.hidden = []
    ids = [v for _, name, v in Parsed(diagnosis.to_html()).attributes if name == "id"]
    assert "depth" not in ids
