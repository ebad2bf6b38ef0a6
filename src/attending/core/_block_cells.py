"""Query, key and value in blocks, and gathered for the kernel a few rows of blocks at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attending.core.block_plan import BlockPlan, RowGroup

GATHER_BYTES = 2**21  # of keys and values gathered for one call of the kernel
# The share of key blocks from which it is quicker to show a row all keys, and hide some of them by
# a mask with one row, than to gather those it keeps. A mask of one row costs the kernel 3 %, and
# gathering costs more for each query the fewer there are in a block.
MASKED_SHARE = 0.72  # for blocks of 128 queries
MASKED_SHARE_STEP = 0.1  # less for each halving of them
MASKED_BYTES = 2**22  # of a head's keys and values: more do not stay in the cache from row to row


class Part(NamedTuple):
    """One call of the kernel."""

    rows: Tensor  # of blocks, counted through batch, heads and query blocks
    blocks: Tensor  # [rows, kept]
    places: Tensor  # of those among all key blocks, counted through batch, kv heads and key blocks
    key: Tensor  # [rows, 1, kept keys, dim]
    value: Tensor
    bias: Tensor | None
    is_causal: bool
    is_cut: bool  # these blocks come second: the rows may have a state already


@dataclass(frozen=True, eq=False)
class Cells:
    """Query, key and value cut into blocks, and how to gather them."""

    plan: BlockPlan
    query: Tensor  # [batch * heads * query blocks, block, dim]
    key: Tensor  # [batch * kv_heads * key blocks, block, dim]
    value: Tensor
    real: Tensor  # [batch * heads * query blocks, block]: False where a last block was filled up
    bias: Tensor | None
    scale: float
    batch: int
    heads: int
    kv_heads: int

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        bias: Tensor | None,
        scale: float,
    ) -> "Cells":
        batch, heads, queries, _ = query.shape
        row = torch.arange(plan.block_mask.shape[2] * plan.block_size[0], device=query.device)
        real = (row < queries).view(-1, plan.block_size[0]).repeat(batch * heads, 1)
        return cls(
            plan,
            cut_in_blocks(query, plan.block_size[0]),
            cut_in_blocks(key, plan.block_size[1]),
            cut_in_blocks(value, plan.block_size[1]),
            real,
            bias,
            scale,
            batch,
            heads,
            key.shape[1],
        )

    @property
    def count(self) -> int:
        return self.query.shape[0]

    @property
    def unseen(self) -> Tensor:
        """The rows of blocks that see no block as a whole."""
        whole, _ = self.plan.whole_and_cut
        return ~whole.any(-1).expand(self.batch, self.heads, -1).flatten()

    def queries(self, tensor: Tensor) -> Tensor:
        """Something that there is for each query, in blocks."""
        return cut_in_blocks(tensor, self.plan.block_size[0])

    def whole(self, blocks: Tensor) -> Tensor:
        """The way back."""
        cells = blocks.view(self.batch, self.heads, -1, blocks.shape[-1])
        return cells[:, :, : self.plan.query_length]

    def parts(self, may_mask: bool = False) -> Iterator[Part]:
        """What the kernel is called on, whole blocks first; each is gone when the next is asked.

        Args:
            may_mask: whether rows that keep most keys may come with all of them and a mask. That is
                quicker forward; backward it makes gradients of keys that have none.
        """
        whole, cut = self.plan.groups(self.batch, self.heads)
        masked = []
        for group in whole:
            if may_mask and self._masks(group):
                masked.append(group.rows)
            else:
                yield from self._gathered(group, False)
        if masked:
            yield from self._masked(torch.cat(masked).sort().values)
        for group in cut:
            yield from self._gathered(group, True)

    def _masks(self, group: RowGroup) -> bool:
        wide = self.bias is None or self.bias.shape[2] == 1
        width = self.key.shape[-1] + self.value.shape[-1]
        if self.plan.key_length * width * self.key.element_size() > MASKED_BYTES:
            return False
        share = MASKED_SHARE + MASKED_SHARE_STEP * math.log2(self.plan.block_size[0] / 128)
        return wide and group.blocks.shape[1] >= share * self._key_blocks

    def _masked(self, rows: Tensor) -> Iterator[Part]:
        """Rows that see all keys of their head as they lie, but for those that a mask hides."""
        width, length = self.plan.block_size[1], self.plan.key_length
        whole, _ = self.plan.whole_and_cut
        whole = whole.expand(self.batch, self.heads, -1, -1).flatten(0, 2)
        sequence, kv_head = self._home(rows)
        homes, counts = (sequence * self.kv_heads + kv_head).unique_consecutive(return_counts=True)
        every = torch.arange(self._key_blocks, device=rows.device)
        for home, some in zip(homes.tolist(), rows.split(counts.tolist()), strict=True):
            blocks, places = every.expand(len(some), -1), home * self._key_blocks + every
            key, value = (
                one.unflatten(0, (-1, self._key_blocks))[home].flatten(0, 1)[:length]
                for one in (self.key, self.value)
            )
            shown = whole[some].repeat_interleave(width, 1)[:, None, None, :length]
            bias = torch.zeros(shown.shape, dtype=torch.float32, device=rows.device)
            bias = bias.masked_fill(~shown, -math.inf)
            if self.bias is not None:
                bias = bias + self._bias_of_user(self.bias, some, blocks)[..., :length]
            yield Part(
                some,
                blocks,
                places.expand(len(some), -1),
                key.expand(len(some), 1, -1, -1),
                value.expand(len(some), 1, -1, -1),
                bias,
                False,
                False,
            )

    def _gathered(self, group: RowGroup, is_cut: bool) -> Iterator[Part]:
        size, kept = self.plan.block_size[1], group.blocks.shape[1]
        step, length = self._step(kept), kept * size
        if group.ragged:
            length += self.plan.key_length % size - size
        sequence, kv_head = self._home(group.rows)
        places = (sequence * self.kv_heads + kv_head)[:, None] * self._key_blocks + group.blocks
        parts = (group.rows.split(step), group.blocks.split(step), places.split(step))
        for rows, blocks, index in zip(*parts, strict=True):
            key, value = (
                torch.index_select(one, 0, index.flatten(), out=into[: len(rows) * kept]).view(
                    len(rows), 1, kept * size, one.shape[-1]
                )
                for one, into in zip((self.key, self.value), self._room, strict=True)
            )
            bias, is_causal = self._bias(rows, blocks, is_cut)
            yield Part(
                rows,
                blocks,
                index,
                key[:, :, :length],
                value[:, :, :length],
                None if bias is None else bias[..., :length],
                is_causal,
                is_cut,
            )

    def _step(self, kept: int) -> int:
        """How many rows that keep so many blocks are gathered at a time."""
        width = self.key.shape[-1] + self.value.shape[-1]
        return max(1, GATHER_BYTES // (kept * self.plan.block_size[1] * width * 4))

    @cached_property
    def _room(self) -> list[Tensor]:
        """One place for all that is gathered: it stays in the cache, and is paged in once."""
        groups = [group for kind in self.plan.groups(self.batch, self.heads) for group in kind]
        kept = [group.blocks.shape[1] for group in groups]
        most = max(
            min(self._step(count), len(group.rows)) * count
            for count, group in zip(kept, groups, strict=True)
        )
        return [one.new_empty(most, *one.shape[1:]) for one in (self.key, self.value)]

    @property
    def _key_blocks(self) -> int:
        return self.plan.block_mask.shape[3]

    def _home(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row of blocks which sequence of the batch it is in, and which key head."""
        head = rows // self.plan.block_mask.shape[2]
        return head // self.heads, head % self.heads // (self.heads // self.kv_heads)

    def _bias(self, rows: Tensor, blocks: Tensor, is_cut: bool) -> tuple[Tensor | None, bool]:
        """What is added to the scores `[rows, 1, queries, kept keys]`; or that they are causal."""
        found = None if self.bias is None else self._bias_of_user(self.bias, rows, blocks)
        if not is_cut:
            return found, False
        height, width = self.plan.block_size
        offset = self.plan.causal_offset or 0
        first = (rows % self.plan.block_mask.shape[2]) * height + offset
        lead = first[:, None] - blocks * width  # how many keys of a block its first query sees, - 1
        if found is None and blocks.shape[1] == 1 and height == width and not bool(lead.any()):
            return None, True
        row, column = (torch.arange(n, device=rows.device) for n in (height, width))
        hidden = column > lead[:, :, None, None] + row[:, None]  # [rows, kept, queries, keys]
        future = torch.zeros(hidden.shape, dtype=torch.float32, device=rows.device)
        future = future.masked_fill(hidden, -math.inf).transpose(1, 2).flatten(2)[:, None]
        return future if found is None else found + future, False

    def _bias_of_user(self, bias: Tensor, rows: Tensor, blocks: Tensor) -> Tensor:
        height, width = self.plan.block_size
        head = rows // self.plan.block_mask.shape[2]
        item = head // self.heads * (bias.shape[0] > 1)
        head = head % self.heads * (bias.shape[1] > 1)
        keys = blocks.shape[1] * width
        column = blocks[:, :, None] * width + torch.arange(width, device=rows.device)
        column = column.clamp_max(self.plan.key_length - 1).view(len(rows), 1, keys)
        if bias.shape[3] == 1:
            column = torch.zeros_like(column)
        row = rows.new_zeros(len(rows), 1, 1)
        if bias.shape[2] > 1:
            first = (rows % self.plan.block_mask.shape[2])[:, None] * height
            row = (first + torch.arange(height, device=rows.device))[..., None]
            row = row.clamp_max(self.plan.query_length - 1)
        return bias[item[:, None, None], head[:, None, None], row, column][:, None]


def cut_in_blocks(tensor: Tensor, size: int) -> Tensor:
    """`[batch, heads, tokens, dim]` in blocks, `[batch * heads * blocks, size, dim]`."""
    filled: Tensor = pad(tensor, (0, 0, 0, -tensor.shape[2] % size))
    blocks: Tensor = filled.unflatten(2, (filled.shape[2] // size, size)).flatten(0, 2)
    return blocks
