"""The plans of Combiner on a grid of rows and columns.

Tensors of a grid are kept as `[batch * heads, rows, columns, dim]`, or with rows and columns
exchanged, so that the attention of all rows, or of all columns, is one call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attending.core.state import AttentionState, attention_state, merge
from attending.nn._combiner_regions import (
    SMALL,
    Call,
    Summaries,
    before,
    hide,
    joint_softmax,
    running_summaries,
    scaled,
)
from attending.nn.combiner_plans import AxialPlan
from attending.nn.partition_tree import Pooling

Project = Callable[[Tensor], Tensor]


class _Grid(NamedTuple):
    """A call on the grid, by rows; `turned` is by columns."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    scale: float
    pool: Pooling

    def turned(self) -> "_Grid":
        query, key, value = (_turn(tensor) for tensor in (self.query, self.key, self.value))
        return self._replace(query=query, key=key, value=value, visible=self.visible.mT)

    def flipped(self) -> "_Grid":
        query, key, value = (tensor.flip(2) for tensor in (self.query, self.key, self.value))
        return self._replace(query=query, key=key, value=value, visible=self.visible.flip(2))

    def attend(self, mask: Tensor | None) -> AttentionState:
        """Attention within each row, of what the mask `[columns, columns]` lets through."""
        visible = self.visible[:, :, None, :]
        if mask is None and not bool(visible.all()):
            mask = visible
        elif mask is not None:
            mask = mask & visible
        return attention_state(self.query, self.key, self.value, mask, scale=self.scale)

    def attend_to(self, regions: Summaries, mask: Tensor) -> AttentionState:
        """Attention of each row to regions of its own, `[..., rows, regions, dim]`."""
        seen = mask & regions.filled[:, :, None, :]
        return attention_state(self.query, regions.key, regions.value, seen, scale=self.scale)


def axial_output(call: Call, plan: AxialPlan, project: Project | None = None) -> Tensor:
    """Attention by `AxialPlan`.

    Args:
        call: on the sequence.
        plan: the plan.
        project: for `row_key="proj"`, from the means `[batch, heads, tokens, dim]` to keys.
    """
    batch, heads, tokens, _ = call.query.shape
    columns = min(plan.columns, tokens)
    rows = -(-tokens // columns)
    rest = rows * columns - tokens

    def fold(tensor: Tensor) -> Tensor:
        padded = pad(tensor, (0, 0, 0, rest)) if rest else tensor
        return padded.reshape(batch * heads, rows, columns, -1)

    visible = call.visible
    if visible is None:
        visible = call.query.new_ones(batch, tokens, dtype=torch.bool)
    visible = pad(visible, (0, rest)).view(batch, 1, rows, columns)
    visible = visible.expand(-1, heads, -1, -1).reshape(batch * heads, rows, columns)
    grid = _Grid(fold(call.query), fold(call.key), fold(call.value), visible, call.scale, call.pool)

    def flat(grid_output: Tensor) -> Tensor:
        return grid_output.reshape(batch, heads, rows * columns, -1)

    if plan.kind == "rowmajor":

        def keys(means: Tensor) -> Tensor:
            assert project is not None  # combiner_attention has refused it
            return project(flat(means)).reshape(batch * heads, rows, columns, -1)

        return flat(_rowmajor(grid, plan, call.is_causal, keys))[:, :, :tokens]
    direct = _row_and_column(grid, call.is_causal)
    parts: list[AttentionState] = []
    if plan.kind in ("vertical", "mixture"):
        parts.append(merge(*_vertical(grid, call.is_causal)))
    if plan.kind in ("horizontal", "mixture"):
        parts.append(merge(*_horizontal(grid, call.is_causal, plan.split)))
    if plan.kind == "mixture" and plan.mixture == "average":
        output = sum(merge(direct, part).output for part in parts) / 2
        assert isinstance(output, Tensor)
    else:
        output = merge(direct, *parts).output
    return flat(output)[:, :, :tokens]


def _square(size: int, like: Tensor) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=like.device)


