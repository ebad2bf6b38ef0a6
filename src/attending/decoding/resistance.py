"""How much momentum decoding resists a return to old tokens: tables over the circular depth."""

import math
from collections.abc import Mapping

RESISTANCES: Mapping[str, tuple[float, ...]] = {
    "dec2022": (0, 1, 3, 4, 5, 5),
    "first_commit": (0, 1, 3, 4, 5, 6),
    "gpt2xl_head": (0, 1, 2, 3, 4, 5),
    "chinese": (0, 1, 1, 2, 3, 4),
    "ngram4": (0, 0, 0, 0, 5, math.inf),
    "log": (0, *(5 * math.log(1 + depth, 6) for depth in range(1, 6))),
    "exp": (0, *(1.5**depth / 2 for depth in range(1, 6))),
    "constant": (0, 2, 2, 2, 2, 2),
}
"""The tables f(0), ..., f(5) of the official repository, by name; made for alpha = 0.2.

"dec2022" is of the day of the paper, for GPT2-XL; "gpt2xl_head" a later one for that model;
"chinese" for a Chinese model of 3.5 B parameters; "ngram4" blocks 4-grams and no more; "log", "exp"
and "constant" are ablations. Where alpha * f is 1 or more, a token is taken only if no candidate is
new, however small its probability.
"""

Resistance = str | tuple[float, ...]


def penalties(
    alpha: float, top_k: int, resistance: Resistance, max_depth: int | None
) -> tuple[float, ...]:
    """The numbers alpha * f(c) for c = 0, ..., max_depth, of checked settings.

    Args:
        alpha: the weight; 0 makes all of them 0.
        top_k: how many candidates there are; only checked.
        resistance: a name in `RESISTANCES`, or a table f(0), f(1), ...
        max_depth: the last depth of the table if None. Deeper than that, its last entry counts.

    Raises:
        ValueError: for settings out of range.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha: expected a finite number from 0, got {alpha!r}.")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k!r}.")
    table = RESISTANCES.get(resistance) if isinstance(resistance, str) else tuple(resistance)
    if table is None or len(table) < 2 or not all(entry >= 0 for entry in table):
        raise ValueError(
            f"resistance: expected one of {', '.join(RESISTANCES)}, or a table f(0), f(1), ... of "
            f"at least two numbers from 0, got {resistance!r}."
        )
    if max_depth is None:
        max_depth = len(table) - 1
    if max_depth < 1:
        raise ValueError(f"max_depth: expected at least 1, got {max_depth!r}.")
    entries = (table[min(depth, len(table) - 1)] for depth in range(max_depth + 1))
    return tuple(alpha * entry if alpha else 0.0 for entry in entries)
