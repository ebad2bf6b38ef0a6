"""A text as a walk over its tokens, and how long a circle the next step would close.

The circular depth of a token v after a context x, with a cap S:

    c(v) = 0 if v is not in x, else the largest n <= S such that the last n - 1 tokens of x,
           followed by v, occur somewhere in x

It is what `attending.decoding.momentum` resists to. On a text that is there it is a probe: the
depth of each token, given those before it, is the length of the passage that it repeats.

Source: Lan et al. 2212.02175, whose graph of tokens is book-keeping for this.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Walk:
    """A walk that grows by one token at a time, and knows after each short passage what came.

    Appending a token takes O(max_depth) steps, and so does asking for the depth of one candidate.
    Passages are kept as they are, not as hashes that could collide: at most `max_depth` entries for
    each token.

    Args:
        max_depth: S, at least 1.
        tokens: to begin with.
    """

    def __init__(self, max_depth: int = 5, tokens: Iterable[int] = ()) -> None:
        _check_depth(max_depth)
        self._longest = max_depth - 1
        self._tail: tuple[int, ...] = ()  # the last max_depth - 1 tokens
        self._followers: dict[tuple[int, ...], set[int]] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Go on to these tokens, one after the other."""
        followers, longest, tail = self._followers, self._longest, self._tail
        for token in tokens:
            for start in range(len(tail) + 1):  # every passage that ends here, the empty one too
                passage = tail[start:]
                if passage in followers:
                    followers[passage].add(token)
                else:
                    followers[passage] = {token}
            tail = (*tail, token)
            if len(tail) > longest:
                tail = tail[1:]
        self._tail = tail

    def depths(self, candidates: Sequence[int]) -> list[int]:
        """The circular depth of each candidate for the next token.

        What is seen ends in something shorter that is seen, so depths are tried upwards until one
        fails.
        """
        found = [0] * len(candidates)
        left = list(range(len(candidates)))
        for depth in range(1, len(self._tail) + 2):
            after = self._followers.get(self._tail[len(self._tail) - depth + 1 :], ())
            left = [index for index in left if candidates[index] in after]
            if not left:
                break
            for index in left:
                found[index] = depth
        return found


def circular_depth(
    input_ids: Int[Tensor, "batch tokens"],
    candidates: Int[Tensor, "batch candidates"],
    max_depth: int = 5,
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch candidates"]:
    """How long a circle each candidate would close, if it were the next token.

    By comparing the context with itself, on its device, in O(tokens * (max_depth + candidates)).
    `Walk` does the same in O(max_depth) for one token more.

    Args:
        input_ids: the context of each row; the next token comes after its last.
        candidates: token ids.
        max_depth: S, at which counting stops, at least 1.
        attention_mask: 1 or True for tokens, 0 for padding, which matches nothing.

    Returns:
        0 for a token that does not occur in the context, else 1 to `max_depth`.

    Raises:
        ValueError: for shapes that do not fit, ids that are not whole numbers, or a `max_depth`
            below 1.
    """
    _check_depth(max_depth)
    _check_ids(input_ids, candidates, attention_mask)
    length = input_ids.shape[1]
    if not length:
        return torch.zeros_like(candidates)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = real.bool()
    follows = real  # whether the tokens before token i match the last ones, as far as compared
    depth = real.to(candidates.dtype)
    for back in range(1, min(max_depth, length)):
        last = slice(length - back, length - back + 1)
        same = (input_ids == input_ids[:, last]) & real & real[:, last]
        follows = follows & torch.nn.functional.pad(same[:, : length - back], (back, 0))
        depth = depth + follows
    equal = candidates[:, :, None] == input_ids[:, None, :]
    return torch.where(equal, depth[:, None, :], 0).amax(-1)


def _check_depth(max_depth: int) -> None:
    if max_depth < 1:
        raise ValueError(f"max_depth: expected at least 1, got {max_depth}.")


def _check_ids(input_ids: Tensor, candidates: Tensor, attention_mask: Tensor | None) -> None:
    if (
        input_ids.dim() != 2
        or candidates.dim() != 2
        or len(input_ids) != len(candidates)
        or input_ids.is_floating_point()
        or candidates.is_floating_point()
    ):
        raise ValueError(
            "input_ids, candidates: expected whole numbers [batch, tokens] and [batch, candidates],"
            f" got {input_ids.dtype} {list(input_ids.shape)} and {candidates.dtype} "
            f"{list(candidates.shape)}."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}."
        )
