"""Attention calls without their padding: what is left is what the model means to compute.

A key that no query of its sequence may see is padding, and in self-attention so is the query at its
place. Taken out, the mask of a padded batch is mostly no mask any more, or the causal one, and the
fused kernels need none of it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core.masks import seen_keys, simplest_mask
from attending.taps import AttentionCall


class AttentionArguments(TypedDict):
    """Keyword arguments that all statistics of a map take."""

    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    enable_gqa: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """Attention of some sequences of a call, without padding.

    Attributes:
        query, key: of the sequences.
        arguments: mask, causality, scale and GQA.
        sequences: which items of the batch.
        queries, keys: which tokens of the padded call, the same for all sequences.
    """

    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    arguments: AttentionArguments
    sequences: Int[Tensor, " batch"]
    queries: Int[Tensor, " queries"]
    keys: Int[Tensor, " keys"]


def visible_tokens(
    call: AttentionCall, query_padding: Bool[Tensor, "batch queries"] | None = None
) -> tuple[Bool[Tensor, "batch queries"], Bool[Tensor, "batch keys"]]:
    """Which queries and keys of a call are no padding.

    Args:
        call: with 4-dimensional tensors, see `call_in_four_dimensions`.
        query_padding: True for what is known to be no padding, where the mask does not tell (the
            queries of cross-attention).
    """
    batch, queries, keys = call.query.shape[0], call.query_length, call.key_length
    device = call.query.device
    seen = torch.ones(batch, keys, dtype=torch.bool, device=device)
    if call.attn_mask is not None:
        seen = seen_keys(call.attn_mask, batch, keys)
    if not call.is_cross and queries <= keys and not (call.is_causal and queries < keys):
        asking = seen[:, keys - queries :]  # with a cache, the queries are the last tokens
    else:
        asking = torch.ones(batch, queries, dtype=torch.bool, device=device)
        if query_padding is not None and query_padding.shape == asking.shape:
            asking = query_padding.to(device)
    return asking, seen


def problems(
    call: AttentionCall,
    asking: Bool[Tensor, "batch queries"],
    seen: Bool[Tensor, "batch keys"],
) -> Iterator[Problem]:
    """The problems of a call: one for all sequences without padding, one for each with some.

    Args:
        call: with 4-dimensional tensors.
        asking, seen: the queries and keys that are no padding, of `visible_tokens`.
    """
    whole = asking.all(1) & seen.all(1)
    groups = [whole.nonzero().squeeze(1)] if bool(whole.any()) else []
    groups += list((~whole).nonzero())
    for sequences in groups:
        first = int(sequences[0])
        queries, keys = asking[first].nonzero().squeeze(1), seen[first].nonzero().squeeze(1)
        if not len(queries) or not len(keys):
            continue
        everything = len(sequences) == len(whole) and len(queries) == asking.shape[1]
        everything = everything and len(keys) == seen.shape[1]
        query, key = call.query, call.key
        if not everything:
            query = query[sequences][:, :, queries]
            key = key[sequences][:, :, keys]
        mask, is_causal = _simplest_mask(call, sequences, queries, keys)
        arguments = AttentionArguments(
            attn_mask=mask,
            is_causal=is_causal,
            scale=call.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        yield Problem(query, key, arguments, sequences, queries, keys)


def in_four_dimensions(tensor: Tensor) -> Tensor:
    """`[batch, heads, tokens, dim]` of what may have more leading dimensions, or only one."""
    if tensor.dim() < 4:
        return tensor.reshape(-1, 1, *tensor.shape[-2:])
    return tensor.flatten(0, tensor.dim() - 4)


def call_in_four_dimensions(call: AttentionCall) -> AttentionCall:
    """The call with all its tensors in four dimensions."""
    mask = call.attn_mask
    return dataclasses.replace(
        call,
        query=in_four_dimensions(call.query),
        key=in_four_dimensions(call.key),
        value=in_four_dimensions(call.value),
        attn_mask=None if mask is None else mask_in_four_dimensions(mask, call),
    )


def mask_in_four_dimensions(mask: Tensor, call: AttentionCall) -> Tensor:
    """The mask of a call to go with its tensors in four dimensions."""
    if call.query.dim() == 4:
        return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    full = (*call.query.shape[:-1], call.key_length)
    return in_four_dimensions(mask.expand(full))


def _simplest_mask(
    call: AttentionCall, sequences: Tensor, queries: Tensor, keys: Tensor
) -> tuple[Tensor | None, bool]:
    mask = call.attn_mask
    square = len(queries) == len(keys)
    if mask is None:
        if call.is_causal and not (square and torch.equal(queries, keys)):
            # PyTorch's causal mask counts from the top left of the padded map.
            return (keys <= queries[:, None])[None, None], False
        return None, call.is_causal
    if mask.shape[0] > 1:
        mask = mask[sequences]
    if mask.shape[2] > 1:
        mask = mask[:, :, queries]
    if mask.shape[3] > 1:
        mask = mask[..., keys]
    return simplest_mask(mask, len(queries), len(keys))
