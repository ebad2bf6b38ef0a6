"""Frozen-QK attention: random query-key matrices that never learn, and values in closed form.

From "What can a Single Attention Layer Learn? A Study Through the Random Features Lens"
(2307.11353). The layer reads a query and a **set** of keys and gives one number. It is a bench for
the inductive bias of attention, and a regressor on small sets that is fitted without any training.
It is not "Random Feature Attention" (2103.02143), a linear-time approximation of softmax with the
same abbreviation.

With a 1 appended to the query and to each key, `x~ = [x; 1]`, and M heads:

    f(x_0, x_1 .. x_N) = sum_m  1/N sum_i  relu(x~_0^T W_m x~_i) <v_m, x~_i>

`W_m`, in the place of `W_q^T W_k`, is random and frozen; `v_m` is learned. ReLU divided by the
number of keys stands in the place of the softmax, so the weights of a query do not sum to one. The
entries of `W_m` are N(0, 1/4): for a query and keys of length 1 the score is then N(0, 1). "Biased"
attention adds the identity to the block of `W_m` that acts on x (`qk_mean="identity"`), so the
score is `<x_0, x_i>` plus noise.

The formulas are from memory of the paper, whose abstract alone was read, and no official code was
found. What is uncertain: whether `v_m` acts on `x~_i` or `x_i` (`value_bias`), and that 1/4 is the
variance because of the reason above.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attending.core.precision import full_precision
from attending.nn.ridge import ridge_solution


@full_precision
def frozen_attention_features(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch keys dim"],
    qk_weight: Float[Tensor, "heads homogeneous homogeneous"],
    attn_mask: Bool[Tensor, "batch keys"] | None = None,
    value_bias: bool = True,
) -> Float[Tensor, "batch heads width"]:
    """What each head gathers: `1/N sum_i relu(x~_0^T W_m x~_i) x~_i`.

    The layer is linear in these, `f = sum_m <v_m, features[m]>`. They do not depend on the order of
    the keys, nor on how often the whole set is repeated. Time is
    `O(batch * heads * (dim^2 + keys * dim))`.

    Args:
        query: one for each set. Half precision is computed in float32 and rounded at the end.
        key: the set. All that is seen of a masked key is its place: it may hold anything.
        qk_weight: `W_m`, of size `dim + 1`: rows for the query, columns for the key.
        attn_mask: True = visible; the sum and N are over the visible keys. A set without any
            visible key has features 0.
        value_bias: gather `x~_i`, with the 1, as the paper does if memory serves; else `x_i`.

    Returns:
        `width` is `dim + 1`, or `dim` without `value_bias`.

    Raises:
        ValueError: the shapes, dtypes or devices do not fit each other.
    """
    _check_sets(query, key, attn_mask)
    _check_weight(query, qk_weight)
    others, scores = _scores(query, key, qk_weight, attn_mask)
    gathered = scores @ (others if value_bias else others[..., :-1])
    return gathered.to(query.dtype)


@full_precision
def frozen_attention_kernel(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch keys dim"],
    other_query: Float[Tensor, "other dim"],
    other_key: Float[Tensor, "other other_keys dim"],
    value_bias: bool = True,
    qk_std: float = 0.5,
) -> Float[Tensor, "batch other"]:
    """The limit of `1/M sum_m <features_m(X), features_m(X')>` for infinitely many heads.

        K(X, X') = 1/(N N') sum_ij <x~_i, x~'_j> k(x~_0 (x) x~_i, x~'_0 (x) x~'_j)
        k(a, b)  = qk_std^2 |a| |b| (sin t + (pi - t) cos t) / (2 pi),   t the angle of a and b

    k is the arc-cosine kernel of order 1, and `<x (x) y, x' (x) y'> = <x, x'> <y, y'>`. With it the
    layer can be fitted without drawing any head: `K(X, X_train) (K_train + ridge n)^-1 y`. The
    formula is for query-key matrices of mean zero; for `qk_mean="identity"` we know none. (Derived
    here from the definition of the layer, and checked against sampled heads.)

    Args:
        query, key, other_query, other_key: sets, all their keys visible. `other` may be of another
            number of sets and of keys. Half precision is computed in float32.
        value_bias: as in `frozen_attention_features`; it changes `<x~_i, x~'_j>` to `<x_i, x'_j>`.
        qk_std: the standard deviation of the entries of the query-key matrices.

    Raises:
        ValueError: the shapes, dtypes or devices do not fit each other, a set has no key, or
            `qk_std` is not positive.
    """
    _check_sets(query, key, None)
    _check_sets(other_query, other_key, None)
    if query.shape[1] != other_query.shape[1] or query.dtype != other_query.dtype:
        raise ValueError(
            f"other_query: expected {query.shape[1]} numbers of {query.dtype} as in query, got "
            f"{other_query.shape[1]} of {other_query.dtype}."
        )
    if key.shape[1] == 0 or other_key.shape[1] == 0:
        raise ValueError("key, other_key: expected at least one key in each set, got none.")
    if not 0 < qk_std < math.inf:
        raise ValueError(f"qk_std: expected a positive number, got {qk_std}.")
    first, second, others, others_second = (
        _homogeneous(_wide(one)) for one in (query, other_query, key, other_key)
    )
    values = torch.einsum("anc,bmc->abnm", others, others_second)
    inner = torch.einsum("ac,bc->ab", first, second)[..., None, None] * values
    length = first.norm(dim=-1)[:, None] * others.norm(dim=-1)
    other_length = second.norm(dim=-1)[:, None] * others_second.norm(dim=-1)
    lengths = length[:, None, :, None] * other_length[None, :, None, :]
    # The 1 in each vector keeps the lengths away from 0.
    cosine = (inner / lengths).clamp(-1.0, 1.0)
    sine = (1.0 - cosine.square()).clamp_min(0.0).sqrt()
    # atan2 keeps the digits of small angles that acos loses.
    angle = torch.atan2(sine, cosine)
    arc = qk_std**2 * lengths * (sine + (math.pi - angle) * cosine) / (2.0 * math.pi)
    if not value_bias:
        values = values - 1.0
    kernel: Tensor = (arc * values).mean((-2, -1)).to(query.dtype)
    return kernel


class FrozenAttention(nn.Module):
    """One attention layer with frozen random query-key matrices, fitted by ridge regression.

        layer = FrozenAttention(8, num_heads=128, seed=0)
        layer.fit(query, key, targets, ridge=1e-4)     # [sets, 8], [sets, keys, 8], [sets]
        predictions = layer(query, key)                # [sets]

    The module's docstring has the formula. Inputs of bounded length are assumed, such as of length
    1; the layer does not normalise them. It learns functions that ignore the order of the keys, and
    no others. It is no operator on (query, key, value): every head has a value vector of its own,
    and the output is one number.

    Attributes:
        qk_weight: `W_m` `[heads, dim + 1, dim + 1]`, a buffer.
        value: `v_m` `[heads, dim + 1]` (`[heads, dim]` without `value_bias`), the only parameter. 0
            until it is fitted; gradient descent can train it, too, since the output is linear
            in it.

    Args:
        dim: numbers in the query and in each key.
        num_heads: M. The paper's simulations have 1000.
        qk_mean: `"zero"`, or `"identity"` for the biased variant.
        qk_std: the standard deviation of the entries of `W_m`. 0 leaves the mean only: with
            `"identity"` every head is then `1/N sum_i relu(<x_0, x_i>) x~_i`.
        value_bias: whether values act on `x~_i` or on `x_i`.
        seed: where `W_m` comes from; torch's own generator is not touched.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1, an unknown mean or a negative `qk_std`.
    """

    qk_weight: Float[Tensor, "heads homogeneous homogeneous"]

    def __init__(
        self,
        dim: int,
        num_heads: int = 1000,
        *,
        qk_mean: Literal["zero", "identity"] = "zero",
        qk_std: float = 0.5,
        value_bias: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1:
            raise ValueError(
                f"dim, num_heads: expected at least 1 of each, got {dim} and {num_heads}."
            )
        if qk_mean not in ("zero", "identity"):
            raise ValueError(f'qk_mean: expected "zero" or "identity", got {qk_mean!r}.')
        if not 0 <= qk_std < math.inf:
            raise ValueError(f"qk_std: expected a number of at least 0, got {qk_std}.")
        self.dim, self.num_heads, self.value_bias = dim, num_heads, value_bias
        self.qk_mean, self.qk_std = qk_mean, qk_std
        generator = torch.Generator().manual_seed(seed)
        size = dim + 1
        weight = torch.randn(num_heads, size, size, dtype=torch.float64, generator=generator)
        weight *= qk_std
        if qk_mean == "identity":
            weight[:, :dim, :dim] += torch.eye(dim, dtype=torch.float64)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("qk_weight", weight.to(device=device, dtype=dtype))
        width = size if value_bias else dim
        self.value = nn.Parameter(torch.zeros(num_heads, width, device=device, dtype=dtype))

    def features(
        self,
        query: Float[Tensor, "batch dim"],
        key: Float[Tensor, "batch keys dim"],
        attn_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch heads width"]:
        """`frozen_attention_features` of these heads."""
        return frozen_attention_features(query, key, self.qk_weight, attn_mask, self.value_bias)

    def forward(
        self,
        query: Float[Tensor, "batch dim"],
        key: Float[Tensor, "batch keys dim"],
        attn_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch"]:
        """`f(query, keys)`, one number for each set. Arguments are those of the features.

        Raises:
            ValueError: the shapes, dtypes or devices do not fit each other or the layer.
        """
        _check_sets(query, key, attn_mask)
        _check_weight(query, self.qk_weight)
        with torch.autocast(query.device.type, enabled=False):
            others, scores = _scores(query, key, self.qk_weight, attn_mask)
            values = (others if self.value_bias else others[..., :-1]) @ _wide(self.value).T
            found = torch.einsum("bmn,bnm->b", scores, values)
        return found.to(query.dtype)

    @torch.no_grad()
    def fit(
        self,
        query: Float[Tensor, "batch dim"],
        key: Float[Tensor, "batch keys dim"],
        targets: Float[Tensor, "batch"],
        attn_mask: Bool[Tensor, "batch keys"] | None = None,
        *,
        ridge: float = 1e-4,
    ) -> "FrozenAttention":
        """Set `value` to the ridge solution, and return the layer.

        It minimises `mean((targets - f)^2) + ridge |value|^2`, in float64 whatever the dtype of the
        layer. The features, `sets * heads * (dim + 1)` numbers of 8 bytes, are held at once.
        Choose `ridge` on sets that are held out. How strong one is depends on the size of the
        features, whose sum of squares over the heads grows with `num_heads`. 0 gives the solution
        of least length; its error peaks where there are about as many sets as features.

        Raises:
            ValueError: as `forward` and `ridge_solution`.
        """
        _check_sets(query, key, attn_mask)
        _check_weight(query, self.qk_weight)
        if targets.shape != query.shape[:1]:
            raise ValueError(
                f"targets: expected one number for each set, {list(query.shape[:1])}, got "
                f"{list(targets.shape)}."
            )
        features = frozen_attention_features(
            query.double(), key.double(), self.qk_weight.double(), attn_mask, self.value_bias
        )
        (found,) = ridge_solution(features.flatten(1), targets[:, None], [ridge])
        self.value.copy_(found.view(self.value.shape))
        return self

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return (
            f"{self.dim}, num_heads={self.num_heads}, qk_mean={self.qk_mean!r}, "
            f"qk_std={self.qk_std}, value_bias={self.value_bias}"
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _homogeneous(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.new_ones(*tensor.shape[:-1], 1)], -1)


def _scores(
    query: Tensor, key: Tensor, qk_weight: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The keys with their 1, and `relu(score) / N` [batch, heads, keys]."""
    first, others = _homogeneous(_wide(query)), _homogeneous(_wide(key))
    count: Tensor | int = max(1, key.shape[1])
    if attn_mask is not None:
        others = others.masked_fill(~attn_mask[..., None], 0.0)  # score and value: both are 0
        count = attn_mask.sum(-1).clamp_min(1)[:, None, None]
    projected = torch.einsum("bi,mij->bmj", first, _wide(qk_weight))
    return others, (projected @ others.transpose(-1, -2)).relu() / count


