"""The plans of Combiner that cut a sequence: segments, and blocks that double."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from attending.core.state import AttentionState, attention_state, merge
from attending.nn._combiner_regions import Call, expectation
from attending.nn._key_padding import compact, restore
from attending.nn.partition_tree import Pooling, windows_tree


def fixed_state(call: Call, segment_length: int) -> AttentionState:
    """Attention by `FixedPlan`; hidden tokens are at the end of their sequence."""
    batch, heads, tokens, _ = call.query.shape
    segment_length = min(segment_length, tokens)
    segments = -(-tokens // segment_length)
    rest = segments * segment_length - tokens
    visible = call.visible
    if visible is None and rest:
        visible = torch.ones(1, tokens, dtype=torch.bool, device=call.query.device)
    if visible is not None:
        visible = pad(visible, (0, rest)).view(-1, 1, segments, segment_length)

    def fold(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, 0, 0, rest)).unflatten(2, (segments, segment_length))

    query, key, value = fold(call.query), fold(call.key), fold(call.value)
    mask = None
    if visible is not None and not call.is_causal:
        mask = visible[..., None, :].expand(batch, heads, -1, -1, -1).flatten(0, 1)
    own = attention_state(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        mask,
        is_causal=call.is_causal,
        scale=call.scale,
    )
    direct = AttentionState(
        own.output.reshape(batch, heads, -1, value.shape[-1])[:, :, :tokens],
        own.lse.reshape(batch, heads, -1)[:, :, :tokens],
    )
    if segments == 1:
        return direct
    weights = None if call.visible is None else call.visible[:, None]
    tree = windows_tree(tokens, (segment_length,)) if segment_length > 1 else None

    def pooled(tensor: Tensor) -> Tensor:
        if tree is None:
            return tensor
        return tree.pool_tables(tensor, weights, call.pool)[1]

    answers = expectation(pooled(call.query), key, value, visible, call.scale)
    here = torch.arange(tokens, device=call.query.device)[:, None] // segment_length
    other = torch.arange(segments, device=call.query.device)
    seen = here > other if call.is_causal else here != other
    if visible is not None and not call.is_causal:
        seen = seen & visible.any(-1)[:, :, None]
    regions = attention_state(call.query, pooled(call.key), answers, seen, scale=call.scale)
    return merge(direct, regions)


def logsparse_state(call: Call) -> AttentionState:
    """Attention by `LogsparsePlan`; hidden tokens are at the end of their sequence."""
    tensors = (call.query, call.key, call.value)
    own = AttentionState(call.value, _scores(call.query, call.key, call.scale))
    states = [own, *_blocks_before(*tensors, call.scale, call.pool)]
    if not call.is_causal:
        turned = tuple(tensor.flip(2) for tensor in tensors)
        order = None
        if call.visible is not None:
            turned, _, order = compact(turned, call.visible.flip(1))
        for output, lse in _blocks_before(*turned, call.scale, call.pool):
            lse = lse[..., None]
            if order is not None:
                output, lse = restore(output, order), restore(lse, order)
            states.append(AttentionState(output.flip(2), lse.flip(2).squeeze(-1)))
    return merge(*states)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (query.to(dtype) * key.to(dtype)).sum(-1) * scale


def _blocks_before(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pool: Pooling
) -> list[AttentionState]:
    """For each bit of the place, the state over the block of that size before it."""
    tokens = query.shape[2]
    levels = (tokens - 1).bit_length()
    tree = windows_tree(tokens, (2,) * levels)
    queries, keys = (tree.pool_tables(tensor, None, pool) for tensor in (query, key))
    rest = 2**levels - tokens
    query, key, value = (pad(tensor, (0, 0, 0, rest)) for tensor in (query, key, value))
    states = []
    for level in range(levels):
        size = 2**level
        pairs = -(-(tokens - size) // (2 * size))  # of blocks; only the last may be cut short
        length = 2 * size * pairs

        def halves(tensor: Tensor, which: int, length: int = length, size: int = size) -> Tensor:
            return tensor[:, :, :length].unflatten(2, (-1, 2, size))[:, :, :, which]

        region_key = keys[level][:, :, 0 : 2 * pairs : 2]
        region_query = queries[level][:, :, 0 : 2 * pairs : 2]
        answer = expectation(region_query, halves(key, 0), halves(value, 0), None, scale)
        score = _scores(halves(query, 1), region_key[..., None, :], scale)
        output = answer[..., None, :].expand(-1, -1, -1, size, -1)
        # The first half of each pair has that bit unset, and so no block of this size.
        output = torch.stack([torch.zeros_like(output), output], 3).flatten(2, 4)
        score = torch.stack([torch.full_like(score, -torch.inf), score], 3).flatten(2, 4)
        end = max(tokens - length, 0)
        output = pad(output, (0, 0, 0, end))[:, :, :tokens]
        states.append(AttentionState(output, pad(score, (0, end), value=-torch.inf)[:, :, :tokens]))
    return states
