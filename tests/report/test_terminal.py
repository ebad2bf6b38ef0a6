"""What print and a terminal show: never a control sequence or a markup from the model."""

import io
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from attending.diagnosis.record import Diagnosis
from attending.report.terminal import as_text, bar, print_report
from tests.report import synthetic
from tests.report.hostile import TEXTS, saying, texts


def shown(diagnosis: Diagnosis, width: int = 80, colours: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colours,
        color_system="truecolor" if colours else None,
        legacy_windows=False,
    )
    print_report(diagnosis, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def in_encoding(diagnosis: Diagnosis, encoding: str, width: int = 80) -> str:
    """What a console gets that can encode nothing else; it raises where that is not enough."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    print_report(diagnosis, Console(file=file, width=width, legacy_windows=False))
    return raw.getvalue().decode(encoding)


def hidden_in(text: str) -> list[str]:
    return [
        c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int, speech: Diagnosis) -> None:
    for line in shown(speech, width).splitlines():
        assert cell_len(line) <= width


@pytest.mark.parametrize("width", [10, 24, 40, 57, 80, 120])
@pytest.mark.parametrize("text", ["猫" * 40, "x" * 300, "a.0.b", ""])
def test_long_and_wide_names_fit(width: int, text: str) -> None:
    for line in shown(saying(text), width).splitlines():
        assert cell_len(line) <= width


def test_what_is_shown(speech: Diagnosis) -> None:
    text = joined(shown(speech))
    assert "synthetic/speech-<tiny>" in text
    assert "22.7 M parameters, 18 layers, 141 heads" in text
    assert "1 critical, 2 warnings, 1 note" in text
    assert "Critical Attention sink on the first token" in text
    assert "decoder, layer 5, head 3 92% of the attention on [CLS]" in text
    assert "and 45 more" in text
    assert "CKA 0.972; strongest key [red]" in text
    assert "</script><script>window.__pwned=1</script>" in text
    assert text.index("Critical") < text.index("Warning") < text.index("Note")


def test_the_table_has_the_means_of_each_layer(speech: Diagnosis) -> None:
    text = shown(speech, 120)
    table = text.partition("model.decoder.layers  self-attention, causal")[2]
    row = next(line for line in table.splitlines() if re.match(r"\s+2\s", line)).split()
    layer = next(one for one in speech.layers if one.name == "model.decoder.layers.2.self_attn")
    numbers = [float(word) for word in row if re.fullmatch(r"[\d.]+", word)]
    means = [
        sum(layer.statistics[name]) / 5
        for name in ("entropy", "normalized_entropy", "sink", "first_token")
    ]
    assert numbers[:2] == [2, 5]
    assert numbers[2:] == pytest.approx(means, rel=0.006)


def test_tables_of_a_model_stand_in_line(speech: Diagnosis) -> None:
    heads = [line for line in shown(speech, 120).splitlines() if line.startswith("layer")]
    assert len(heads) == 3
    assert len(set(heads)) == 1


@pytest.mark.parametrize(
    ("width", "columns", "bars"), [(24, 1, 0), (30, 1, 1), (40, 2, 0), (80, 4, 1)]
)
def test_narrow_terminals_show_fewer_columns(
    width: int, columns: int, bars: int, speech: Diagnosis
) -> None:
    text = shown(speech, width)
    [line, *_] = [line for line in text.splitlines() if line.startswith("layer")]
    names = ["entropy", "normalized", "strongest key", "first token"]
    assert [name in line for name in names] == [True] * columns + [False] * (4 - columns)
    assert ("█" in text) is bool(bars)


def test_deep_models_get_one_line_for_several_layers(huge: Diagnosis) -> None:
    text = shown(huge)
    assert "one layer in 4" in joined(text)
    rows = [line for line in text.splitlines() if re.match(r"\s+\d+\s+64\s", line)]
    assert [int(line.split()[0]) for line in rows] == list(range(0, 80, 4))


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_texts_are_shown_and_not_obeyed(text: str) -> None:
    out = shown(saying(text), 100)
    assert not hidden_in(out)
    if text.startswith("[") and "\x1b" not in text:
        assert text in out
    assert not hidden_in(as_text(saying(text)))


@given(texts, texts)
@settings(max_examples=40)
def test_nothing_hidden_gets_through(name: str, words: str) -> None:
    diagnosis = saying(name, name, words)
    assert not hidden_in(as_text(diagnosis))
    out = shown(diagnosis, 60)
    assert not hidden_in(out)
    out.encode("utf-8")


@pytest.mark.parametrize("text", ["\x1b[5m", "\x1b]8;;file:///x\x07", "[blink]", "[link=x]a[/]"])
def test_colours_are_ours_alone(text: str) -> None:
    out = shown(saying(text), 100, colours=True)
    assert set(re.findall(r"\x1b(.)", out)) == {"["}
    sequences = set(re.findall(r"\x1b\[([\d;]*)m", out))
    assert sequences == {"0", "1", "2", "33", "36", "34"}  # bold, dim, yellow, cyan, blue
    assert not hidden_in(re.sub(r"\x1b\[[\d;]*m", "", out))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8", "utf-16"])
@pytest.mark.parametrize("width", [24, 40, 80])
def test_consoles_of_few_characters(encoding: str, width: int, speech: Diagnosis) -> None:
    text = in_encoding(speech, encoding, width)
    assert "Attention sink" in joined(text)
    if encoding == "ascii":
        assert text.isascii()
        assert ("###" in text) is (width == 80)


@given(texts, st.sampled_from(["ascii", "cp1252", "shift_jis"]))
@settings(max_examples=30)
def test_any_text_can_be_encoded(text: str, encoding: str) -> None:
    in_encoding(saying(text), encoding, 50)


def test_print_is_plain_text(speech: Diagnosis) -> None:
    text = str(speech)
    assert repr(speech) == text == as_text(speech)
    assert text.startswith("synthetic/speech-<tiny>: SyntheticModel, 22.7 M parameters")
    assert "CRITICAL: Attention sink on the first token" in text
    assert "  - decoder, layer 5, head 3: 92% of the attention on [CLS]" in text
    assert max(map(len, text.splitlines()[2:])) <= 96
    assert text.endswith("to_html(path) writes a page to click through.")


def test_nothing_found() -> None:
    for text in (shown(synthetic.healthy()), as_text(synthetic.healthy())):
        assert "Nothing found: no head and no block crossed a threshold." in text


def test_a_model_without_attention_can_be_shown() -> None:
    empty = synthetic.healthy()
    empty.layers = []
    assert "0 layers, 0 heads" in joined(shown(empty))
    empty = synthetic.healthy()
    empty.layers[1].statistics = {}
    assert joined(shown(empty)).count("-attention") == 1


@given(st.floats(-1, 2), st.integers(0, 20), st.sampled_from(["utf-8", "ascii"]))
def test_a_bar_is_as_long_as_its_share(share: float, width: int, encoding: str) -> None:
    drawn = bar(share, width, encoding)
    eighths = {"█": 8, "#": 8} | {c: k for k, c in enumerate(" ▏▎▍▌▋▊▉")}
    length = sum(eighths[c] for c in drawn) / 8
    assert len(drawn) <= width
    tolerance = 0.5 if encoding == "ascii" else 1 / 16
    assert abs(length - min(max(share, 0), 1) * width) <= tolerance + 1e-9
