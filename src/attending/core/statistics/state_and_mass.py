"""Attention and what each key receives, from one pass over the map."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.precision import full_precision
from attending.core.state import AttentionState, attend
from attending.core.statistics._call import Call
from attending.core.statistics._exchange import check_weights
from attending.core.statistics._sweep import can_sweep
from attending.core.statistics.columns import Columns, column_mass
from attending.core.statistics.rows import Key, Query

# Rows of a block. Measured at 4k keys: half or twice as many cost 3% more, four times 12%.
ROWS = 128
LEAST_PROBABILITY = 1e-30  # of the key by whose probability a row's normaliser is known


class StateAndMass(NamedTuple):
    """What one pass gives.

    Attributes:
        state: as `attention_state` has it.
        mass: what each key receives, as `column_mass` has it.
    """

    state: AttentionState
    mass: Columns


@full_precision
def state_and_column_mass(
    query: Query,
    key: Key,
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    query_weights: Float[Tensor, "*weight_batch queries"] | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> StateAndMass:
    """`attention_state` and `column_mass` on the same arguments, at less than the price of both.

    On a CPU and without gradients, the softmax of a block of rows is in the cache once, is
    multiplied with the values, and summed by columns: together about 1.3 times the price of one
    `scaled_dot_product_attention`. Elsewhere one after the other. The map is never stored.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in `attention_state`.
        query_weights: as in `column_mass`.
    """
    checked = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    dtype = torch.promote_types(query.dtype, torch.float32)
    call = Call(
        query.to(dtype),
        key.to(dtype),
        checked.bias,
        checked.bias_is_mask,
        is_causal,
        checked.scale,
    )
    weights = check_weights(query_weights, call)
    if not can_sweep(call, value, query_weights) or query.numel() == 0 or key.shape[2] == 0:
        state = attend(
            query, key, value, bias=checked.bias, is_causal=is_causal, scale=checked.scale
        )
        mass = column_mass(
            query, key, query_weights, attn_mask, is_causal, scale, enable_gqa, state.lse
        )
        return StateAndMass(state, mass)
    batch, heads, queries, _ = query.shape
    output = call.query.new_empty(batch, heads, queries, value.shape[-1])
    lse = call.query.new_empty(batch, heads, queries)
    mass = call.query.new_zeros(batch, heads, key.shape[2])
    rows = min(ROWS, queries)
    buffers = call.query.new_empty(2, rows * key.shape[2])
    above = torch.ones(rows, rows, dtype=torch.bool).triu(1) if is_causal else None
    bias = checked.bias
    if bias is not None:
        bias = bias.expand(*bias.shape[:3], key.shape[2])
    for item in range(batch):
        for kv in range(key.shape[1]):
            own_key = call.key[item, kv].contiguous()
            own_value = value[item, kv].to(dtype).contiguous()
            for head in range(kv * call.groups, (kv + 1) * call.groups):
                _sweep_head(
                    (call.query[item, head] * call.scale).contiguous(),
                    own_key,
                    own_value,
                    _own(bias, item, head),
                    None if weights is None else weights[item, head],
                    above,
                    buffers,
                    output[item, head],
                    lse[item, head],
                    mass[item, head],
                )
    return StateAndMass(AttentionState(output.to(query.dtype), lse), mass)


def _own(bias: Tensor | None, item: int, head: int) -> Tensor | None:
    if bias is None:
        return None
    return bias[min(item, bias.shape[0] - 1), min(head, bias.shape[1] - 1)]


def _sweep_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    above: Tensor | None,
    buffers: Tensor,
    output: Tensor,
    lse: Tensor,
    mass: Tensor,
) -> None:
    """Fill in output, lse and mass of one head; [tokens, dim], the query scaled."""
    queries, keys = len(query), len(key)
    weights = query.new_ones(queries) if weights is None else weights
    # A row's lse is the score of any key less the log of its probability: of the token itself.
    offset = 0 if above is not None else keys - queries
    place = (torch.arange(queries) + offset).clamp(0, keys - 1)[:, None]
    score, probability = query.new_empty(2, queries, 1)
    step = ROWS
    for start in range(0, queries, step):
        stop = min(queries, start + step)
        seen = min(keys, stop) if above is not None else keys
        shape = (stop - start, seen)
        scores, p = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
        torch.mm(query[start:stop], key[:seen].T, out=scores)
        ask = weights[start:stop]
        empty = None
        if bias is not None:
            own = bias[start:stop, :seen] if len(bias) > 1 else bias[:, :seen]
            scores += own
            empty = (own == -math.inf).all(-1).expand(stop - start)
            if bool(empty.any()):
                scores.masked_fill_(empty[:, None], 0.0)
                ask = ask.masked_fill(empty, 0.0)
            else:
                empty = None
        if above is not None and start < seen:
            scores[:, start:].masked_fill_(above[: stop - start, : seen - start], -math.inf)
        torch.softmax(scores, -1, out=p)
        torch.mm(p, value[:seen], out=output[start:stop])
        mass[:seen] += ask @ p
        torch.gather(p, 1, place[start:stop], out=probability[start:stop])
        torch.gather(scores, 1, place[start:stop], out=score[start:stop])
        if empty is not None:
            output[start:stop][empty] = 0.0
            score[start:stop][empty] = -math.inf
            probability[start:stop][empty] = 1.0
    torch.sub(score[:, 0], probability[:, 0].log_(), out=lse)
    lost = (probability[:, 0] < math.log(LEAST_PROBABILITY)).nonzero().squeeze(-1)
    for rows in lost.split(ROWS):  # that do not look at themselves at all
        scores = query[rows] @ key.T
        if bias is not None:
            scores += bias.expand(queries, keys)[rows]
        if above is not None:
            scores.masked_fill_(torch.arange(keys) > rows[:, None], -math.inf)
        lse[rows] = scores.logsumexp(-1)
