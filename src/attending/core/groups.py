"""Edits of an attention map as changes of the masses of groups of keys.

Split the keys into groups: sinks, image tokens, all the rest. Attention over each group is a state
of its own, and the share of a row's probability that a group holds follows from the normalisers,

    mass_g[i] = exp(lse_g[i] - lse[i]),      output[i] = sum_g mass_g[i] output_g[i].

An edit that scales whole groups (damp the sinks, give to the image) changes the masses and leaves
what is inside a group in its proportions. So the edited output is the same sum with other masses,
and the map with its queries x keys entries is never built:

    states = group_states(query, key, value, groups, is_causal=True)
    masses = move_mass(group_masses(states), {1: 0.6}, (0,))     # 60% of group 1 goes to group 0
    output = mix(states, masses)

Where another function is to see the edited map and not its output, `reweighted_pair` turns the
edit into a few more columns of query and key: their plain softmax is the edited map.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core.bias import HIDDEN, BiasedPair, add_low_rank_bias
from attending.core.check import check_arguments
from attending.core.kernels import CHUNK_BYTES, dense_rows, row_scores
from attending.core.precision import full_precision
from attending.core.state import AttentionState, attend

GATHERED = 256  # members up to which a group's keys are gathered rather than the others hidden
DENSE_BYTES = 2**19  # of a map up to which it is stored
FEW_QUERIES = 16  # up to which it is stored, within CHUNK_BYTES, as when a model decodes

# The least share of a row at which the rest of it is had by subtraction: what the kernel rounds
# grows by the inverse. Below, the row is computed again.
LEAST_REST = {torch.float64: 1e-6, torch.float32: 1 / 16}
LEAST_REST_HALF = 0.5

Groups = Int[Tensor, "#batch group_heads keys"] | Bool[Tensor, "#batch group_heads keys"]
Masses = Float[Tensor, "groups batch heads queries"]


class _Scene(NamedTuple):
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


@full_precision
def group_states(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    groups: Groups,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    num_groups: int | None = None,
    whole: AttentionState | None = None,
) -> tuple[AttentionState, ...]:
    """The state of each query over each group of keys; merged they are `attention_state`.

    Small groups are gathered, large ones are had by hiding the other keys; the map is not stored
    (but for a few queries, or within half a megabyte, where that is faster). Differentiable in
    query, key and value.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in `attention_state`.
        groups: the group of each key, from 0; boolean for two groups, False being group 0.
            `[batch or 1, heads or kv_heads or 1, keys]`. Let group 0 be the largest, "the rest".
        num_groups: how many there are; by default the largest label + 1 (2 for a boolean).
        whole: `attention_state` on the same arguments, if you have it. Then group 0 is what the
            others leave of it, which costs next to nothing. Rows of which group 0 has so little
            (under 1/16 in float32, 1/2 in half precision) that digits would be lost are computed
            again.

    Returns:
        One state for each group; lse is -inf and output 0 where a query sees none of its keys.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    scene = _Scene(query, key, value, arguments.bias, is_causal, arguments.scale)
    labels, count = check_groups(groups, scene.query, scene.key, num_groups)
    if whole is not None:
        _check_whole(whole, scene)
    entries = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    stored = CHUNK_BYTES if query.shape[2] <= FEW_QUERIES else DENSE_BYTES
    if 0 < 4 * entries <= stored:
        return _from_scores(scene, labels, count)
    parts = [_part(scene, labels == group) for group in range(1, count)]
    if whole is None:
        return (_part(scene, labels == 0), *parts)
    return (_remainder(scene, labels == 0, whole, parts), *parts)


def group_masses(states: Sequence[AttentionState]) -> Masses:
    """The share of each row's probability that each group holds, `exp(lse_g - lse)`.

    The shares of a row sum to 1; those of a row that sees no key are 0.
    """
    lses = torch.stack([state.lse for state in states])
    empty = (lses == -math.inf).all(0)
    return torch.softmax(lses.masked_fill(empty, 0.0), 0).masked_fill(empty, 0.0)


def mix(
    states: Sequence[AttentionState], masses: Masses
) -> Float[Tensor, "batch heads queries value_dim"]:
    """The output of attention whose groups have these masses: `sum_g masses[g] * output_g`.

    Rows of masses should sum to 1. Mass on a group of which the row sees no key is lost, as there
    is nothing to look at; `move_mass` never puts any there.

    Raises:
        ValueError: if there are not as many masses as states.
    """
    if len(states) != masses.shape[0]:
        raise ValueError(
            f"masses: expected [groups, batch, heads, queries] with {len(states)} groups, one for "
            f"each state, got {list(masses.shape)}."
        )
    output = torch.zeros_like(states[0].output, dtype=masses.dtype)
    for state, mass in zip(states, masses, strict=True):
        output = output + mass.unsqueeze(-1) * state.output
    return output.to(states[0].output.dtype)


