"""How many keys the queries of a call see, which is what a map's entropy is measured against."""

from jaxtyping import Int
from torch import Tensor

from attending.core.masks import key_counts, seen_keys
from attending.taps.call import AttentionCall


def visible_keys(call: AttentionCall) -> tuple[Int[Tensor, "#batch #heads queries"], bool]:
    """How many keys each query sees, and whether the map grows from row to row.

    Returns:
        The counts, with dimensions of size 1 where all are alike; and whether the rows of a sample
        see different numbers of keys, as under a causal mask or within windows, or when a model
        decodes with a cache. If not, rows of padding have the count of the others.

    Raises:
        ValueError: for nested tensors.
    """
    queries, keys = call.query_length, call.key_length
    if call.query.is_nested:
        raise ValueError(f"model: expected padded tensors, got nested ones in {call!r}.")
    mask = call.attn_mask
    # A self-attention with more keys than queries has a cache: its rows are the last of many.
    grows = (call.is_causal and queries > 1) or (keys > queries and not call.is_cross)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    counts = key_counts(mask, call.is_causal, queries, keys, call.query.device)
    if mask is None or grows:
        return counts, grows
    real = counts > 0
    if queries == keys:  # a query at the place of a hidden key is padding, whatever it sees
        real = real & seen_keys(mask, mask.shape[0], keys)[:, None]
    lowest = counts.where(real, counts.new_tensor(keys + 1)).amin(2, keepdim=True)
    highest = counts.where(real, counts.new_tensor(0)).amax(2, keepdim=True)
    grows = bool((lowest < highest).any())
    if not grows:  # let padding rows do as the others do, so that one number may be enough
        counts = highest.expand_as(counts)
    return counts, grows
