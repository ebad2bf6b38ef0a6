"""One attention call with mass moved from sinks to the rest of the image, without its map.

One pass over the call gives its output and normaliser. Over the image tokens and sinks alone, which
are gathered, text queries have states of their own, and with them the masses of the groups. With
masses m and outputs o,

    output + move_fraction * m_sinks * (o_inside - o_sinks)

is the edited output of a selected row, where `inside` are the image tokens that are no sinks: what
they get is in proportion to what they have.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core.groups import group_states, member_indices
from attending.core.kernels import CHUNK_BYTES
from attending.core.state import AttentionState
from attending.interventions.edit import hiding, pass_on, state_of, unchanged
from attending.taps import AttentionCall, Proceed


class Groups(NamedTuple):
    """The keys of a call, and which of its queries may be edited."""

    inside: Bool[Tensor, "batch keys"]  # image tokens that are no sinks
    image_sinks: Bool[Tensor, "batch keys"]
    text_sinks: Bool[Tensor, "batch keys"]
    queries: Bool[Tensor, "batch queries"]


class Edited(NamedTuple):
    """What became of a call."""

    output: Float[Tensor, "batch heads queries value_dim"]
    selected: Bool[Tensor, "batch heads queries"]
    image_mass: Float[Tensor, "batch heads queries"]
    moved: Float[Tensor, "batch heads queries"]


def looks_at_image(
    non_sink_mass: Tensor, sink_mass: Tensor, min_image_mass: float, min_non_sink_ratio: float
) -> Bool[Tensor, "*rows"]:
    """Whether a row has enough mass on the image, and enough of that beside its sinks."""
    mass = non_sink_mass + sink_mass
    ratio = non_sink_mass / mass.masked_fill(mass == 0, 1.0)
    # A row that has nothing beside the sinks has nothing to which mass could go in proportion.
    return (mass >= min_image_mass) & (ratio >= min_non_sink_ratio) & (non_sink_mass > 0)


def edit(
    call: AttentionCall,
    proceed: Proceed,
    groups: Groups,
    *,
    min_image_mass: float,
    min_non_sink_ratio: float,
    move_fraction: float,
) -> Edited:
    """The output of a call after the edit."""
    if call.dropout_p:
        raise ValueError(
            f"model: expected no dropout on attention weights, got {call.dropout_p} in {call!r}. "
            "Call model.eval() first."
        )
    rows = groups.queries.any(0).nonzero().squeeze(-1)
    if len(rows) == 0 or not bool(groups.inside.any()):
        output = proceed(call)
        nothing = output.new_zeros(output.shape[:3])
        return Edited(output, nothing.bool(), nothing, nothing)
    whole = state_of(call)
    states = _group_states(call, groups, rows)
    level = whole.lse[:, :, rows]
    level = level.masked_fill(level == -torch.inf, 0.0)
    inside, image_sinks, text_sinks = (torch.exp(state.lse - level) for state in states)
    chosen = looks_at_image(inside, image_sinks, min_image_mass, min_non_sink_ratio)
    chosen = chosen & groups.queries[:, None, rows]
    sinks = image_sinks + text_sinks
    gain = (move_fraction * sinks).masked_fill(~chosen, 0.0)
    every = whole.lse.new_zeros(whole.lse.shape)
    found = Edited(
        whole.output,
        torch.zeros_like(every, dtype=torch.bool).index_copy(2, rows, chosen),
        every.index_copy(2, rows, inside + image_sinks),
        every.index_copy(2, rows, gain),
    )
    if not bool((gain > 0).any()):
        return found._replace(output=unchanged(call, proceed, whole))
    if call.inner:
        growth = 1.0 + gain / inside.masked_fill(~chosen, 1.0)
        rest = torch.ones_like(growth)
        factors = torch.stack([rest, growth, torch.where(chosen, 1.0 - move_fraction, rest)])
        return found._replace(output=_passed_on(call, proceed, groups, rows, factors))
    difference = gain[..., None] * states[0].output
    for mass, state in zip((image_sinks, text_sinks), states[1:], strict=True):
        lost = (move_fraction * mass).masked_fill(~chosen, 0.0)
        difference = torch.addcmul(difference, lost[..., None], state.output, value=-1.0)
    return found._replace(output=whole.output.index_add(2, rows, difference.to(whole.output)))


def _passed_on(
    call: AttentionCall, proceed: Proceed, groups: Groups, rows: Tensor, factors: Tensor
) -> Tensor:
    """The call for the handler after this one: its groups of keys count by these factors."""
    ones = factors.new_ones(*factors.shape[:3], call.query_length)
    labels = groups.inside.long() + 2 * (groups.image_sinks | groups.text_sinks).long()
    heads = torch.arange(call.num_heads, device=call.query.device)
    new = ones.index_copy(3, rows, factors)
    return pass_on(call, proceed, heads, labels[:, None], ones, new)


def _group_states(
    call: AttentionCall, groups: Groups, rows: Int[Tensor, " rows"]
) -> list[AttentionState]:
    """The states of some of the queries over the image tokens inside, and over both kinds of sinks.

    Their keys are gathered first: text queries usually come after the image, and then see them all.
    """
    members = (groups.inside | groups.image_sinks | groups.text_sinks)[:, None]
    index, is_member = member_indices(members, int(members.sum(-1).max()))
    places = index.expand(-1, call.key.shape[1], -1)[..., None]
    key, value = (
        tensor.gather(2, places.expand(*places.shape[:3], tensor.shape[-1]))
        for tensor in (call.key, call.value)
    )
    labels = groups.image_sinks.long() + 2 * groups.text_sinks.long()
    labels = labels[:, None].gather(2, index)
    parts = [
        group_states(
            call.query[:, :, some],
            key,
            value,
            labels,
            attn_mask=mask,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
            num_groups=3,
        )
        for some, mask in _visible(call, index, is_member, rows)
    ]
    return [
        AttentionState(*(torch.cat(tensors, 2) for tensors in zip(*group, strict=True)))
        for group in zip(*parts, strict=True)
    ]


def _visible(
    call: AttentionCall, index: Tensor, is_member: Tensor, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows in portions, each with its mask over the gathered keys; None where all are visible."""
    batch, _, members = index.shape
    mask = hiding(call.attn_mask)
    if mask is not None:
        mask = mask.expand(*mask.shape[:3], call.key_length)
    per_row = 4 * batch * members * (1 if mask is None else mask.shape[1])
    for some in rows.split(max(1, CHUNK_BYTES // max(per_row, 1))):
        visible = is_member[:, :, None]
        if call.is_causal:
            visible = visible & (index[:, :, None] <= some[:, None])
        if mask is None:
            yield some, None if bool(visible.all()) else visible
            continue
        own = mask[:, :, some] if mask.shape[2] > 1 else mask
        columns = index[:, :, None].expand(batch, own.shape[1], own.shape[2], members)
        own = own.expand(batch, -1, -1, -1).gather(-1, columns)
        if own.dtype == torch.bool:
            visible = visible & own
            yield some, None if bool(visible.all()) else visible
        else:
            yield some, own.masked_fill(~visible, -torch.inf)