def move_mass(masses: Masses, take: Mapping[int, float], give: Sequence[int]) -> Masses:
    """Take a share of the mass of some groups and give it to others, in proportion to theirs.

        m_g' = (1 - take[g]) m_g                       for the groups that give
        m_g' = m_g (1 + freed / sum_{h in give} m_h)   for those that get, freed = sum take[g] m_g

    A row in which the groups that get hold nothing stays as it is: there is nobody to give to.

    Args:
        masses: of each group, as `group_masses` has them.
        take: for each group that loses, the share that it loses. 1 takes all; a negative share
            moves mass towards the group instead, at most all that the others of `give` hold.
        give: the groups that get; none of them may lose.

    Raises:
        ValueError: for a group that there is not, or on both sides, or for a share above 1.
    """
    count = masses.shape[0]
    for name, wanted in (("take", take), ("give", give)):
        if any(not 0 <= group < count for group in wanted):
            raise ValueError(f"{name}: expected groups from 0 to {count - 1}, got {wanted!r}.")
    if not give or set(take) & set(give):
        raise ValueError(
            f"give: expected groups that are not in take = {dict(take)!r}, at least one, got "
            f"{tuple(give)!r}."
        )
    if any(not share <= 1 for share in take.values()):
        raise ValueError(f"take: expected shares of at most 1, got {dict(take)!r}.")
    freed = torch.stack([share * masses[group] for group, share in take.items()]).sum(0)
    getting = masses[list(give)].sum(0)
    able = getting > 0
    ones = torch.ones_like(getting)
    # Where mass moves the other way there may not be enough of it: then as much as there is.
    enough = torch.where(freed < -getting, getting / -freed.where(freed < 0, -ones), able.to(ones))
    gain = enough * freed / getting.where(able, ones)
    factors = [ones] * count
    for group, share in take.items():
        factors[group] = 1.0 - share * enough
    for group in give:
        factors[group] = 1.0 + gain
    return masses * torch.stack(factors)


@full_precision
def reweighted_pair(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    groups: Groups,
    masses: Masses,
    new_masses: Masses,
    scale: float | None = None,
) -> BiasedPair:
    """Query and key of which the plain softmax is the map with the new masses.

    A group's factor is a bias, `log(new_mass_g[i] / mass_g[i])` for every key of group g, and that
    is a sum of one product for each group. So the edit passes through any function of attention,
    fused or not, and composes with whatever else that function is made to do.

    Args:
        query, key: as in `scaled_dot_product_attention`.
        groups: as in `group_states`.
        masses, new_masses: before and after, of the same shape.
        scale: of the scores; `dim ** -0.5` by default.

    Returns:
        query and key, at least float32, with some more columns, and the scale to pass on. Keys are
        repeated where query heads that share them have groups of their own.
    """
    labels, count = check_groups(groups, query, key, masses.shape[0])
    known = (masses > 0) & (new_masses > 0)
    ones = torch.ones_like(masses)
    factor = torch.where(known, new_masses / torch.where(known, masses, ones), ones)
    left = factor.log().masked_fill((masses > 0) & (new_masses <= 0), HIDDEN).movedim(0, -1)
    right = torch.nn.functional.one_hot(labels, count).to(left)
    if labels.shape[1] not in (1, key.shape[1]):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return add_low_rank_bias(query, key, left, right, scale)


