"""Sinkhorn attention without the map: memory linear in the tokens, on fused softmax kernels.

Each half-step of Sinkhorn is the normaliser of a softmax attention with a bias per key, so it is
the lse of a state (`attending.core.state`): for the rows queries ask and keys answer with the bias
g; for the columns **the roles are exchanged**, keys ask and queries answer with the bias f.

    f[i] = -LSE_j(s[i, j] + g[j])              attention of queries over keys, its lse
    g[j] = log c - LSE_i(s[i, j] + f[i])       attention of keys over queries, its lse
    output[i] = sum_j exp(s[i, j] + f[i] + g[j]) value[j]
              = exp(f[i] + LSE_j(s[i, j] + g[j])) * softmax_j(s[i, j] + g[j]) value

The factor in front is 1 after an odd number of half-steps: then the output is one ordinary
attention with the bias g. K half-steps cost K passes of such a kernel, forward and backward.

Small maps are faster to build than to avoid: up to `DENSE_BYTES` in all they are built.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.masks import visible_entries
from attending.core.state import attend
from attending.nn.normalizers import (
    CAUSAL_REASON,
    Gradient,
    check_sinkhorn,
    check_support,
    column_sums,
    sinkhorn,
)

DENSE_BYTES = 2**23  # of scores; the full gradient keeps this once per half-step


def sinkhorn_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    iterations: int = 21,
    temperature: float = 1.0,
    gradient: Gradient = "full",
    attn_mask: Tensor | None = None,
    query_mask: Bool[Tensor, "#batch queries"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention whose map is Sinkhorn's, `sinkhorn(scale * query key^T) value`, in linear memory.

    The same numbers as with `attending.nn.normalizers.sinkhorn`, where the options are explained
    and the source is named; up to rounding, of the gradient too. 1 half-step is softmax attention.
    A mean over the queries of the output is the mean of the values, once columns sum to 1.

    Half precision is computed in float32, since an error in a potential is an error of a whole row
    or column. With `gradient="truncated"`, and where no gradient is asked for, all half-steps but
    the last run on the plain kernels; the full gradient goes back through the lse of each.

    Args:
        query, key, value, scale, enable_gqa: as in `scaled_dot_product_attention`.
        iterations, temperature, gradient: half-steps (odd: rows are exact), divisor of the scores,
            and "full" or "truncated", as in `sinkhorn`.
        attn_mask: padding, or a symmetric pattern in which each token sees itself, boolean or as
            -inf; other entries of a float mask are added to the scores. See `paired_mask` for what
            padding means.
        query_mask: which queries take part; None lets `paired_mask` infer it.
        is_causal: must be False; here for the sake of an error that says why.

    Returns:
        The output, in query's dtype; 0 for queries that do not take part.

    Raises:
        ValueError: for arguments that do not fit together, or a mask without a map whose rows and
            columns sum to one, such as a causal one.
    """
    check_sinkhorn(iterations, temperature, gradient)
    refuse_causal(is_causal)
    arguments = check_arguments(query, key, value, attn_mask, False, scale, enable_gqa)
    if key.shape[2] == 0 or query.numel() == 0 or value.shape[-1] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    if dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    pairs = paired_mask(arguments.bias, query_mask, query, key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        size = query.shape[:3].numel() * key.shape[2] * query.element_size()
        if size <= DENSE_BYTES:
            scores = query @ key.mT * arguments.scale
            attention_map = sinkhorn(
                scores if pairs.bias is None else scores + pairs.bias,
                pairs.visible,
                iterations=iterations,
                temperature=temperature,
                gradient=gradient,
            )
            return (attention_map @ value).to(dtype)
        problem = _Problem(query, key, value, pairs, arguments.scale, temperature)
        return problem.solve(iterations, gradient == "full").to(dtype)


def refuse_causal(is_causal: bool) -> None:
    """Raise if `is_causal`, with the reason."""
    if is_causal:
        raise ValueError(f"is_causal: expected False: {CAUSAL_REASON}.")


class Pairs(NamedTuple):
    """Which queries and keys take part in a map, and what is added to their scores.

    Attributes:
        bias: broadcasts to `[batch, heads, queries, keys]`; finite. None where nothing is added.
        rows: which queries take part, `[#batch, #heads, queries]`. None where all do.
        columns: which keys take part, likewise.
        pattern: which pairs do, where that is not all of those queries with all of those keys.
    """

    bias: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    pattern: Tensor | None = None

    @property
    def visible(self) -> Bool[Tensor, "#batch #heads queries keys"] | None:
        """All of it as one mask, as large as the map; None where all pairs take part."""
        if self.pattern is not None:
            return self.pattern
        if self.rows is None or self.columns is None:
            return None
        return self.rows[..., :, None] & self.columns[..., None, :]


def paired_mask(bias: Tensor | None, query_mask: Tensor | None, query: Tensor, keys: int) -> Pairs:
    """Which pairs take part, from a mask; without anything as large as a map if it hides keys only.

    Where there are as many keys as queries, they are taken to be the same tokens: one whose key is
    hidden from all queries is padding, and as a query it takes no part either (its output is 0).
    Otherwise the result for the other tokens would depend on the padding. For cross-attention
    between sequences that happen to be equally long say which queries take part, in `query_mask`.

    Args:
        bias: the float mask of 4 dimensions that `check_arguments` returns, or None.
        query_mask: booleans `[batch, queries]`, True = takes part; None infers it.
        query: `[batch, heads, queries, dim]`.
        keys: how many there are.

    Raises:
        ValueError: for another `query_mask`.
    """
    batch, _, queries, _ = query.shape
    _check_query_mask(query_mask, batch, queries)
    if bias is None and query_mask is None:
        return Pairs()
    same = query_mask is None and queries == keys
    asked = query.new_ones(1, 1, queries, dtype=torch.bool)
    if query_mask is not None:
        asked = query_mask[:, None, :]
    if bias is None:
        columns, pattern = asked.new_ones(1, 1, keys), None
    else:
        visible = visible_entries(bias)
        added = bias.masked_fill(~visible, 0.0)
        bias = added if added.requires_grad or bool((added != 0).any()) else None
        visible = visible.expand(*visible.shape[:3], keys)
        columns = visible.any(-2)
        pattern = None if visible.shape[2] == 1 else visible
    rows = columns & asked if same else columns.any(-1, keepdim=True) & asked
    if pattern is not None:
        pattern = pattern & rows[..., :, None]
        rows, columns = pattern.any(-1), pattern.any(-2)
        if bool((pattern == (rows[..., :, None] & columns[..., None, :])).all()):
            pattern = None
    columns = columns & rows.any(-1, keepdim=True)
    if bool(rows.all()) and bool(columns.all()) and pattern is None:
        return Pairs(bias)
    return Pairs(bias, rows, columns, pattern)


def _check_query_mask(query_mask: object, batch: int, queries: int) -> None:
    if query_mask is None:
        return
    got = type(query_mask).__name__
    if isinstance(query_mask, Tensor):
        fits = tuple(query_mask.shape) in ((batch, queries), (1, queries))
        if fits and query_mask.dtype == torch.bool:
            return
        got = f"{list(query_mask.shape)} of {query_mask.dtype}"
    raise ValueError(
        f"query_mask: expected booleans [batch, queries] = {[batch, queries]}, True where a query "
        f"takes part, got {got}."
    )


class _Problem:
    """Scores `(scale * query . key + bias) / temperature`, and which pairs of them take part."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pairs: Pairs,
        scale: float,
        temperature: float,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.scale = scale / temperature
        shape, keys = query.shape[:3], key.shape[2]
        bias = None if pairs.bias is None else pairs.bias / temperature
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None
        log_sum = torch.tensor(shape[2] / keys, dtype=torch.float64).log()
        if pairs.rows is not None and pairs.columns is not None:
            log_sum = column_sums(pairs.rows, pairs.columns).log()[..., None]
            self.rows = pairs.rows.expand(shape)
            self.columns = pairs.columns.expand(*shape[:2], keys)
        if pairs.pattern is not None:
            check_support(pairs.pattern)
            hidden = query.new_zeros(pairs.pattern.shape).masked_fill(~pairs.pattern, -torch.inf)
            bias = hidden if bias is None else bias + hidden
        self.log_column_sum = log_sum.to(query)
        self.bias, self.turned = bias, bias
        if bias is not None and bias.shape[2:] != (1, 1):
            full = bias.expand(*bias.shape[:2], shape[2], keys)
            self.turned = full.transpose(-1, -2).contiguous()

    def solve(self, iterations: int, full: bool) -> Tensor:
        asked = torch.is_grad_enabled()
        g = _hide(self.query.new_zeros(*self.key.shape[:3]), self.columns)
        f = torch.zeros_like(self.query[..., 0])
        last_rows = iterations % 2 == 1
        for step in range(iterations - 1 if last_rows else iterations):
            with torch.set_grad_enabled(asked and (full or step == iterations - 1)):
                if step % 2 == 0:
                    f = _hide(-self._row_lse(g), self.rows)
                else:
                    g = _hide(self.log_column_sum - self._column_lse(f), self.columns)
        state = attend(
            self.query, self.key, self.value, bias=self.bias, key_bias=g, scale=self.scale
        )
        output = state.output
        if not last_rows:
            lse = state.lse if self.rows is None else state.lse.masked_fill(~self.rows, 0.0)
            weight = f if self.rows is None else f.masked_fill(~self.rows, 0.0)
            output = output * torch.exp(weight + lse)[..., None]
        return output if self.rows is None else output.masked_fill(~self.rows[..., None], 0.0)

    def _row_lse(self, g: Tensor) -> Tensor:
        query, key = self.query, self.key
        # The kernels want values; of what they make of them nothing is used.
        return attend(query, key, key, bias=self.bias, key_bias=g, scale=self.scale).lse

    def _column_lse(self, f: Tensor) -> Tensor:
        query, key = self.query, self.key
        return attend(key, query, query, bias=self.turned, key_bias=f, scale=self.scale).lse


def _hide(potential: Tensor, visible: Tensor | None) -> Tensor:
    """-inf where a token takes no part, which hides it from the next half-step."""
    return potential if visible is None else potential.masked_fill(~visible, -torch.inf)
