"""How low the entropy of a row can be, told from the size of its scores alone.

Softmax does not see a constant added to a row, so only the row's *mean-centred* scores count. Let s
be their Euclidean norm and T the number of visible keys. Of all rows with centred norm at most s,
the one of least entropy has one high score and T - 1 equal low ones, with the gap
`s * sqrt(T / (T - 1))` between them. `entropy_lower_bound` is the entropy of that row: an exact
minimum that decays like `T s exp(-s)`. It is theorem 3.1 of "Stabilizing Transformer Training by
Preventing Attention Entropy Collapse" (Zhai et al. 2023, arXiv 2303.06296), which uses it with the
norm of the whole score matrix.

Two norms to put in:

- `global_logit_norm`, from the weights and the spread of the tokens: the paper's. It holds for
  every row at once, knows nothing about a single one, and is often so large that the bound is 0;
- `centred_logit_norm`, of each row by itself: sharper, and still exact. It needs no map.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.core.kernels import map_rows
from attending.core.precision import full_precision
from attending.core.statistics._call import Call, prepare
from attending.core.statistics.rows import Key, Query, Rows

CHUNK = 128  # keys that a causal row is compared with one by one; those before are summed up


@full_precision
def entropy_lower_bound(
    num_keys: int | Int[Tensor, "*key_rows"] | Float[Tensor, "*key_rows"],
    logit_norm: float | Float[Tensor, "*norm_rows"],
) -> Float[Tensor, "*rows"]:
    """The least Shannon entropy, in nats, of a softmax over `num_keys` scores of this norm.

        b = exp(-s sqrt(T / (T - 1)))
        bound(T, s) = log(1 + (T - 1) b) + s sqrt(T (T - 1)) b / (1 + (T - 1) b)

    computed as `softplus(m) + x sigmoid(m)` with `x = s sqrt(T / (T - 1))` and
    `m = log(T - 1) - x`, which neither overflows nor loses digits for any s. `bound(T, 0)` is
    `log T`; one key, or none, gives 0; an infinite norm gives 0. Differentiable in `logit_norm`,
    and falling in it.

    Args:
        num_keys: T, how many keys the row sees. Under a causal mask that is `i + 1` in row i.
        logit_norm: s, the Euclidean norm of the row's mean-centred scores, or any number above it,
            such as the norm of the scores themselves. Broadcasts with `num_keys`. Scores include
            the softmax scale and biases.

    Returns:
        The bound. In the dtype of `logit_norm`, at least float32; float64 if both are numbers.

    Raises:
        ValueError: for a negative number of keys or a negative norm.

    Source: theorem 3.1 of arXiv 2303.06296, as two independent summaries agree on it; that it is
    the exact minimum was checked numerically for the project's card and in this library's tests.

    Example:
        >>> bound = entropy_lower_bound(16, 4.0)
        >>> norm = centred_logit_norm(query, key, is_causal=True)
        >>> per_row = entropy_lower_bound(torch.arange(1, norm.shape[-1] + 1), norm)
    """
    if not isinstance(logit_norm, Tensor):
        dtype = torch.float64
        if isinstance(num_keys, Tensor) and num_keys.is_floating_point():
            dtype = torch.promote_types(num_keys.dtype, torch.float32)
        logit_norm = torch.as_tensor(
            logit_norm,
            dtype=dtype,
            device=num_keys.device if isinstance(num_keys, Tensor) else None,
        )
    if not logit_norm.is_floating_point():
        raise ValueError(
            f"logit_norm: expected a floating point tensor or a number, got {logit_norm.dtype}."
        )
    norm = logit_norm.to(torch.promote_types(logit_norm.dtype, torch.float32))
    count = torch.as_tensor(num_keys, device=norm.device).to(norm.dtype)
    if not torch.compiler.is_compiling():
        if bool((count < 0).any()):
            raise ValueError("num_keys: expected counts of at least 0, got a negative one.")
        if bool((norm < 0).any()):
            raise ValueError("logit_norm: expected norms of at least 0, got a negative one.")
    several = count > 1
    count = count.clamp_min(2.0)
    gap = (norm * (count / (count - 1)).sqrt()).clamp_max(torch.finfo(norm.dtype).max)
    exponent = (count - 1).log() - gap
    # The exact softplus: that of torch switches to the identity above a threshold.
    bound = torch.logaddexp(exponent, torch.zeros_like(exponent)) + gap * exponent.sigmoid()
    return torch.where(several, bound, torch.zeros_like(bound))


@full_precision
def global_logit_norm(
    query_weight: Float[Tensor, "*heads dim hidden"],
    key_weight: Float[Tensor, "*heads dim hidden"],
    hidden: Float[Tensor, "*batch tokens hidden"],
    scale: float | None = None,
) -> Float[Tensor, "*rows"]:
    """`scale * ||W_K W_Q^T||_2 * ||X X^T||_2`: no row of scores has a larger norm, in any head.

    This is the s of the paper's theorem. Neither the map nor `X X^T` is built: `||X X^T||_2` is the
    square of the largest singular value of X, and the product of two thin weights is reduced by QR.

    Args:
        query_weight: one head's part of `q_proj.weight`, in the layout of `torch.nn.Linear`
            (`query = hidden @ weight.T`), or all heads stacked: `weight.unflatten(0, (heads, -1))`.
        key_weight: likewise, with as many heads (repeat them for grouped queries).
        hidden: the tokens X that both weights are applied to, that is after the LayerNorm before
            attention. Where the projections have biases, append a column of ones to `hidden` and
            the biases as a last column to the weights. Rotary position encodings are rotations of
            query and key and not covered: the product of the two weights' norms bounds them.
        scale: the softmax scale, `dim ** -0.5` by default.

    Returns:
        The leading dimensions of the weights and of `hidden`, broadcast together. For a batch and
        several heads give one of them a dimension of size 1.

    Raises:
        ValueError: if the shapes do not fit.
    """
    for name, tensor in (
        ("query_weight", query_weight), ("key_weight", key_weight), ("hidden", hidden)
    ):  # fmt: skip
        if tensor.dim() < 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: expected a floating point tensor of 2 dimensions or more, got "
                f"{tensor.dtype} {list(tensor.shape)}."
            )
    if query_weight.shape[-2:] != key_weight.shape[-2:]:
        raise ValueError(
            "key_weight: expected the last two dimensions [dim, hidden] of query_weight, "
            f"{list(query_weight.shape[-2:])}, got {list(key_weight.shape)}. Pass one head, "
            "or heads stacked in front: weight.unflatten(0, (heads, -1))."
        )
    dim, width = query_weight.shape[-2:]
    if hidden.shape[-1] != width:
        raise ValueError(
            f"hidden: expected [..., tokens, {width}], as wide as the weights' last dimension, got "
            f"{list(hidden.shape)}."
        )
    dtype = torch.promote_types(query_weight.dtype, torch.float32)
    query_side, key_side = query_weight.to(dtype).mT, key_weight.to(dtype).mT
    if dim < width:
        query_side, key_side = torch.linalg.qr(query_side).R, torch.linalg.qr(key_side).R
    of_weights: Tensor = torch.linalg.matrix_norm(key_side @ query_side.mT, 2)
    of_tokens: Tensor = torch.linalg.matrix_norm(hidden.to(dtype), 2).square()
    return of_weights * of_tokens * (dim**-0.5 if scale is None else abs(scale))


@full_precision
def centred_logit_norm(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Rows:
    """The Euclidean norm of each row's scores over its visible keys, after their mean is taken off.

        norm[i] = sqrt(sum_j (s[i, j] - mean_j s[i, j])^2)
                = scale * sqrt(query[i]^T C query[i]),    C = sum_j (k_j - mean)(k_j - mean)^T

    a quadratic form of the query, so the map is not needed: O(keys dim^2) instead of
    O(queries keys dim), in float64, since a square costs half of the digits. Under `is_causal` the
    C of all keys before a block of 128 is carried along and joined with the block's own scores by
    the sum-of-squares formula of Chan et al. (1979), which only ever adds. Masks and biases per key
    are as cheap; a mask with a row per query is evaluated in blocks of rows.

    Put into `entropy_lower_bound` it gives a bound for that very row, and its size against
    `sqrt(T)` says how sharp a head's scores are apart from where they point. 0 for a row that sees
    one key or none. Takes what `statistics.entropy` takes.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    per_pair = call.bias is not None and call.bias.shape[2] > 1
    per_query_head = call.bias is not None and call.bias.shape[1] > 1 and call.groups > 1
    if per_pair or per_query_head:
        blocks = map_rows(
            _norm_of_scores, call.query, call.key, call.bias, call.is_causal, call.scale
        )
        return torch.cat([rows for (rows,) in blocks], 2)
    return _root(centred_squares(call)).to(call.query.dtype)


