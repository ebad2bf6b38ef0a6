"""Normalisers: what turns a matrix of scores into an attention map.

A normaliser is a function `normalizer(scores, visible=None) -> map` of `[*batch, queries, keys]`.
`attending.nn.doubly_stochastic` takes any of them in place of softmax. Options are fixed with
`functools.partial(sinkhorn, iterations=5)`.

| normaliser | rows sum to 1 | columns sum to 1 | hides | needs |
| --- | --- | --- | --- | --- |
| `softmax` | yes | no | anything | |
| `norm_softmax` | yes | no | anything | |
| `sinkhorn` | yes (odd count) | in the limit | padding, symmetric patterns | |
| `attending.nn.birkhoff.orthostochastic` | yes | yes | padding | as many queries as keys |
| `attending.nn.birkhoff.birkhoff_projection` | yes | yes | padding | as many queries as keys |
| `attending.nn.quantum_circuit.CircuitMap` | yes | yes | nothing | 2^k queries and keys |

Why there is no causal mask: **the only doubly stochastic matrix with zeros above the diagonal is
the identity**. Its first row must be (1, 0, 0, ...); then the first column is spent, the second
row must be (0, 1, 0, ...), and so on. `check_support` refuses it.
"""

import math
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.bias import HIDDEN

Gradient = Literal["full", "truncated"]
Statistic = Literal["variance", "std"]

CAUSAL_REASON = (
    "a map whose rows and columns sum to 1 has no causal form: with zeros above the diagonal only "
    "the identity is doubly stochastic, so every token would see itself alone"
)


@runtime_checkable
class Normalizer(Protocol):
    """What turns scores into a map."""

    def __call__(
        self,
        scores: Float[Tensor, "*batch queries keys"],
        visible: Bool[Tensor, "*#batch queries keys"] | None = None,
    ) -> Float[Tensor, "*batch queries keys"]:
        """The map; entries that are not visible are 0."""
        ...


def softmax(
    scores: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch queries keys"] | None = None,
) -> Float[Tensor, "*batch queries keys"]:
    """`exp(s[i, j]) / sum_j exp(s[i, j])` over the visible keys; 0 for a row that sees none.

    Args:
        scores: finite; half precision is computed, and returned, in float32.
        visible: which entries take part; all by default.
    """
    scores = check_scores(scores, visible)
    if visible is None:
        return torch.softmax(scores, -1)
    return torch.softmax(scores.masked_fill(~visible, HIDDEN), -1).masked_fill(~visible, 0.0)


def norm_softmax(
    scores: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch queries keys"] | None = None,
    *,
    cap: float,
    statistic: Statistic = "variance",
) -> Float[Tensor, "*batch queries keys"]:
    """NormSoftmax: softmax of scores whose spread in each row is held up.

        map[i] = softmax(s[i] / min(cap, spread of s[i]))

    With unscaled scores `query . key` and `cap = sqrt(head_dim)` this is the definition of Hoffmann
    et al. ("Eureka-moments in transformers", 2310.12956), as in their code: the usual temperature
    sqrt(head_dim) where scores vary much, a lower one where they do not, so that rows are never
    nearly even. Rows sum to one, columns do not.

    Args:
        scores: finite; half precision is computed, and returned, in float32.
        visible: which entries take part, in the spread too; all by default.
        cap: the largest divisor, positive.
        statistic: "variance", over n (their softmax_sigma^2), or "std", over n - 1 (softmax_sigma).
            Of a row that is constant the map is even; so it is where n - 1 is 0.

    Raises:
        ValueError: for a cap that is not positive, or another statistic.
    """
    scores = check_scores(scores, visible)
    check_norm_softmax(cap, statistic)
    if visible is None:
        count = torch.full_like(scores[..., :1], scores.shape[-1])
        mean = scores.mean(-1, keepdim=True)
        squares = (scores - mean).square()
    else:
        count = visible.sum(-1, keepdim=True).to(scores.dtype)
        mean = scores.masked_fill(~visible, 0.0).sum(-1, keepdim=True) / count.clamp_min(1.0)
        squares = (scores - mean).square().masked_fill(~visible, 0.0)
    divisor = spread_divisor(squares.sum(-1, keepdim=True), count, cap, statistic)
    # Centred first: 0 / tiny is 0, where large / tiny would overflow.
    return softmax((scores - mean) / divisor, visible)