def _turn(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


def _turn_state(state: AttentionState) -> AttentionState:
    return AttentionState(_turn(state.output), state.lse.mT)


def _others(size: int, like: Tensor, is_causal: bool) -> Tensor:
    """Which other rows (or columns) a query sees: those before, or all but its own."""
    square = _square(size, like)
    return square.tril(-1) if is_causal else square ^ square.tril().triu()


def _row_and_column(grid: _Grid, is_causal: bool) -> AttentionState:
    rows, columns = grid.visible.shape[1:]
    row = grid.attend(_square(columns, grid.query).tril() if is_causal else None)
    column = grid.turned().attend(_others(rows, grid.query, is_causal))
    return merge(row, _turn_state(column))


def _vertical(grid: _Grid, is_causal: bool) -> list[AttentionState]:
    """For each other column, what is above the query's row in it, and what is below."""
    columns = grid.turned()
    found = [before(_running(columns))]
    if not is_causal:
        found.append(_flip(before(_running(columns.flipped()))))
    other = _others(grid.visible.shape[2], grid.query, False)
    return [grid.attend_to(_turn_summaries(regions), other) for regions in found]


def _horizontal(grid: _Grid, is_causal: bool, split: bool) -> list[AttentionState]:
    """For each other row, what is left of the query's column in it, and what is right."""
    if split:
        found = [before(_running(grid)), _flip(before(_running(grid.flipped())))]
    else:
        found = [_all_but_one(grid)]
    other = _others(grid.visible.shape[1], grid.query, is_causal)
    turned = grid.turned()
    states = [turned.attend_to(_turn_summaries(regions), other) for regions in found]
    return [_turn_state(state) for state in states]


def _running(grid: _Grid) -> Summaries:
    return running_summaries(grid.query, grid.key, grid.value, grid.visible, grid.scale, grid.pool)


def _flip(regions: Summaries) -> Summaries:
    key, value, filled = regions
    return Summaries(key.flip(2), value.flip(2), filled.flip(2))


def _turn_summaries(regions: Summaries) -> Summaries:
    return Summaries(_turn(regions.key), _turn(regions.value), regions.filled.mT)


def _all_but_one(grid: _Grid) -> Summaries:
    """For each cell the summary of its row without itself."""

    def pooled(features: Tensor) -> Tensor:
        visible = grid.visible[..., None]
        if grid.pool == "mean":
            hidden = features.masked_fill(~visible, 0.0)
            count = visible.sum(2, keepdim=True) - visible.long()
            return (hidden.sum(2, keepdim=True) - hidden) / count.clamp_min(1)
        hidden = features.masked_fill(~visible, -torch.inf)
        lowest = torch.full_like(hidden[:, :, :1], -torch.inf)
        left = torch.cat([lowest, hidden.cummax(2).values[:, :, :-1]], 2)
        right = torch.cat([hidden.flip(2).cummax(2).values.flip(2)[:, :, 1:], lowest], 2)
        highest = torch.maximum(left, right)
        return highest.masked_fill(highest == -torch.inf, 0.0)

    other = _others(grid.visible.shape[2], grid.query, False)
    inside = grid._replace(query=pooled(grid.query)).attend(other)
    filled = grid.visible.sum(2, keepdim=True) > grid.visible.long()
    return Summaries(pooled(grid.key), inside.output, filled)


def _rowmajor(grid: _Grid, plan: AxialPlan, is_causal: bool, project: Project) -> Tensor:
    """Own row, and of each other row its attention as seen from the own column."""
    rows, columns = grid.visible.shape[1:]
    small = rows + columns <= SMALL
    everything = bool(grid.visible.all())
    if small:
        asking = scaled(grid.query, grid.scale)
        near = asking @ grid.key.to(asking.dtype).mT
        near = near if everything else hide(near, grid.visible[:, :, None, :])
        map_of_row = near.softmax(-1).to(grid.value.dtype)
        answers = map_of_row @ grid.value
    else:
        whole = grid.attend(None)
        answers = whole.output
    key = grid.key
    if plan.row_key in ("wsum", "wsum_proj"):
        key = map_of_row @ key if small else grid._replace(value=key).attend(None).output
    if plan.row_key in ("proj", "wsum_proj"):
        key = project(answers if plan.row_key == "proj" else key)
    other = _others(rows, grid.query, is_causal)
    past = _square(columns, grid.query).tril() if is_causal else None
    if not small:
        regions = _turn_summaries(Summaries(key, answers, grid.visible))
        far = _turn_state(grid.turned().attend_to(regions, other))
        return merge(whole if past is None else grid.attend(past), far).output
    across = _turn(asking) @ _turn(key).to(asking.dtype).mT
    if not everything:
        across = hide(across, grid.visible.mT[:, :, None, :])
    direct, share = joint_softmax(
        near if past is None else hide(near, past), _turn(hide(across, other))
    )
    taken = _turn(share.to(answers.dtype)) @ _turn(answers)
    return direct.to(answers.dtype) @ grid.value + _turn(taken)
