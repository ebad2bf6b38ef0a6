"""Functions of a query and a set of keys that are hard in known ways, and random sets for them.

From the simulations of "What can a Single Attention Layer Learn?" (2307.11353); their exact list is
from memory. A model that learns one of these from few samples has the matching bias built in:

    key_power           1/N sum_i <direction, x_i>^p             reads each key on its own
    correlation_power   1/N sum_i <x_0, x_i>^q <direction, x_i>  compares each key with the query
    correlation_relu    1/N sum_i relu(<x_0, x_i>) <direction, x_i>
    mixed_power         gamma correlation_power + (1 - gamma) key_power

All of them ignore the order of the keys. An average over N keys has a variance of about 1/N: scale
the targets to variance 1 before errors are compared.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def random_sets(
    count: int,
    num_keys: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch keys dim"]]:
    """Queries and sets of keys, all independent and uniform on the unit sphere.

    Args:
        count: how many sets.
        num_keys: in each set.
        dim: numbers in the query and in each key.
        generator: torch's own by default.
        dtype: torch's default by default.

    Raises:
        ValueError: a size below 1.
    """
    if min(count, num_keys, dim) < 1:
        raise ValueError(
            f"count, num_keys, dim: expected at least 1 of each, got {count}, {num_keys} and {dim}."
        )
    points = torch.randn(count, num_keys + 1, dim, generator=generator, dtype=dtype)
    points = torch.nn.functional.normalize(points, dim=-1)
    return points[:, 0], points[:, 1:]


def key_power(
    key: Float[Tensor, "batch keys dim"], direction: Float[Tensor, "dim"], power: int
) -> Float[Tensor, "batch"]:
    """`1/N sum_i <direction, x_i>^power`, a mean of polynomials of single keys.

    Raises:
        ValueError: a power below 1, or shapes that do not fit.
    """
    _check(key, direction, None, power)
    return (key @ direction).pow(power).mean(-1)


def correlation_power(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch keys dim"],
    direction: Float[Tensor, "dim"],
    power: int,
) -> Float[Tensor, "batch"]:
    """`1/N sum_i <x_0, x_i>^power <direction, x_i>`.

    Raises:
        ValueError: a power below 1, or shapes that do not fit.
    """
    _check(key, direction, query, power)
    return (_correlation(query, key).pow(power) * (key @ direction)).mean(-1)


def correlation_relu(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch keys dim"],
    direction: Float[Tensor, "dim"],
) -> Float[Tensor, "batch"]:
    """`1/N sum_i relu(<x_0, x_i>) <direction, x_i>`, what one head of mean identity computes.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(key, direction, query, 1)
    return (_correlation(query, key).relu() * (key @ direction)).mean(-1)


def mixed_power(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch keys dim"],
    direction: Float[Tensor, "dim"],
    power: int,
    gamma: float,
) -> Float[Tensor, "batch"]:
    """`gamma correlation_power + (1 - gamma) key_power`, from keys alone (0) to the query (1).

    Raises:
        ValueError: gamma outside of 0 to 1, a power below 1, or shapes that do not fit.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: expected a number from 0 to 1, got {gamma}.")
    correlated = correlation_power(query, key, direction, power)
    return gamma * correlated + (1 - gamma) * key_power(key, direction, power)


def _correlation(query: Tensor, key: Tensor) -> Tensor:
    return (key @ query[..., None]).squeeze(-1)


def _check(key: Tensor, direction: Tensor, query: Tensor | None, power: int) -> None:
    if power < 1:
        raise ValueError(f"power: expected at least 1, got {power}.")
    if key.dim() != 3 or key.shape[1] == 0 or direction.shape != key.shape[2:]:
        raise ValueError(
            "key, direction: expected [batch, keys, dim] with at least one key, and [dim], got "
            f"{list(key.shape)} and {list(direction.shape)}."
        )
    if query is not None and query.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"query: expected [batch, dim] = {[key.shape[0], key.shape[2]]}, got "
            f"{list(query.shape)}."
        )