def spread_divisor(squares: Tensor, count: Tensor, cap: float, statistic: Statistic) -> Tensor:
    """`min(cap, spread)` from sums of squared deviations over `count` numbers; never 0."""
    tiny = torch.finfo(squares.dtype).tiny ** 0.5
    if statistic == "variance":
        return (squares / count.clamp_min(1.0)).clamp(tiny, cap)
    variance = squares / (count - 1.0).clamp_min(1.0)
    return variance.clamp_min(tiny).sqrt().clamp_max(cap)


def sinkhorn(
    scores: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch queries keys"] | None = None,
    *,
    iterations: int = 21,
    temperature: float = 1.0,
    gradient: Gradient = "full",
) -> Float[Tensor, "*batch queries keys"]:
    """Sinkhorn's map: rows and columns of `exp(s)` divided by their sums, in turn.

        f[i] = -log sum_j exp(s[i, j] + g[j])          half-steps 1, 3, 5, ...
        g[j] = log c - log sum_i exp(s[i, j] + f[i])   half-steps 2, 4, 6, ...
        map  = exp(s[i, j] + f[i] + g[j]),             c = queries / keys

    Sander et al., "Sinkformers" (2110.11773), whose map this is after multiplication by the number
    of tokens. `iterations` counts half-steps, as in their code and in QDSFormer (2504.16275): 1 is
    softmax, an odd count leaves the rows exact, an even one the columns. Everything is in logs, so
    large scores neither overflow nor underflow, but they need more steps. The map is the same for
    scores to which a number per row is added, and in the limit a number per column.

    With fewer or more keys than queries the rows sum to 1 and the columns to `queries / keys`.
    Without the map, in memory linear in the tokens: `attending.nn.sinkhorn_attention`.

    Args:
        scores: finite; half precision is computed, and returned, in float32.
        visible: which entries take part; all by default. See `check_support` for what it may be.
        iterations: half-steps, at least 1.
        temperature: divides the scores; positive.
        gradient: "full" goes back through all half-steps. "truncated" takes all but the last one as
            constants, which is the gradient of a softmax with a bias per key: less to keep, and at
            a fixed point not the gradient of the map. The text model of the official code has it
            so (it detaches the column potential); its vision model has the full one.

    Raises:
        ValueError: for options out of range, or `visible` without a doubly stochastic map.
    """
    scores = check_scores(scores, visible)
    check_sinkhorn(iterations, temperature, gradient)
    if scores.numel() == 0:
        return scores.clone()
    scores = scores / temperature
    rows = columns = None
    log_column_sum: float | Tensor = math.log(scores.shape[-2] / scores.shape[-1])
    if visible is not None:
        check_support(visible)
        scores = scores.masked_fill(~visible, HIDDEN)
        rows, columns = visible.any(-1, keepdim=True), visible.any(-2, keepdim=True)
        sums = column_sums(rows[..., 0], columns[..., 0, :])
        log_column_sum = sums.log().to(scores.dtype)[..., None, None]
    f, g = scores.new_zeros(()), scores.new_zeros(())
    for step in range(iterations):
        keep = torch.is_grad_enabled() and (gradient == "full" or step == iterations - 1)
        with torch.set_grad_enabled(keep):
            if step % 2 == 0:
                f = -torch.logsumexp(scores + g, -1, keepdim=True)
                f = f if rows is None else f.masked_fill(~rows, 0.0)
            else:
                g = log_column_sum - torch.logsumexp(scores + f, -2, keepdim=True)
                g = g if columns is None else g.masked_fill(~columns, 0.0)
    return torch.exp(scores + f + g)


def column_sums(
    query_visible: Bool[Tensor, "*batch queries"], key_visible: Bool[Tensor, "*batch keys"]
) -> Float[Tensor, "*batch"]:
    """What each column sums to if each row sums to 1: visible queries over visible keys."""
    queries, keys = query_visible.sum(-1), key_visible.sum(-1)
    return queries.clamp_min(1).to(torch.float64) / keys.clamp_min(1)


