"""One seed for each row of a batch, so that a row comes out alike whatever stands beside it."""

from collections.abc import Sequence


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """``seed + i`` for row ``i``, or the seeds as they are given, one for each row.

    Raises:
        ValueError: For another number of seeds than of rows.
    """
    if isinstance(seed, int):
        return [seed + row for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(
            f"expected one seed for each of the {rows} rows, got {len(seed)}; give one number to "
            "count up from, or as many as there are rows"
        )
    return list(seed)