def centred_squares(call: Call) -> Float[Tensor, "batch heads queries"]:
    """`sum_j (s[i, j] - mean_j s[i, j])^2` over the keys that each query sees, in float64.

    For calls without a bias per pair, or per query head of a group; see `score_norm`.
    """
    squares = _squares_causal(call) if call.is_causal else _squares(call)
    return squares.flatten(1, 2)


def _norm_of_scores(scores: Tensor) -> tuple[Tensor]:
    squares, _ = _centred_squares(scores.double(), scores > -math.inf)
    return (_root(squares).to(scores.dtype),)


def _centred_squares(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_j (s_j - mean)^2` and the mean, over the visible keys of each row."""
    count = visible.sum(-1, keepdim=True).clamp_min(1)
    scores = scores.masked_fill(~visible, 0.0)
    mean = scores.sum(-1, keepdim=True) / count
    return (scores - mean).masked_fill(~visible, 0.0).square().sum(-1), mean.squeeze(-1)


def _root(squares: Tensor) -> Tensor:
    """The square root, with the gradient 0 at 0: a row of equal scores has no direction to go."""
    positive = squares > 0
    return torch.where(positive, squares.where(positive, torch.ones_like(squares)).sqrt(), 0.0)


def _grouped(call: Call) -> tuple[Tensor, Tensor]:
    """Query `[batch, kv_heads, groups, queries, dim]`, scaled, and key, both in float64."""
    query = call.query.double() * call.scale
    return query.unflatten(1, (call.key.shape[1], call.groups)), call.key.double()


def _form(query: Tensor, scatter: Tensor) -> Tensor:
    """`query[i]^T scatter query[i]`; not below 0, where rounding may take it."""
    return ((query @ scatter.unsqueeze(2)) * query).sum(-1).clamp_min(0.0)


def _squares(call: Call) -> Tensor:
    query, key = _grouped(call)
    weights = torch.ones((), dtype=key.dtype, device=key.device)
    if call.bias is not None:
        # [batch, heads, keys, 1]. A bias per key is one more feature of the key.
        bias = call.bias.double().mT.expand(*call.bias.shape[:2], key.shape[2], 1)
        weights = (bias > -math.inf).double()
        bias = bias.masked_fill(weights == 0, 0.0).expand(*key.shape[:3], 1)
        key = torch.cat([key, bias], -1)
        query = torch.cat([query, torch.ones_like(query[..., :1])], -1)
    count = (weights.expand(*key.shape[:3], 1)).sum(2, keepdim=True).clamp_min(1.0)
    centred = (key - (key * weights).sum(2, keepdim=True) / count) * weights
    return _form(query, centred.mT @ centred)


def _squares_causal(call: Call) -> Tensor:
    query, key = _grouped(call)
    batch, heads, keys, dim = key.shape
    scatter, mean = key.new_zeros(batch, heads, dim, dim), key.new_zeros(batch, heads, 1, dim)
    squares = []
    for start in range(0, min(query.shape[-2], keys), CHUNK):
        rows, block = query[..., start : start + CHUNK, :], key[:, :, start : start + CHUNK]
        if start + CHUNK >= keys:  # the rows from here on see the block as far as it goes
            rows = query[..., start:, :]
        visible = torch.ones(
            rows.shape[-2], block.shape[2], dtype=torch.bool, device=key.device
        ).tril()
        inner, inner_mean = _centred_squares(rows @ block.unsqueeze(2).mT, visible)
        count = visible.sum(-1).double()
        gap = (rows @ mean.unsqueeze(2).mT).squeeze(-1) - inner_mean
        squares.append(
            _form(rows, scatter) + inner + (start * count / (start + count)) * gap.square()
        )
        size = block.shape[2]
        block_mean = block.mean(2, keepdim=True)
        centred, step = block - block_mean, block_mean - mean
        joint = start * size / (start + size)
        scatter = scatter + centred.mT @ centred + joint * (step.mT @ step)
        mean = mean + step * (size / (start + size))
    return torch.cat(squares, -1)
