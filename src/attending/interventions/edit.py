"""Change the masses of groups of keys in an attention call of a running model."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from attending.core.groups import (
    Groups,
    Masses,
    attention_with_masses,
    check_groups,
    group_masses,
    group_states,
    reweighted_pair,
)
from attending.core.masks import visible_entries
from attending.core.state import AttentionState, attention_state
from attending.interventions.intervention import Run
from attending.taps import AttentionCall, Proceed

Change = Callable[[Masses], Masses]
"""New masses from the old ones; rows sum to 1 before and after."""


def edit_masses(
    call: AttentionCall,
    proceed: Proceed,
    groups: Groups,
    change: Change,
    *,
    run: Run,
    num_groups: int | None = None,
    whole: AttentionState | None = None,
) -> Tensor:
    """The output of a call in which groups of keys have other masses. For a handler to return.

        def damp(call, proceed):                        # first key of every head to a half
            groups = torch.zeros(1, 1, call.key_length, dtype=torch.long)
            groups[..., 0] = 1
            return edit_masses(call, proceed, groups, halve, run=run, num_groups=2)

    Exact, and no map is stored. Heads in which all keys are in group 0 are left alone, and so are
    rows of which `change` leaves the masses. If another handler comes after this one, it is handed
    a call whose plain attention is the edited one (query and key have some more columns then, and
    the value zeros to match), so edits compose: the inner one edits the edited map, and a tap
    inside sees it.

    Args:
        call, proceed: what the handler was called with.
        groups: the group of each key; group 0 is the rest. See `group_states`.
        change: gets the masses `[groups, batch, heads, queries]` of the heads that have other
            groups than 0, and returns new ones, such as `move_mass`.
        run: counts what was changed.
        num_groups: how many groups there are; the largest label + 1 by default.
        whole: the `attention_state` of the call, if you have it already.

    Raises:
        ValueError: if the call drops attention weights, or the arguments do not fit it.
    """
    if call.dropout_p:
        raise ValueError(
            f"model: expected no dropout on attention weights, got {call.dropout_p} in {call!r}. "
            "Call model.eval() first."
        )
    labels, count = check_groups(groups, call.query, call.key, num_groups)
    heads = (labels > 0).any(-1).any(0).expand(call.num_heads).nonzero().squeeze(-1)
    if len(heads) == 0:
        run.left(call, "no key was in a group to edit")
        return unchanged(call, proceed, whole)
    alone = call.inner == 0
    some = call if len(heads) == call.num_heads else _of_heads(call, heads)
    labels = labels if labels.shape[1] == 1 else labels[:, heads]
    mask = hiding(call.attn_mask)
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, heads]
    part = whole
    if whole is not None and some is not call:
        part = AttentionState(whole.output[:, heads], whole.lse[:, heads])
    if alone:
        output, masses, new_masses = attention_with_masses(
            some.query,
            some.key,
            some.value,
            labels,
            change,
            mask,
            some.is_causal,
            some.softmax_scale,
            some.enable_gqa,
            num_groups=count,
            whole=part,
        )
    else:
        states = group_states(
            some.query,
            some.key,
            some.value,
            labels,
            mask,
            some.is_causal,
            some.softmax_scale,
            some.enable_gqa,
            num_groups=count,
            whole=part,
        )
        masses = group_masses(states)
        new_masses = change(masses)
    rows = int((masses != new_masses).any(0).sum())
    if rows == 0:
        run.left(call, "no row had mass to move")
        return unchanged(call, proceed, whole)
    run.edited(call, heads.tolist(), rows)
    if not alone:
        return pass_on(call, proceed, heads, labels, masses, new_masses)
    if some is call:
        return output
    rest = proceed(call) if whole is None else whole.output
    return rest.index_copy(1, heads, output)


def unchanged(call: AttentionCall, proceed: Proceed, whole: AttentionState | None) -> Tensor:
    """The output of a call that is left alone, without computing again what is known."""
    return proceed(call) if whole is None or call.inner else whole.output


def state_of(call: AttentionCall) -> AttentionState:
    """The `attention_state` of a call: its output, and the log of the normaliser of each row."""
    return attention_state(
        call.query,
        call.key,
        call.value,
        hiding(call.attn_mask),
        call.is_causal,
        call.softmax_scale,
        call.enable_gqa,
    )


def hiding(mask: Tensor | None) -> Tensor | None:
    """A mask of 4 dimensions that hides with -inf, where a model hides with the lowest float."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    return (
        mask if mask.dtype == torch.bool else mask.masked_fill(~visible_entries(mask), -torch.inf)
    )


def shown_by_both(mask: Tensor | None, shown: Tensor) -> Tensor:
    """A mask, boolean or a bias, that also hides what the boolean `shown` does not show."""
    if mask is None:
        return shown
    return shown & mask if mask.dtype == torch.bool else mask.masked_fill(~shown, -torch.inf)


def _of_heads(call: AttentionCall, heads: Tensor) -> AttentionCall:
    """The call of some of its heads, each with keys of its own."""
    kv = heads // (call.num_heads // call.key.shape[1])
    return replace(
        call,
        query=call.query[:, heads],
        key=call.key[:, kv],
        value=call.value[:, kv],
        enable_gqa=False,
    )


def pass_on(
    call: AttentionCall,
    proceed: Proceed,
    heads: Tensor,
    labels: Tensor,
    masses: Tensor,
    new_masses: Tensor,
) -> Tensor:
    """Hand a call on as one whose plain attention is the edited one, for the handler after this.

    Args:
        call, proceed: what the handler was called with.
        heads: the heads that are edited, in order.
        labels: the group of each key, `[batch or 1, heads or 1, keys]`, of those heads.
        masses, new_masses: `[groups, batch, heads, queries]`; only their ratio matters.
    """
    batch, all_heads, queries, _ = call.query.shape
    if len(heads) < all_heads:
        shape = (len(masses), batch, all_heads, queries)
        wide = [masses.new_ones(shape).index_copy(2, heads, own) for own in (masses, new_masses)]
        masses, new_masses = wide
        all_labels = labels.new_zeros(len(labels), all_heads, labels.shape[-1])
        labels = all_labels.index_copy(1, heads, labels.expand(-1, len(heads), -1))
    pair = reweighted_pair(call.query, call.key, labels, masses, new_masses, call.softmax_scale)
    value = call.value.to(pair.query.dtype)
    if pair.key.shape[1] != value.shape[1]:
        value = value.repeat_interleave(pair.key.shape[1] // value.shape[1], 1)
    width = pair.query.shape[-1]
    value_dim = value.shape[-1]
    mask = call.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(pair.query.dtype)
    output = proceed(
        replace(
            call,
            query=pair.query,
            key=pair.key,
            value=pad(value, (0, max(0, width - value_dim))),  # fused kernels want one width
            scale=pair.scale,
            attn_mask=mask,
        )
    )
    return output[..., :value_dim].to(call.query.dtype)
