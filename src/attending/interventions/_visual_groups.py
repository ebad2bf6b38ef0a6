"""One attention call with mass moved from sinks to the rest of the image, without its map.

The masses of the groups come out of the call itself, as further columns of its values: column g
holds 1 at the keys of group g, so attention gives its mass there. With masses m and outputs o,

    output + move_fraction * m_sinks * (o_inside - o_sinks)

is the edited output of a selected row, where `inside` are the image tokens that are no sinks: what
they get is in proportion to what they have. The two outputs are states over gathered keys.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from attending.core.groups import group_states, member_indices
from attending.core.kernels import CHUNK_BYTES
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
    """The output of a call after the edit; rows that are not selected are those of `proceed`."""
    output, masses = _with_masses(call, proceed, torch.stack(groups[:3], -1))
    inside, image_sinks, text_sinks = masses.unbind(-1)
    selected = looks_at_image(inside, image_sinks, min_image_mass, min_non_sink_ratio)
    selected = selected & groups.queries[:, None]
    moved = (move_fraction * (image_sinks + text_sinks)).masked_fill(~selected, 0.0)
    rows = (moved > 0).flatten(0, 1).any(0).nonzero().squeeze(-1)
    if len(rows):
        step = _difference(call, groups.inside, groups.image_sinks | groups.text_sinks, rows)
        changed = output[:, :, rows] + (moved[:, :, rows, None] * step).to(output.dtype)
        output = output.index_copy(2, rows, changed)
    return Edited(output, selected, inside + image_sinks, moved)


def _with_masses(
    call: AttentionCall, proceed: Proceed, columns: Bool[Tensor, "batch keys groups"]
) -> tuple[Tensor, Float[Tensor, "batch heads queries groups"]]:
    dim, width = call.query.shape[-1], call.value.shape[-1]
    batch, kv_heads, keys = call.value.shape[:3]
    count = columns.shape[-1]
    extra = columns[:, None].expand(batch, kv_heads, keys, count).to(call.value.dtype)
    value = torch.cat([call.value, extra], -1)
    # Fused kernels want one size for query, key and value, and GPUs a multiple of 8.
    size = -(-max(dim, width + count) // 8) * 8
    wide = proceed(
        replace(
            call,
            query=pad(call.query, (0, size - dim)),
            key=pad(call.key, (0, size - dim)),
            value=pad(value, (0, size - width - count)),
            scale=call.softmax_scale,
        )
    )
    masses = wide[..., width : width + count]
    return wide[..., :width], masses.to(torch.promote_types(masses.dtype, torch.float32))


def _difference(
    call: AttentionCall, inside: Tensor, sinks: Tensor, rows: Int[Tensor, " rows"]
) -> Float[Tensor, "batch heads rows value_dim"]:
    """The output over the keys inside minus that over the sinks, for some of the queries."""
    members = (inside | sinks)[:, None]
    index, is_member = member_indices(members, int(members.sum(-1).max()))
    kv_heads = call.key.shape[1]
    places = index.expand(-1, kv_heads, -1)[..., None]
    key, value = (
        tensor.gather(2, places.expand(*places.shape[:3], tensor.shape[-1]))
        for tensor in (call.key, call.value)
    )
    labels = sinks[:, None].gather(2, index)
    parts = []
    for some, mask in _visible(call, index, is_member, rows):
        of_inside, of_sinks = group_states(
            call.query[:, :, some],
            key,
            value,
            labels,
            attn_mask=mask,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )
        parts.append(of_inside.output - of_sinks.output)
    return torch.cat(parts, 2)


def _visible(
    call: AttentionCall, index: Tensor, is_member: Tensor, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows in portions, each with its mask over the gathered keys; None where all are visible."""
    batch, _, members = index.shape
    mask = call.attn_mask
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
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
