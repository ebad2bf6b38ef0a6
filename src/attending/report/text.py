"""Words and numbers as people read them: tokens made visible, counts, rounded values."""

import math
import unicodedata

# What a reader of a token has to see, although it prints as nothing.
_SIGNS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}

# Control and format characters, lone surrogates, private and unassigned code points, line and
# paragraph separators: they print as nothing, move the cursor or turn the direction of the text.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(token: str) -> str:
    """A token with its whitespace as signs and what prints as nothing as an escape."""
    if token == "":
        return "∅"
    return printable("".join(_SIGNS.get(character, character) for character in token))


def printable(text: str) -> str:
    """Text in one line that is safe to print: no control characters, only plain spaces.

    Escape sequences of terminals and marks that reverse the direction of writing do not survive.
    """
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character in "\n\r\t":
        return _SIGNS[character]
    if unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def rounded(value: float, digits: int = 4) -> float | None:
    """The value to that many significant digits; None where it is no number."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return short if math.isfinite(short) else value  # next to the largest float there is no room


def number(value: float, digits: int = 3) -> str:
    """A value for a sentence: `0.0312`, `12.3`, `1,530`, `2.1e-07`."""
    if not math.isfinite(value):
        return "no number"
    if value == 0:
        return "0"
    short = rounded(value, digits) or 0.0
    if abs(short) < 1e-4 or abs(short) >= 1e7:
        return f"{short:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(short))))
    text = f"{short:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: int) -> str:
    """How many, for people: `482`, `12,304`, `22.7 M`, `7.24 B`."""
    # 999.9 M would round to 1,000 M, so the larger units begin a little earlier.
    for least, size, sign in (
        (9995 * 10**8, 10**12, "T"),
        (9995 * 10**5, 10**9, "B"),
        (10**6, 10**6, "M"),
    ):
        if value >= least:
            return f"{number(value / size)} {sign}"
    return f"{value:,}"


def plural(value: int, one: str, many: str | None = None) -> str:
    """`1 head`, `12 heads`."""
    return f"{count(value)} {one if value == 1 else many or one + 's'}"
