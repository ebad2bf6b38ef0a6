"""The plan of Combiner by clusters, whose members may be anywhere in the sequence."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from attending.core.state import AttentionState, attention_state, merge
from attending.nn._combiner_regions import Call, Summaries, expectation, running_summaries


def routing_state(call: Call, assign: Tensor) -> AttentionState:
    """Attention by `RoutingPlan`, with `assign` broadcasting to `[batch, heads, tokens]`."""
    batch, heads, tokens, _ = call.query.shape
    assign = assign.to(call.query.device).long().expand(batch, heads, tokens)
    member = one_hot(assign.flatten(0, 1)).bool()  # [batch * heads, tokens, clusters]
    if call.visible is not None:
        member = member & call.visible.repeat_interleave(heads, 0)[..., None]
    assign = assign.flatten(0, 1)
    query, key, value = (t.flatten(0, 1) for t in (call.query, call.key, call.value))
    count = member.cumsum(1)  # members so far of each cluster, at each token
    size = max(int(count[:, -1].max()), 1)
    clusters = member.shape[-1]
    # Members of a cluster lie side by side, in their order: token i is in slot[i].
    rank = (count.gather(2, assign[..., None]).squeeze(-1) - 1).clamp_min(0)
    slot = assign * size + rank
    hidden = ~member.any(-1)
    index = torch.zeros(batch * heads, clusters * size + 1, dtype=torch.long, device=slot.device)
    places = torch.arange(tokens, device=slot.device).expand_as(slot)
    index = index.scatter(1, slot.masked_fill(hidden, clusters * size), places)[:, :-1]
    real = torch.arange(size, device=slot.device) < count[:, -1, :, None]

    def gather(tensor: Tensor) -> Tensor:
        dim = tensor.shape[-1]
        flat = tensor.gather(1, index[..., None].expand(-1, -1, dim))
        found: Tensor = flat.unflatten(1, (clusters, size))
        return found.masked_fill(~real[..., None], 0.0)

    grouped = gather(query), gather(key), gather(value)
    mask = None if call.is_causal or bool(real.all()) else real[:, :, None, :]
    own = attention_state(*grouped, mask, is_causal=call.is_causal, scale=call.scale)
    dim = value.shape[-1]
    direct = AttentionState(
        own.output.flatten(1, 2).gather(1, slot[..., None].expand(-1, -1, dim)),
        own.lse.flatten(1, 2).gather(1, slot),
    )
    other = torch.arange(clusters, device=slot.device) != assign[..., None]
    if call.is_causal:
        regions = running_summaries(*grouped, real, call.scale, call.pool)
        far = _see_running(query, regions, count, other, call.scale)
    else:
        far = _see_whole(query, grouped, real, other, call)
    output, lse = merge(direct, far)
    return AttentionState(output.unflatten(0, (batch, heads)), lse.unflatten(0, (batch, heads)))


def _see_running(
    query: Tensor, regions: Summaries, count: Tensor, other: Tensor, scale: float
) -> AttentionState:
    """Each query sees, of each other cluster, the members that came before it."""
    clusters, size = regions.filled.shape[1:]
    last = (count - 1).clamp_min(0) + torch.arange(clusters, device=count.device) * size

    def gather(tensor: Tensor) -> Tensor:
        dim = tensor.shape[-1]
        rows = last.flatten(1)[..., None].expand(-1, -1, dim)
        found: Tensor = tensor.flatten(1, 2).gather(1, rows).unflatten(1, last.shape[1:])
        return found

    seen = (other & (count > 0))[:, :, None, :]
    output, lse = attention_state(
        query[:, :, None], gather(regions.key), gather(regions.value), seen, scale=scale
    )
    return AttentionState(output.squeeze(2), lse.squeeze(2))


def _see_whole(
    query: Tensor,
    grouped: tuple[Tensor, Tensor, Tensor],
    real: Tensor,
    other: Tensor,
    call: Call,
) -> AttentionState:
    """Each query sees a summary of each other cluster."""

    def pooled(tensor: Tensor) -> Tensor:
        filled = real.any(-1, keepdim=True)
        if call.pool == "mean":
            return tensor.sum(2) / real.sum(-1, keepdim=True).clamp_min(1).to(tensor.dtype)
        highest = tensor.masked_fill(~real[..., None], -torch.inf).amax(2)
        return highest.masked_fill(~filled, 0.0)

    answers = expectation(pooled(grouped[0]), grouped[1], grouped[2], real, call.scale)
    seen = other & real.any(-1)[:, None]
    output, lse = attention_state(
        query[:, None],
        pooled(grouped[1])[:, None],
        answers[:, None],
        seen[:, None],
        scale=call.scale,
    )
    return AttentionState(output.squeeze(1), lse.squeeze(1))
