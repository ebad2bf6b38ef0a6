"""Attention with another normaliser in place of softmax; doubly stochastic ones above all.

A map is doubly stochastic if its rows and its columns sum to one: no token is flooded with
attention and none is ignored, and the mean of the output over the tokens is the mean of the values.
"Quantum Doubly Stochastic Transformers" (QDSFormer, 2504.16275) compares four ways to such a map in
small vision transformers. The normalisers are in `attending.nn.normalizers`,
`attending.nn.birkhoff` and `attending.nn.quantum_circuit`; here is the attention around them.
"""

from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attending.core.check import check_arguments
from attending.core.kernels import map_rows, weigh
from attending.core.masks import hiding_bias
from attending.core.state import attend
from attending.core.statistics._call import prepare
from attending.core.statistics.bounds import centred_squares
from attending.nn._head_counts import check_head_counts
from attending.nn.birkhoff import birkhoff_projection, orthostochastic
from attending.nn.normalizers import Normalizer, Statistic, check_norm_softmax, spread_divisor
from attending.nn.sinkhorn_attention import paired_mask, refuse_causal, sinkhorn_attention

NormalizerName = Literal["sinkhorn", "orthostochastic", "birkhoff"]

_ROUNDING = 8.0  # in units of the last place of the largest score


def doubly_stochastic_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    normalizer: NormalizerName | Normalizer = "sinkhorn",
    attn_mask: Tensor | None = None,
    query_mask: Bool[Tensor, "#batch queries"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """`normalizer(scale * query key^T + attn_mask) value`.

        doubly_stochastic_attention(query, key, value)                          # Sinkhorn
        doubly_stochastic_attention(query, key, value, normalizer="birkhoff")
        doubly_stochastic_attention(query, key, value, normalizer=partial(sinkhorn, iterations=3))
        doubly_stochastic_attention(query, key, value, normalizer=CircuitMap(num_tokens=8))

    | normalizer | tokens | masks | cost of a map |
    | --- | --- | --- | --- |
    | `"sinkhorn"` | any; cross-attention too | padding, symmetric patterns | 21 passes |
    | `"orthostochastic"` | queries = keys, no more than head_dim | padding | a QR |
    | `"birkhoff"` | queries = keys, some dozens | padding | tens of sorts and solves |
    | `CircuitMap(n)` | queries = keys = n = 2^k, up to 16 | none | `n^4` and more |

    Computed in float32 where the input is in half precision. All but `"sinkhorn"` build and
    keep the map.

    Args:
        query, key, value, scale, enable_gqa: as in `scaled_dot_product_attention`.
        normalizer: a name, for the default options, or a function `(scores, visible) -> map`. That
            of `"sinkhorn"` is `attending.nn.sinkhorn_attention`.
        attn_mask: a float mask is added to the scores; what it hides with -inf, or a boolean one
            with False, must be what the normaliser can leave out. See
            `attending.nn.sinkhorn_attention.paired_mask` for what padding means.
        query_mask: which queries take part, for cross-attention; None infers it.
        is_causal: must be False; here for the sake of an error that says why.

    Returns:
        The output, in query's dtype; 0 for queries that do not take part.

    Raises:
        ValueError: for arguments that do not fit together, and for what the normaliser cannot do:
            causal masks, other masks, numbers of tokens.
    """
    if normalizer == "sinkhorn":
        return sinkhorn_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            query_mask=query_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    function = _normalizer(normalizer)
    refuse_causal(is_causal)
    arguments = check_arguments(query, key, value, attn_mask, False, scale, enable_gqa)
    if key.shape[2] == 0 or query.numel() == 0 or value.shape[-1] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    dtype = torch.promote_types(query.dtype, torch.float32)
    pairs = paired_mask(arguments.bias, query_mask, query, key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1).to(dtype)
        scores = query.to(dtype) @ keys.mT * arguments.scale
        attention_map = function(
            scores if pairs.bias is None else scores + pairs.bias, pairs.visible
        )
        return weigh(attention_map, value).to(query.dtype)


def norm_softmax_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    statistic: Statistic = "variance",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """NormSoftmax attention: the temperature of each query follows the spread of its scores.

        output[i] = softmax_j(query[i] . key[j] / min(1 / scale, spread_j(query[i] . key[j]))) value

    See `attending.nn.normalizers.norm_softmax`. Rows sum to one, columns do not, so it may be
    causal. The temperature goes to the query, before a fused kernel. The variance of the scores of
    a query is `query^T C query` with the covariance C of the keys (those before a block of rows,
    under `is_causal`); where a mask gives each query its own keys, the scores are computed for it,
    in blocks of rows.

    Args:
        query, key, value, is_causal, enable_gqa: as in `scaled_dot_product_attention`.
        statistic: "variance" or "std", of the scores without a scale.
        attn_mask: one that only hides keys, boolean or of 0 and -inf.
        scale: one over the largest temperature, positive; `dim ** -0.5` by default.

    Returns:
        The output, in query's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: for arguments that do not fit together, or a mask that adds to the scores.
    """
    arguments = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if not arguments.scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}.")
    cap = 1.0 / arguments.scale
    check_norm_softmax(cap, statistic)
    bias = hiding_bias(arguments.bias)
    if key.shape[2] == 0 or query.numel() == 0 or value.shape[-1] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide = [tensor.to(dtype) for tensor in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        if not is_causal and (bias is None or bias.shape[1:3] == (1, 1)):
            squares, count, rounding = _spread_over_keys(wide[0], wide[1], bias)
        elif bias is None:
            squares, count, rounding = _spread_over_earlier_keys(wide[0], wide[1])
        else:
            squares, count, rounding = (
                torch.cat(parts, 2)
                for parts in zip(
                    *map_rows(_spread_of_rows, wide[0], wide[1], bias, is_causal, 1.0), strict=True
                )
            )
        divisor = spread_divisor(squares, count, cap, statistic)
        # Of a row that is constant but for rounding the map is even: its query becomes 0.
        cooled = wide[0] / divisor.masked_fill(squares <= count * rounding.square(), torch.inf)
        state = attend(cooled, wide[1], wide[2], bias=bias, is_causal=is_causal, scale=1.0)
        return state.output.to(query.dtype)


def _spread_over_keys(
    query: Tensor, key: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared deviations of the scores of each query, summed, by way of the keys' covariance.

    Returns:
        The sums `[batch, heads, queries, 1]`, over how many keys, and how exact a score is.
    """
    if bias is None:
        count = torch.tensor(float(key.shape[2]), dtype=key.dtype, device=key.device)
        centred = key - key.mean(2, keepdim=True)
    else:
        visible = (bias == 0).transpose(-1, -2)  # [batch, 1, keys, 1]
        count = visible.sum(2, keepdim=True).to(key.dtype)
        sums = key.masked_fill(~visible, 0.0).sum(2, keepdim=True)
        centred = (key - sums / count.clamp_min(1.0)).masked_fill(~visible, 0.0)
    groups = query.shape[1] // key.shape[1]
    covariance = (centred.mT @ centred).repeat_interleave(groups, 1)
    squares = ((query @ covariance) * query).sum(-1, keepdim=True).clamp_min(0.0)
    return squares, count, _rounding(query, key)


def _spread_over_earlier_keys(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, where query i sees keys 0..i."""
    call = prepare(query, key, None, True, 1.0, True)
    squares = centred_squares(call)[..., None].to(query.dtype)
    seen = torch.arange(1, query.shape[2] + 1, dtype=query.dtype, device=query.device)
    return squares, seen.clamp_max(key.shape[2])[:, None], _rounding(query, key)


@torch.no_grad()
def _rounding(query: Tensor, key: Tensor) -> Tensor:
    """How exact a score is: a bound from the lengths of the query and of the longest key."""
    longest = key.norm(dim=-1, keepdim=True).amax(2, keepdim=True)
    rounding = _ROUNDING * torch.finfo(key.dtype).eps * query.norm(dim=-1, keepdim=True)
    bound: Tensor = rounding * longest.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return bound


def _spread_of_rows(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from a block of rows of the scores."""
    hidden = scores == -torch.inf
    scores = scores.masked_fill(hidden, 0.0)
    count = (~hidden).sum(-1, keepdim=True).to(scores.dtype)
    mean = scores.sum(-1, keepdim=True) / count.clamp_min(1.0)
    squares = (scores - mean).masked_fill(hidden, 0.0).square().sum(-1, keepdim=True)
    largest = scores.detach().abs().amax(-1, keepdim=True)
    return squares, count, _ROUNDING * torch.finfo(scores.dtype).eps * largest


class DoublyStochasticAttention(nn.Module):
    """Multi-head self-attention with a doubly stochastic map, `[batch, tokens, embed_dim]`.

    For encoders; it has no causal form. Projections as in `attending.nn.self_attention`.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: heads, each `embed_dim // num_heads` wide.
        normalizer: as in `doubly_stochastic_attention`; a module such as `CircuitMap` becomes part
            of this one.
        bias: biases in the four projections.
        scale: of the scores; `head_dim ** -0.5` by default.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not divide or an unknown normaliser.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        normalizer: NormalizerName | Normalizer = "sinkhorn",
        bias: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_head_counts(embed_dim, num_heads)
        if normalizer != "sinkhorn":
            _normalizer(normalizer)
        self.num_heads, self.scale = num_heads, scale
        self.normalizer = normalizer
        linear = partial(nn.Linear, embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.q_proj, self.k_proj, self.v_proj = linear(), linear(), linear()
        self.out_proj = linear()

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        attn_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend.

        Args:
            hidden: the input, after the block's norm.
            attn_mask: as in `doubly_stochastic_attention` (True = visible); for padding
                `[batch, 1, 1, tokens]`.
        """
        query, key, value = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = doubly_stochastic_attention(
            query,
            key,
            value,
            normalizer=self.normalizer,
            attn_mask=attn_mask,
            scale=self.scale,
        )
        return self.out_proj(output.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _normalizer(normalizer: object) -> Normalizer:
    if normalizer == "orthostochastic":
        return orthostochastic
    if normalizer == "birkhoff":
        return birkhoff_projection
    if callable(normalizer):
        return normalizer
    raise ValueError(
        f"normalizer: expected one of {get_args(NormalizerName)}, or a function from (scores, "
        f"visible) to a map, got {normalizer!r}."
    )
