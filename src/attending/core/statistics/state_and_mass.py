"""Attention and what each key receives, from one pass over the map."""

import math
from typing import Any, NamedTuple

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
BLOCK = 2**19  # entries of the map that are there at a time, as many as stay in the cache
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
    bias = checked.bias
    if bias is not None:
        bias = bias.expand(*bias.shape[:3], key.shape[2])
    rows = min(ROWS, queries)
    together = min(heads, max(1, BLOCK // (rows * key.shape[2])))  # heads, where maps are small
    buffers = call.query.new_empty(2, together * rows * key.shape[2])
    for item in range(batch):
        for start in range(0, heads, together):
            some = slice(start, min(heads, start + together))
            kv: Any = some
            if call.groups > 1:
                kv = torch.arange(heads, device=query.device)[some] // call.groups
            _sweep_heads(
                (call.query[item, some] * call.scale).contiguous(),
                call.key[item, kv].contiguous(),
                value[item, kv].to(dtype).contiguous(),
                None if bias is None else _own(bias, item, some),
                None if weights is None else weights[item, some],
                is_causal,
                buffers,
                output[item, some],
                lse[item, some],
                mass[item, some],
            )
    return StateAndMass(AttentionState(output.to(query.dtype), lse), mass)


def _own(bias: Tensor, item: int, heads: slice) -> Tensor:
    """The bias of some heads, [1 or heads, 1 or queries, keys]."""
    own = bias[min(item, len(bias) - 1)]
    return own if len(own) == 1 else own[heads]


def _sweep_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    is_causal: bool,
    buffers: Tensor,
    output: Tensor,
    lse: Tensor,
    mass: Tensor,
) -> None:
    """Fill in output, lse and mass of some heads; [heads, tokens, dim], the query scaled."""
    heads, queries, _ = query.shape
    keys = key.shape[1]
    weights = query.new_ones(heads, queries) if weights is None else weights
    rows = min(ROWS, queries)
    above = torch.ones(rows, rows, dtype=torch.bool).triu(1) if is_causal else None
    # A row's lse is the score of any key less the log of its probability: of the token itself.
    place = (torch.arange(queries) + (0 if is_causal else keys - queries)).clamp(0, keys - 1)
    known = (query * key[:, place]).sum(-1)
    if bias is not None:
        wide = bias.expand(-1, queries, -1)
        known = known + wide.gather(-1, place[None, :, None].expand(len(bias), -1, 1)).squeeze(-1)
    key = key.transpose(-1, -2)
    for start in range(0, queries, rows):
        stop = min(queries, start + rows)
        seen = min(keys, stop) if is_causal else keys
        shape = (heads, stop - start, seen)
        scores, p = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
        torch.bmm(query[:, start:stop], key[..., :seen], out=scores)
        ask = weights[:, start:stop]
        empty = None
        if bias is not None:
            own = bias[:, start:stop, :seen] if bias.shape[1] > 1 else bias[..., :seen]
            scores += own
            empty = (own == -math.inf).all(-1).expand(heads, stop - start)
            if bool(empty.any()):
                scores.masked_fill_(empty[..., None], 0.0)
                ask = ask.masked_fill(empty, 0.0)
            else:
                empty = None
        if above is not None and start < seen:
            hidden = above[: stop - start, : seen - start]
            scores[..., start:].masked_fill_(hidden, -math.inf)
        torch.softmax(scores, -1, out=p)
        output[:, start:stop] = p @ value[:, :seen]
        mass[:, :seen] += (ask[:, None] @ p).squeeze(1)
        own_place = place[None, start:stop, None].expand(heads, -1, 1)
        probability = p.gather(-1, own_place).squeeze(-1)
        torch.sub(known[:, start:stop], probability.log(), out=lse[:, start:stop])
        lost = ~(probability > LEAST_PROBABILITY)
        if bool(lost.any()):
            lse[:, start:stop][lost] = scores[lost].logsumexp(-1)
        if empty is not None:
            output[:, start:stop][empty] = 0.0
            lse[:, start:stop][empty] = -math.inf
