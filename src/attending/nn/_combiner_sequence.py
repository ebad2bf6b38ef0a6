"""The plans of Combiner that cut a sequence: segments, and blocks that double."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from attending.core.state import AttentionState, attention_state, merge
from attending.nn._combiner_regions import (
    SMALL,
    Call,
    expectation,
    hide,
    joint_softmax,
    scaled,
)
from attending.nn._key_padding import compact, restore
from attending.nn.partition_tree import Pooling, windows_tree


def fixed_output(call: Call, segment_length: int) -> Tensor:
    """Attention by `FixedPlan`; hidden tokens are at the end of their sequence."""
    tokens = call.query.shape[2]
    size = min(segment_length, tokens)
    segments = -(-tokens // size)
    rest = segments * size - tokens
    visible = call.visible
    if visible is None and rest:
        visible = torch.ones(1, tokens, dtype=torch.bool, device=call.query.device)
    if visible is not None:
        visible = pad(visible, (0, rest)).view(-1, 1, segments, size)
    folded = [
        (pad(tensor, (0, 0, 0, rest)) if rest else tensor).unflatten(2, (segments, size))
        for tensor in (call.query, call.key, call.value)
    ]
    query, key, value = folded
    weights = None if call.visible is None else call.visible[:, None]
    tree = windows_tree(tokens, (size,)) if 1 < size < tokens else None

    def pooled(tensor: Tensor) -> Tensor:
        return tensor if tree is None else tree.pool_tables(tensor, weights, call.pool)[1]

    if segments == 1:
        regions = key[:, :, :0, 0], value[:, :, :0, 0]
    else:
        answers = expectation(pooled(call.query), key, value, visible, call.scale)
        regions = pooled(call.key), answers
    place = torch.arange(segments, device=query.device)
    other = place[:, None] > place if call.is_causal else place[:, None] != place
    near = None
    if call.is_causal:
        near = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    elif visible is not None:  # of a causal model, visible tokens see no padding anyway
        near = visible[:, :, :, None, :]
        other = other & visible.any(-1)[:, :, None, :]
    if size + segments > SMALL:
        output = _merged(call, query, key, value, near, other, regions)
    else:
        asking = scaled(query, call.scale)
        close = asking @ key.to(asking.dtype).mT
        close = close if near is None else hide(close, near)
        # All queries of a head at once: a product that is spread over segments copies its regions.
        far = (asking.flatten(2, 3) @ regions[0].to(asking.dtype).mT).unflatten(2, (segments, size))
        if segments > 1:
            far = hide(far, other[..., None, :])
        direct, share = joint_softmax(close, far)
        taken = share.to(value.dtype).flatten(2, 3) @ regions[1]
        output = direct.to(value.dtype) @ value + taken.unflatten(2, (segments, size))
    return output.flatten(2, 3)[:, :, :tokens]


def _merged(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    near: Tensor | None,
    other: Tensor,
    regions: tuple[Tensor, Tensor],
) -> Tensor:
    """The states of own segment and of regions, each from a fused kernel, in linear memory."""
    batch, heads, segments, size, _ = query.shape
    mask = None
    if not call.is_causal and near is not None:
        mask = near.expand(batch, heads, segments, 1, size).flatten(0, 1)
    own = attention_state(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        mask,
        is_causal=call.is_causal,
        scale=call.scale,
    )
    direct = AttentionState(
        own.output.unflatten(0, (batch, heads)).flatten(2, 3),
        own.lse.unflatten(0, (batch, heads)).flatten(2, 3),
    )
    if segments > 1:
        seen = other.repeat_interleave(size, -2)
        far = attention_state(query.flatten(2, 3), *regions, seen, scale=call.scale)
        direct = merge(direct, far)
    output: Tensor = direct.output.unflatten(2, (segments, size))
    return output


def logsparse_state(call: Call) -> AttentionState:
    """Attention by `LogsparsePlan`; hidden tokens are at the end of their sequence."""
    tensors = (call.query, call.key, call.value)
    own = AttentionState(call.value, _scores(call.query, call.key, call.scale))
    states = [own, *_blocks_before(*tensors, call.scale, call.pool)]
    if not call.is_causal:
        turned = [tensor.flip(2) for tensor in tensors]
        order = None
        if call.visible is not None:
            compacted, _, order = compact(tuple(turned), call.visible.flip(1))
            turned = list(compacted)
        query, key, value = turned
        for output, lse in _blocks_before(query, key, value, call.scale, call.pool):
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
    if rest:
        query, key, value = (pad(tensor, (0, 0, 0, rest)) for tensor in (query, key, value))
    states = []
    for level in range(levels):
        size = 2**level
        pairs = -(-(tokens - size) // (2 * size))  # of blocks; only the last may be cut short
        length = 2 * size * pairs

        def halves(tensor: Tensor, which: int, length: int = length, size: int = size) -> Tensor:
            both: Tensor = tensor[:, :, :length].unflatten(2, (-1, 2, size))
            return both[:, :, :, which]

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
