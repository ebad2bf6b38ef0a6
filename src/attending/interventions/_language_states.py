"""States of some of the tokens: picked out, put back, and what the layers need to know of them."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.taps import AttentionCall

States = Float[Tensor, "batch tokens dim"]
Kept = Float[Tensor, "batch kept dim"]
Columns = Int[Tensor, "batch kept"]


def narrowed(
    kwargs: Mapping[str, Any], columns: Columns, held: Int[Tensor, "batch keys"]
) -> dict[str, Any]:
    """What a layer gets besides hidden states, for some of the new tokens and some of the keys.

    Args:
        kwargs: what it would get for all.
        columns: which of the new tokens it gets.
        held: which tokens of the whole sequence are its keys, cached or new.
    """
    changed: dict[str, Any] = {}
    position_ids = kwargs.get("position_ids")
    if isinstance(position_ids, Tensor):
        changed["position_ids"] = position_ids.expand(len(held), -1).gather(1, columns)
    embeddings = kwargs.get("position_embeddings")
    if embeddings is not None:
        changed["position_embeddings"] = tuple(
            take(part.expand(len(held), -1, -1), columns) for part in embeddings
        )
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        changed["attention_mask"] = mask.gather(1, held)
    elif isinstance(mask, Tensor):
        mask = mask.expand(len(held), *mask.shape[1:])
        rows = columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        mask = mask.gather(2, rows)
        keys = held[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        changed["attention_mask"] = mask.gather(3, keys)
    return changed


def row_of(call: AttentionCall, row: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor | None]:
    """The query of one token of each item, and what it sees."""
    batch, heads, queries, dim = call.query.shape
    query = call.query.gather(2, row[:, None, None, None].expand(-1, heads, 1, dim))
    if call.is_causal:
        keys = torch.arange(call.key_length, device=row.device)
        return query, (keys <= row[:, None])[:, None, None, :]
    if call.attn_mask is None:
        return query, None
    mask = call.attn_mask
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    mask = mask.expand(batch, mask.shape[1], queries, mask.shape[3])
    where = row[:, None, None, None].expand(-1, mask.shape[1], 1, mask.shape[3])
    return query, mask.gather(2, where)


def take(states: States, columns: Columns) -> Kept:
    """The states of some tokens."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


def put(states: States, columns: Columns, new: Kept) -> States:
    """The states with those of some tokens replaced; not in place."""
    return states.scatter(1, columns[..., None].expand_as(new), new.to(states.dtype))
