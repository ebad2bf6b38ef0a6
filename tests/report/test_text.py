import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.report.text import count, number, plural, printable, rounded, visible
from tests.report.hostile import texts

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@given(texts)
def test_printable_text_has_nothing_hidden_and_can_be_written(text: str) -> None:
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in HIDDEN]
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown


@given(st.text(st.characters(exclude_categories=tuple(HIDDEN)), max_size=20))
def test_printable_leaves_ordinary_text_alone(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("", "∅"),
        (" the", "␣the"),
        ("\n\n", "⏎⏎"),
        ("\r\t", "␍⇥"),
        ("\u00a0", "⍽"),
        ("\x1b[31m", "\\u001b[31m"),
        ("\u202eevil", "\\u202eevil"),
        ("\u200bx", "\\u200bx"),
        ("\ud83d", "\\ud83d"),
        ("\U000e0001", "\\U000e0001"),
        ("<script>", "<script>"),
        (" 猫é", "␣猫é"),
        ("👩", "👩"),
    ],
)
def test_visible_tokens(token: str, shown: str) -> None:
    assert visible(token) == shown


@given(texts)
def test_a_visible_token_is_never_blank(token: str) -> None:
    assert visible(token).strip()
    assert " " not in visible(token)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.03123, "0.0312"),
        (12.34, "12.3"),
        (1530.4, "1,530"),
        (0.99999, "1"),
        (9.999e-5, "0.0001"),
        (9.9e-5, "9.90e-05"),
        (2.14e-7, "2.14e-07"),
        (-4.5, "-4.5"),
        (99999999.0, "1.00e+08"),
        (math.nan, "no number"),
        (math.inf, "no number"),
        (-math.inf, "no number"),
    ],
)
def test_number(value: float, shown: str) -> None:
    assert number(value) == shown


@given(st.floats(-1e300, 1e300))
def test_number_keeps_three_digits(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=5.01e-3)


@given(st.floats())
def test_rounded_is_a_number_or_none(value: float) -> None:
    short = rounded(value)
    if math.isfinite(value):
        assert short == pytest.approx(value, rel=5.01e-4)
    else:
        assert short is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (482, "482"),
        (12304, "12,304"),
        (999_999, "999,999"),
        (1_000_000, "1 M"),
        (22_713_216, "22.7 M"),
        (999_999_999, "1 B"),
        (7_240_000_000, "7.24 B"),
        (405_000_000_000, "405 B"),
        (1_600_000_000_000, "1.6 T"),
    ],
)
def test_count(value: int, shown: str) -> None:
    assert count(value) == shown


@given(st.integers(0, 10**15))
def test_count_is_short_and_has_no_exponent(value: int) -> None:
    assert len(count(value)) <= 7
    assert "e" not in count(value)


def test_plural() -> None:
    assert [plural(n, "head") for n in (0, 1, 2, 1200)] == [
        "0 heads", "1 head", "2 heads", "1,200 heads",
    ]  # fmt: skip
    assert plural(2, "entry", "entries") == "2 entries"