def _check_sets(query: Tensor, key: Tensor, attn_mask: Tensor | None) -> None:
    if (
        query.dim() != 2
        or key.dim() != 3
        or query.shape[0] != key.shape[0]
        or query.shape[1] != key.shape[2]
    ):
        raise ValueError(
            "query, key: expected one query for each set of keys, [batch, dim] and "
            f"[batch, keys, dim], got {list(query.shape)} and {list(key.shape)}."
        )
    if not query.is_floating_point() or query.dtype != key.dtype or query.device != key.device:
        raise ValueError(
            "query, key: expected the same floating dtype and device, got "
            f"{query.dtype} on {query.device} and {key.dtype} on {key.device}."
        )
    if attn_mask is not None and (
        attn_mask.dtype != torch.bool
        or attn_mask.shape != key.shape[:2]
        or attn_mask.device != key.device
    ):
        raise ValueError(
            f"attn_mask: expected a boolean mask [batch, keys] = {list(key.shape[:2])} on "
            f"{key.device}, True = visible, got {list(attn_mask.shape)} of {attn_mask.dtype} on "
            f"{attn_mask.device}."
        )


def _check_weight(query: Tensor, qk_weight: Tensor) -> None:
    size = query.shape[1] + 1
    if qk_weight.dim() != 3 or qk_weight.shape[1:] != (size, size):
        raise ValueError(
            f"query: expected to fit the query-key matrices {list(qk_weight.shape)} = "
            f"[heads, dim + 1, dim + 1], got a query of {size - 1} numbers."
        )
    if query.dtype != qk_weight.dtype or query.device != qk_weight.device:
        raise ValueError(
            f"query: expected {qk_weight.dtype} on {qk_weight.device} as the query-key matrices, "
            f"got {query.dtype} on {query.device}. Convert one of them with .to()."
        )
