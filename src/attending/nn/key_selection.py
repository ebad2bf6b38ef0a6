"""Which keys a query keeps, by one score per key: the w highest, for one row or for all at once.

Scores that do not depend on the query rank the keys once and for all. Under a causal mask that has
a consequence which makes dynamic masks cheap: a key that w better ones have pushed out never comes
back, so the rows that keep it are one interval, from its own row to its last. `key_lifetimes` finds
the end of each interval in O(N log N) without a loop over tokens, where a top-w for each row takes
O(N^2). The N x N mask is never needed; an eviction from a cache by the same rule loses nothing.

Ties are broken the same way everywhere: of equal keys the most recent are kept. A score of -inf
hides a key: it is never kept.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


def keep_largest(scores: Float[Tensor, "*rows keys"], window: int) -> Bool[Tensor, "*rows keys"]:
    """The `window` highest scores of each row; of equal ones the last.

    Args:
        scores: -inf is never kept. A mask goes in as -inf, before the choice and not after it.
        window: how many at most; a row with fewer visible keys keeps them all.

    Raises:
        ValueError: for a window below 1.
    """
    check_window(window)
    if window >= scores.shape[-1]:
        return scores > -math.inf
    lowest = scores.topk(window, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > lowest, (scores == lowest) & (scores > -math.inf)
    room = window - above.sum(-1, keepdim=True)
    return above | (equal & (equal.flip(-1).cumsum(-1).flip(-1) <= room))


def keep_positive(scores: Float[Tensor, "*rows keys"]) -> Bool[Tensor, "*rows keys"]:
    """The keys that score above 0, however many: `relu_mask` of the official kernels' examples."""
    return scores > 0


def smooth_blocks(kept: Bool[Tensor, "*rows keys"], block_size: int) -> Bool[Tensor, "*rows keys"]:
    """Keep or drop whole blocks of keys: all of a block where more than half of it is kept.

    That is how the official kernels make a mask of which whole blocks can be skipped; a last,
    shorter block is judged by its own length. The result may keep keys that a causal mask hides
    [seen in the official function's output]: combine it with the causal mask again.

    Raises:
        ValueError: for blocks of less than one key.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}.")
    keys = kept.shape[-1]
    cells = pad(kept, (0, -keys % block_size)).unflatten(-1, (-1, block_size))
    sizes = torch.full((cells.shape[-2],), block_size, device=kept.device)
    sizes[-1:] -= -keys % block_size
    whole = 2 * cells.sum(-1) > sizes
    smoothed: Tensor = whole.repeat_interleave(block_size, -1)[..., :keys]
    return smoothed


def key_lifetimes(scores: Float[Tensor, "*batch keys"], window: int) -> Int[Tensor, "*batch keys"]:
    """The first row that no longer keeps each key, where row i keeps the best of the keys 0..i.

        row i keeps key j   <=>   j <= i < key_lifetimes(scores, window)[j]

    The number is that of the keys where a key stays to the end, at most j where it is never kept,
    and 0 for a score of -inf. Row i keeps `min(i + 1, window)` keys (fewer where some are hidden).

    How: key j goes when the window-th key that is better than it has come. With all keys in order
    of rank, that is the window-th smallest position in a prefix of the order, which a wavelet
    matrix over the positions answers for all keys at once, a bit at a time.

    Args:
        scores: one per key, in order of time.
        window: how many keys a row keeps.

    Raises:
        ValueError: for a window below 1.
    """
    check_window(window)
    keys = scores.shape[-1]
    hidden = scores == -math.inf
    if window >= keys:
        return torch.full_like(hidden, keys, dtype=torch.long).masked_fill(hidden, 0)
    place = torch.arange(keys, device=scores.device).expand(scores.shape)
    positions = keys - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(positions).scatter_(-1, positions, place)
    low, high = torch.zeros_like(rank), rank  # the prefix that holds what is better than key j
    wanted = torch.full_like(rank, window - 1)
    found = torch.zeros_like(rank)
    for bit in reversed(range((keys - 1).bit_length())):
        is_one = (positions >> bit) & 1
        zeros = pad((1 - is_one).cumsum(-1), (1, 0))  # zeros before each place
        total = zeros[..., -1:]
        low_zeros, high_zeros = zeros.gather(-1, low), zeros.gather(-1, high)
        count = high_zeros - low_zeros
        right = wanted >= count
        low = torch.where(right, total + low - low_zeros, low_zeros)
        high = torch.where(right, total + high - high_zeros, high_zeros)
        wanted = wanted - count * right
        found |= right.long() << bit
        target = torch.where(is_one == 1, total + place - zeros[..., :-1], zeros[..., :-1])
        positions = torch.empty_like(positions).scatter_(-1, target, positions)
    return torch.where(rank < window, keys, found).masked_fill(hidden, 0)


def check_window(window: int, name: str = "window") -> None:
    """Raise unless a window is a number of keys, at least 1."""
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"{name}: expected a number of keys of at least 1, got {window!r}.")