def check_groups(
    groups: Tensor, query: Tensor, key: Tensor, num_groups: int | None
) -> tuple[Tensor, int]:
    """Labels as integers, one row for all query heads or for each; and how many groups."""
    batch, heads, kv_heads, keys = *query.shape[:2], key.shape[1], key.shape[2]
    whole_numbers = not groups.is_floating_point() and not groups.is_complex()
    if (
        not whole_numbers
        or groups.dim() != 3
        or groups.shape[0] not in (1, batch)
        or groups.shape[1] not in (1, heads, kv_heads)
        or groups.shape[2] != keys
    ):
        raise ValueError(
            "groups: expected integers or booleans [batch or 1, heads or kv_heads or 1, keys] = "
            f"[{batch} or 1, {heads} or {kv_heads} or 1, {keys}], got {groups.dtype} "
            f"{list(groups.shape)}."
        )
    if num_groups is None:
        known = groups.dtype == torch.bool or groups.numel() == 0
        num_groups = 2 if known else int(groups.max()) + 1
    labels = groups.long()
    if not torch.compiler.is_compiling() and bool(((labels < 0) | (labels >= num_groups)).any()):
        raise ValueError(
            f"groups: expected labels from 0 to {num_groups - 1}, got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    if labels.shape[1] not in (1, heads):
        labels = labels.repeat_interleave(heads // kv_heads, 1)
    return labels, num_groups


def _check_whole(whole: AttentionState, scene: _Scene) -> None:
    expected = (*scene.query.shape[:3], scene.value.shape[-1])
    if whole.output.shape != expected or whole.lse.shape != expected[:3]:
        raise ValueError(
            f"whole: expected the attention_state of the same arguments, output {list(expected)}, "
            f"got {list(whole.output.shape)} and lse {list(whole.lse.shape)}."
        )


def _from_scores(scene: _Scene, labels: Tensor, count: int) -> tuple[AttentionState, ...]:
    scores = row_scores(0, scene.query, scene.key, scene.bias, scene.is_causal, scene.scale)
    return tuple(
        AttentionState(
            *dense_rows(scores.masked_fill((labels != group)[:, :, None], -math.inf), scene.value)
        )
        for group in range(count)
    )


def _part(scene: _Scene, chosen: Tensor) -> AttentionState:
    """The state over the chosen keys, [batch or 1, heads or 1, keys]."""
    members = int(chosen.sum(-1).max()) if chosen.numel() else 0
    if members == 0:
        rows = scene.query.shape[:3]
        dtype = torch.promote_types(scene.query.dtype, torch.float32)
        output = scene.query.new_zeros(*rows, scene.value.shape[-1])
        return AttentionState(output, scene.query.new_full(rows, -math.inf, dtype=dtype))
    if members <= GATHERED and members < chosen.shape[-1]:
        return _gathered(scene, chosen, members)
    return _hiding_others(scene, chosen)


def _hiding_others(scene: _Scene, chosen: Tensor) -> AttentionState:
    query, key, value, bias, is_causal, scale = scene
    hiding = torch.zeros(chosen.shape, dtype=torch.float32, device=chosen.device)
    hiding = hiding.masked_fill(~chosen, -math.inf)
    if bias is None or bias.shape[2] == 1:
        row = hiding[:, :, None] if bias is None else bias + hiding[:, :, None]
        return attend(query, key, value, bias=row, is_causal=is_causal, scale=scale)
    if hiding.shape[1] > 1:
        key, value = (tensor.repeat_interleave(scene.shared, 1) for tensor in (key, value))
    return attend(query, key, value, bias=bias, key_bias=hiding, is_causal=is_causal, scale=scale)


def _gathered(scene: _Scene, chosen: Tensor, members: int) -> AttentionState:
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


def _remainder(
    scene: _Scene, chosen: Tensor, whole: AttentionState, parts: Sequence[AttentionState]
) -> AttentionState:
    """What the parts leave of the whole, by subtraction where that keeps its digits."""
    unseen = whole.lse == -math.inf
    level = whole.lse.masked_fill(unseen, 0.0)
    rest = torch.ones_like(level)
    output = whole.output.to(level.dtype)
    for part in parts:
        share = torch.exp(part.lse - level)
        rest = rest - share
        output = output - share[..., None] * part.output
    known = rest >= LEAST_REST.get(scene.query.dtype, LEAST_REST_HALF)
    safe = rest.where(known, torch.ones_like(rest))
    output = torch.where((known & ~unseen)[..., None], output / safe[..., None], 0.0)
    lse = (whole.lse + safe.log()).masked_fill(~known, -math.inf)
    state = AttentionState(output.to(whole.output.dtype), lse)
    again = ~known & ~unseen
    return _computed_again(scene, chosen, state, again) if bool(again.any()) else state


def _computed_again(
    scene: _Scene, chosen: Tensor, state: AttentionState, again: Tensor
) -> AttentionState:
    """The state with some of its rows from the chosen keys themselves, a few rows at a time."""
    query, key, value, bias, is_causal, scale = scene
    output, lse = state.output.clone(), state.lse.clone()
    keys = key.shape[2]
    hiding = torch.zeros(chosen.shape, dtype=lse.dtype, device=chosen.device)
    hiding = hiding.masked_fill(~chosen, -math.inf).expand(*query.shape[:2], keys)
    bias = None if bias is None else bias.expand(*query.shape[:3], keys)
    step = max(1, CHUNK_BYTES // (4 * max(keys, 1)))
    for item, head in again.any(-1).nonzero().tolist():
        kv = head // scene.shared
        for rows in again[item, head].nonzero().squeeze(-1).split(step):
            own = hiding[item, head].expand(len(rows), -1)
            if bias is not None:
                own = own + bias[item, head, rows]
            if is_causal:
                later = torch.arange(keys, device=query.device) > rows[:, None]
                own = own.masked_fill(later, -math.inf)
            found = attend(
                query[None, item : item + 1, head, rows],
                key[item : item + 1, kv : kv + 1],
                value[item : item + 1, kv : kv + 1],
                bias=own[None, None],
                scale=scale,
            )
            output[item, head, rows] = found.output[0, 0]
            lse[item, head, rows] = found.lse[0, 0]
    return AttentionState(output, lse)