def check_support(visible: Bool[Tensor, "*batch queries keys"]) -> None:
    """Raise unless a map that is positive just where `visible` is can have even column sums.

    Two kinds of pattern are let through, each with a proof. Padding: the visible entries are those
    of some rows and some columns; the even map is one. Symmetric patterns in which each token sees
    itself, such as blocks of a packed batch or a window to both sides: each entry (i, j) lies on
    the permutation that exchanges i and j, and the mean of those permutations is such a map.

    Raises:
        ValueError: for a causal pattern, with the reason, and for any other.
    """
    rows, columns = visible.any(-1, keepdim=True), visible.any(-2, keepdim=True)
    padding = (visible == (rows & columns)).flatten(-2).all(-1)
    if bool(padding.all()):
        return
    queries, keys = visible.shape[-2:]
    fits = padding
    if queries == keys:
        itself = visible.diagonal(dim1=-2, dim2=-1) == rows[..., 0]
        symmetric = (visible == visible.transpose(-1, -2)).flatten(-2).all(-1)
        fits = fits | (symmetric & itself.all(-1))
    if bool(fits.all()):
        return
    bad = visible.reshape(-1, queries, keys)[int((~fits).flatten().nonzero()[0])]
    if not bool(bad.triu(1).any()):
        raise ValueError(f"attn_mask: expected no causal mask: {CAUSAL_REASON}.")
    raise ValueError(
        "attn_mask: expected padding, or a symmetric pattern in which each token sees itself (such "
        "as blocks, or a window to both sides): other patterns may have no map whose rows and "
        f"columns sum to 1. Got {int(bad.sum())} visible of {queries} x {keys} entries."
    )


def padding_of(
    visible: Bool[Tensor, "*batch tokens tokens"], what: str
) -> Bool[Tensor, "*batch tokens"]:
    """Which tokens are no padding, for normalisers that can leave out tokens and nothing else.

    Raises:
        ValueError: where the visible entries are not all pairs of the same queries and keys.
    """
    rows, columns = visible.any(-1), visible.any(-2)
    if not bool((visible == (rows[..., :, None] & columns[..., None, :])).all()) or not bool(
        (rows == columns).all()
    ):
        raise ValueError(
            f"attn_mask: {what} can leave out tokens that are padding, as queries and as keys "
            "alike, and nothing else; got a mask that hides single pairs. Causal masks have no "
            f"such map: {CAUSAL_REASON}."
        )
    return rows


def check_scores(scores: Tensor, visible: Tensor | None) -> Tensor:
    """The scores, at least in float32; raise where they and `visible` do not fit together."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.dim() < 2:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        kind = f" of {scores.dtype}" if isinstance(scores, Tensor) else ""
        raise ValueError(
            f"scores: expected floats [*batch, queries, keys], got {got}{kind}. A single matrix is "
            "[queries, keys]."
        )
    if visible is not None:
        fits = visible.dtype == torch.bool and 2 <= visible.dim() <= scores.dim()
        fits = fits and visible.shape[-2:] == scores.shape[-2:]
        fits = fits and all(
            size in (1, whole)
            for size, whole in zip(reversed(visible.shape), reversed(scores.shape), strict=False)
        )
        if not fits:
            raise ValueError(
                "visible: expected booleans (True = visible) with the last two dimensions of "
                f"scores {list(scores.shape)}, and others that broadcast, got "
                f"{list(visible.shape)} of {visible.dtype}."
            )
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def check_sinkhorn(iterations: int, temperature: float, gradient: str) -> None:
    """Raise for options of Sinkhorn that are out of range."""
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(
            "iterations: expected a whole number of half-steps, at least 1 (which is softmax; odd "
            f"counts leave the rows exact), got {iterations!r}."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}.")
    if gradient not in ("full", "truncated"):
        raise ValueError(f'gradient: expected "full" or "truncated", got {gradient!r}.')


def check_norm_softmax(cap: float, statistic: str) -> None:
    """Raise for options of NormSoftmax that are out of range."""
    if not 0 < cap < math.inf:
        raise ValueError(f"cap: expected a positive number, such as sqrt(head_dim), got {cap}.")
    if statistic not in ("variance", "std"):
        raise ValueError(f'statistic: expected "variance" or "std", got {statistic!r}.')
