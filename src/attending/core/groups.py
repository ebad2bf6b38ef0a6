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
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core._key_groups import (
    Scene,
    dense_states,
    is_small,
    mixed_output,
    part_state,
    rest_of,
    rest_state,
)
from attending.core._key_groups import member_indices as member_indices
from attending.core.bias import HIDDEN, BiasedPair, add_low_rank_bias
from attending.core.check import check_arguments
from attending.core.precision import full_precision
from attending.core.state import AttentionState, attend

Groups = Int[Tensor, "#batch group_heads keys"] | Bool[Tensor, "#batch group_heads keys"]
Masses = Float[Tensor, "groups batch heads queries"]


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
    scene = Scene(query, key, value, arguments.bias, is_causal, arguments.scale)
    labels, count = check_groups(groups, scene.query, scene.key, num_groups)
    if whole is not None:
        _check_whole(whole, scene)
    if is_small(scene):
        return dense_states(scene, labels, count)
    parts = [part_state(scene, labels == group) for group in range(1, count)]
    if whole is None:
        return (part_state(scene, labels == 0), *parts)
    return (rest_state(scene, labels == 0, whole, parts), *parts)


def group_masses(states: Sequence[AttentionState]) -> Masses:
    """The share of each row's probability that each group holds, `exp(lse_g - lse)`.

    The shares of a row sum to 1; those of a row that sees no key are 0.
    """
    return _shares(torch.stack([state.lse for state in states]))


def _shares(lses: Tensor) -> Tensor:
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


class EditedAttention(NamedTuple):
    """Attention whose groups have other masses.

    Attributes:
        output: after the edit.
        masses, new_masses: of the groups, before and after.
    """

    output: Float[Tensor, "batch heads queries value_dim"]
    masses: Masses
    new_masses: Masses


@full_precision
def attention_with_masses(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    groups: Groups,
    change: Callable[[Masses], Masses],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    num_groups: int | None = None,
    whole: AttentionState | None = None,
) -> EditedAttention:
    """`group_states`, other masses, and `mix` in one, with the state of the rest never formed.

    Group 0, the rest, is what the others leave of the whole, so its output need not be computed:
    the edited output is a sum of that of the whole and those of the small groups.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in `attention_state`.
        groups, num_groups, whole: as in `group_states`; the whole is computed if it is not given.
        change: gets the masses of the groups and returns new ones, such as `move_mass`.
    """
    arguments = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    scene = Scene(query, key, value, arguments.bias, is_causal, arguments.scale)
    labels, count = check_groups(groups, query, key, num_groups)
    if whole is not None:
        _check_whole(whole, scene)
    if is_small(scene):
        states = dense_states(scene, labels, count)
        masses = group_masses(states)
        new_masses = change(masses)
        return EditedAttention(mix(states, new_masses), masses, new_masses)
    if whole is None:
        whole = attend(query, key, value, bias=scene.bias, is_causal=is_causal, scale=scene.scale)
    parts = [part_state(scene, labels == group) for group in range(1, count)]
    rest = rest_of(scene, labels == 0, whole, parts)
    lses = torch.stack([rest.lse, *(part.lse for part in parts)])
    masses = _shares(lses)
    new_masses = change(masses)
    output = mixed_output(whole, parts, rest, masses, new_masses)
    return EditedAttention(output.to(query.dtype), masses, new_masses)


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


def _check_whole(whole: AttentionState, scene: Scene) -> None:
    expected = (*scene.query.shape[:3], scene.value.shape[-1])
    if whole.output.shape != expected or whole.lse.shape != expected[:3]:
        raise ValueError(
            f"whole: expected the attention_state of the same arguments, output {list(expected)}, "
            f"got {list(whole.output.shape)} and lse {list(whole.lse.shape)}."
        )
