"""Dynamic pruning of DependencyViT-Lite: tokens that hardly send are dropped between blocks.

Leaves of the dependency tree send their message and are then looked at by nobody. After chosen
blocks the tokens with the largest message `m` stay (2304.03282; formula of the number from a
third-party port to timm, whose last revision ranks by the message, an earlier one by the mass that
a token receives). What ranks the tokens is an argument here, so that both can be had.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Kept(NamedTuple):
    """The tokens that are left.

    Attributes:
        hidden: the tokens, `[batch, keep, dim]`, in their order.
        message: their messages.
        indices: where each was before, ascending.
    """

    hidden: Float[Tensor, "batch keep dim"]
    message: Float[Tensor, "batch keep"]
    indices: Int[Tensor, "batch keep"]


def prune_by_message(
    hidden: Float[Tensor, "batch tokens dim"],
    message: Float[Tensor, "batch tokens"],
    keep: int,
    rank: Float[Tensor, "batch tokens"] | None = None,
) -> Kept:
    """Keep the `keep` tokens of each sequence that send most, in the order in which they stood.

    Among equals the first stay. Gradients go to what is kept; the choice has none. Padding goes
    first if its message is 0, as `ReversedAttention` makes it.

    Args:
        hidden, message: as a layer returned them.
        keep: how many; `kept_tokens` has the paper's number.
        rank: what to rank by in place of the message, such as the mass that a token receives,
            `dependency.sum(-1)`.

    Raises:
        ValueError: for a number of tokens that are not there, or a rank of another shape.
    """
    tokens = hidden.shape[1]
    if not 1 <= keep <= tokens:
        raise ValueError(f"keep: expected 1 to {tokens}, the number of tokens, got {keep}.")
    for name, given in (("message", message), ("rank", rank)):
        if given is not None and given.shape != hidden.shape[:2]:
            raise ValueError(
                f"{name}: expected [batch, tokens] = {list(hidden.shape[:2])}, that of hidden, "
                f"got {list(given.shape)}."
            )
    order = (message if rank is None else rank).argsort(dim=1, descending=True, stable=True)
    indices = order[:, :keep].sort(1).values
    there = indices[..., None].expand(-1, -1, hidden.shape[2])
    return Kept(hidden.gather(1, there), message.gather(1, indices), indices)


def kept_tokens(tokens: int, point: int, ratio: float = 0.16) -> int:
    """How many of the tokens that there are stay at the `point`-th pruning (1 is the first).

        floor(tokens * (1 - point * ratio) / (1 - (point - 1) * ratio))

    so that about `1 - point * ratio` of the first number are left: 196 -> 164 -> 132 -> 100 -> 69.

    Raises:
        ValueError: for numbers that leave no token.
    """
    if point < 1 or not 0 <= ratio < 1 or point * ratio >= 1 or tokens < 1:
        raise ValueError(
            "point: expected at least 1, with point * ratio below 1 and at least 1 token, got "
            f"point {point}, ratio {ratio} and {tokens} tokens."
        )
    return max(1, int(tokens * (1 - point * ratio) / (1 - (point - 1) * ratio)))
