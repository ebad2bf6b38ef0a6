"""The state over some of the keys, in the way that costs least, and what they leave of a whole."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attending.core.kernels import CHUNK_BYTES, dense_rows, row_scores
from attending.core.state import AttentionState, attend

GATHERED = 256  # members up to which a group's keys are gathered rather than the others hidden
DENSE_BYTES = 2**19  # of a map up to which it is stored
FEW_QUERIES = 16  # up to which it is stored, within CHUNK_BYTES, as when a model decodes

# The least share of a row at which the rest of it is had by subtraction: what the kernel rounds
# grows by the inverse. Below, the row is computed again.
LEAST_REST = {torch.float64: 1e-6, torch.float32: 1 / 16}
LEAST_REST_HALF = 0.5


class Scene(NamedTuple):
    """What the states are computed from, checked."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    is_causal: bool
    scale: float

    @property
    def shared(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]


def is_small(scene: Scene) -> bool:
    """Whether the map is so small that one may as well store it."""
    queries, keys = scene.query.shape[2], scene.key.shape[2]
    entries = scene.query.shape[0] * scene.query.shape[1] * queries * keys
    return 0 < 4 * entries <= (CHUNK_BYTES if queries <= FEW_QUERIES else DENSE_BYTES)


def dense_states(scene: Scene, labels: Tensor, count: int) -> tuple[AttentionState, ...]:
    """The states of all groups from the stored scores."""
    scores = row_scores(0, scene.query, scene.key, scene.bias, scene.is_causal, scene.scale)
    return tuple(
        AttentionState(
            *dense_rows(scores.masked_fill((labels != group)[:, :, None], -math.inf), scene.value)
        )
        for group in range(count)
    )


def part_state(scene: Scene, chosen: Tensor) -> AttentionState:
    """The state over the chosen keys, [batch or 1, heads or 1, keys]."""
    members = int(chosen.sum(-1).max()) if chosen.numel() else 0
    if members == 0:
        rows = scene.query.shape[:3]
        dtype = torch.promote_types(scene.query.dtype, torch.float32)
        output = scene.query.new_zeros(*rows, scene.value.shape[-1])
        return AttentionState(output, scene.query.new_full(rows, -math.inf, dtype=dtype))
    if members <= GATHERED and members < chosen.shape[-1]:
        return gathered(scene, chosen, members)
    return hiding_others(scene, chosen)


def hiding_others(scene: Scene, chosen: Tensor) -> AttentionState:
    query, key, value, bias, is_causal, scale = scene
    hiding = torch.zeros(chosen.shape, dtype=torch.float32, device=chosen.device)
    hiding = hiding.masked_fill(~chosen, -math.inf)
    if bias is None or bias.shape[2] == 1:
        row = hiding[:, :, None] if bias is None else bias + hiding[:, :, None]
        return attend(query, key, value, bias=row, is_causal=is_causal, scale=scale)
    if hiding.shape[1] > 1:
        key, value = (tensor.repeat_interleave(scene.shared, 1) for tensor in (key, value))
    return attend(query, key, value, bias=bias, key_bias=hiding, is_causal=is_causal, scale=scale)


def gathered(scene: Scene, chosen: Tensor, members: int) -> AttentionState:
    query, key, value, bias, is_causal, scale = scene
    index, is_member = member_indices(chosen, members)
    item = torch.arange(query.shape[0], device=query.device)[:, None, None]
    heads = key.shape[1] if index.shape[1] == 1 else query.shape[1]
    head = torch.arange(heads, device=query.device)[None, :, None] // (heads // key.shape[1])
    key, value = key[item, head, index], value[item, head, index]
    own = torch.zeros(is_member.shape, dtype=torch.float32, device=query.device)
    own = own.masked_fill(~is_member, -math.inf)[:, :, None]
    if bias is not None:
        first = [max(sizes) for sizes in zip(bias.shape[:2], index.shape[:2], strict=True)]
        own = own.to(bias) + bias.expand(*first, bias.shape[2], chosen.shape[-1]).gather(
            -1, index[:, :, None].expand(*first, bias.shape[2], members)
        )
    if not is_causal:
        return attend(query, key, value, bias=own, scale=scale)
    # Which of the members a query sees is a small map, made for a few rows at a time.
    step = max(1, CHUNK_BYTES // (4 * index.shape[0] * index.shape[1] * members))
    parts = []
    for start in range(0, query.shape[2], step):
        row = torch.arange(start, min(query.shape[2], start + step), device=query.device)
        later = index[:, :, None] > row[:, None]
        seen = own.expand(-1, -1, len(row), -1).masked_fill(later, -math.inf)
        parts.append(attend(query[:, :, row], key, value, bias=seen, scale=scale))
    if len(parts) == 1:
        return parts[0]
    return AttentionState(*(torch.cat(found, 2) for found in zip(*parts, strict=True)))


def member_indices(chosen: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """The keys that are chosen, `[batch, heads, members]` in order, and which entries are real."""
    where = chosen.nonzero()
    count = chosen.sum(-1)
    before = count.flatten().cumsum(0) - count.flatten()
    slot = torch.arange(len(where), device=chosen.device) - before.repeat_interleave(
        count.flatten()
    )
    index = torch.zeros(*chosen.shape[:2], members, dtype=torch.long, device=chosen.device)
    index[where[:, 0], where[:, 1], slot] = where[:, 2]
    return index, torch.arange(members, device=chosen.device) < count[..., None]


class Rest(NamedTuple):
    """What parts leave of a whole.

    Attributes:
        shares: of the parts in each row of the whole, one for each.
        lse: of the rest, -inf where nothing is left.
        known: the rows whose rest may be had by subtraction; the others are in `again`, if they
            see anything.
        again: outputs of rows that were computed from the keys of the rest themselves.
    """

    shares: list[Tensor]
    lse: Tensor
    known: Tensor
    again: list[tuple[tuple[int, int, Tensor], Tensor]]


def rest_of(
    scene: Scene, chosen: Tensor, whole: AttentionState, parts: Sequence[AttentionState]
) -> Rest:
    """What the parts leave to the chosen keys."""
    seen = whole.lse > -math.inf
    level = whole.lse.masked_fill(~seen, 0.0)
    shares = [torch.exp(part.lse - level) for part in parts]
    left = 1.0 - torch.stack(shares).sum(0) if shares else torch.ones_like(level)
    known = seen & (left >= LEAST_REST.get(scene.query.dtype, LEAST_REST_HALF))
    lse = (level + left.where(known, torch.ones_like(left)).log()).masked_fill(~known, -math.inf)
    again = []
    if bool((seen & ~known).any()):
        lse = lse.clone()
        for place, found in _rows_again(scene, chosen, seen & ~known):
            lse[place] = found.lse[0, 0]
            again.append((place, found.output[0, 0]))
    return Rest(shares, lse, known, again)


def rest_state(
    scene: Scene, chosen: Tensor, whole: AttentionState, parts: Sequence[AttentionState]
) -> AttentionState:
    """The state over the chosen keys, which are all but those of the parts."""
    rest = rest_of(scene, chosen, whole, parts)
    output = whole.output.to(rest.lse.dtype)
    for share, part in zip(rest.shares, parts, strict=True):
        output = output - share[..., None] * part.output
    left = (rest.lse - whole.lse).exp().where(rest.known, torch.ones_like(rest.lse))
    output = torch.where(rest.known[..., None], output / left[..., None], 0.0)
    return AttentionState(_put(output, rest.again).to(whole.output.dtype), rest.lse)


def mixed_output(
    whole: AttentionState,
    parts: Sequence[AttentionState],
    rest: Rest,
    masses: Tensor,
    new_masses: Tensor,
) -> Tensor:
    """`sum_g new_masses[g] output_g` without making the output of the rest, which is group 0.

    new_0 / m_0 whole + sum_{g > 0} (new_g - new_0 / m_0 m_g) output_g
    """
    factor = new_masses[0] / masses[0].where(rest.known, torch.ones_like(masses[0]))
    factor = factor.where(rest.known, torch.zeros_like(factor))
    output = factor[..., None] * whole.output
    for part, mass, new_mass in zip(parts, masses[1:], new_masses[1:], strict=True):
        output = torch.addcmul(
            output, (new_mass - factor * mass)[..., None], part.output.to(output)
        )
    if not rest.again:
        return output
    output = output.clone()
    for place, found in rest.again:
        output[place] += new_masses[0][place][:, None] * found
    return output


def _put(output: Tensor, again: Sequence[tuple[tuple[int, int, Tensor], Tensor]]) -> Tensor:
    if again:
        output = output.clone()
        for place, found in again:
            output[place] = found.to(output.dtype)
    return output


def _rows_again(
    scene: Scene, chosen: Tensor, wanted: Tensor
) -> Iterator[tuple[tuple[int, int, Tensor], AttentionState]]:
    """The states over the chosen keys of some rows, a few rows of a head at a time."""
    query, key, value, bias, is_causal, scale = scene
    keys = key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    hiding = torch.zeros(chosen.shape, dtype=dtype, device=chosen.device)
    hiding = hiding.masked_fill(~chosen, -math.inf).expand(*query.shape[:2], keys)
    bias = None if bias is None else bias.expand(*query.shape[:3], keys)
    step = max(1, CHUNK_BYTES // (4 * max(keys, 1)))
    for item, head in wanted.any(-1).nonzero().tolist():
        kv = head // scene.shared
        for rows in wanted[item, head].nonzero().squeeze(-1).split(step):
            own = hiding[item, head].expand(len(rows), -1)
            if bias is not None:
                own = own + bias[item, head, rows]
            seen = keys
            if is_causal:
                seen = min(keys, int(rows[-1]) + 1)
                later = torch.arange(seen, device=query.device) > rows[:, None]
                own = own[:, :seen].masked_fill(later, -math.inf)
            yield (
                (item, head, rows),
                attend(
                    query[item, head, rows][None, None],
                    key[item : item + 1, kv : kv + 1, :seen],
                    value[item : item + 1, kv : kv + 1, :seen],
                    bias=own[None, None],
                    scale=scale,
                ),
            )
