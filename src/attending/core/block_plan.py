"""Which blocks of an attention map are kept: the plan that `block_sparse_attention` executes.

A plan cuts the queries into blocks of `block_size[0]` and the keys into blocks of `block_size[1]`
and says of each pair of blocks whether it is looked at. It knows lengths and booleans and no
numbers of a model, so it may be made once and used for many layers, steps and batches.

    plan = BlockPlan.from_block_mask(mask, block_size=(128, 128), query_length=n, key_length=n)
    plan = BlockPlan.from_scores(scores, top_p=0.95, block_size=128, query_length=n, key_length=n)
    plan = BlockPlan.from_rule(lambda q, k: (q - k).abs() <= 2, block_size=64, query_length=n, ...)
    plan | other, plan & other, plan.density, print(plan.picture())
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BlockSize = int | tuple[int, int]


class RowGroup(NamedTuple):
    """Rows of blocks that keep equally many blocks, so that one call of a kernel serves them.

    Attributes:
        rows: which, counted through `[batch, heads, query blocks]`.
        blocks: the key blocks that each keeps, ascending.
        ragged: whether the last of them is a last block that is shorter than the others.
    """

    rows: Int[Tensor, " rows"]
    blocks: Int[Tensor, "rows kept"]
    ragged: bool


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The blocks of an attention map that are kept.

    Attributes:
        block_mask: True = kept. Batch and heads of 1 stand for all.
        block_size: queries and keys in a block; the last blocks may be shorter.
        query_length, key_length: tokens.
        causal_offset: None, or within kept blocks query i sees keys 0..i + causal_offset only: 0
            for self-attention, `key_length - query_length` where the queries are the last tokens.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    block_mask: Bool[Tensor, "batch heads query_blocks key_blocks"]
    block_size: tuple[int, int]
    query_length: int
    key_length: int
    causal_offset: int | None = None

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.block_size):
            raise ValueError(f"block_size: expected sizes of at least 1, got {self.block_size}.")
        expected = _blocks(self.block_size, self.query_length, self.key_length)
        mask = self.block_mask
        if mask.dtype != torch.bool or mask.dim() != 4 or tuple(mask.shape[2:]) != expected:
            raise ValueError(
                "block_mask: expected booleans [batch, heads, query blocks, key blocks] with "
                f"{expected[0]} x {expected[1]} blocks of {self.block_size} for "
                f"{self.query_length} queries and {self.key_length} keys, got {mask.dtype} "
                f"{list(mask.shape)}."
            )

    @classmethod
    def from_block_mask(
        cls,
        block_mask: Bool[Tensor, "*batch_heads query_blocks key_blocks"],
        *,
        block_size: BlockSize,
        query_length: int,
        key_length: int,
        is_causal: bool = False,
    ) -> "BlockPlan":
        """A plan from a mask of blocks; batch and heads may be left out.

        Args:
            block_mask: True = kept.
            block_size: of both, or of queries and of keys.
            query_length, key_length: tokens.
            is_causal: also hide later keys; the last query sees all, as where the queries are the
                last tokens of the sequence.
        """
        if not isinstance(block_mask, Tensor) or not 2 <= block_mask.dim() <= 4:
            got = list(block_mask.shape) if isinstance(block_mask, Tensor) else block_mask
            raise ValueError(
                f"block_mask: expected [batch, heads, query blocks, key blocks], got {got}."
            )
        mask = block_mask.reshape((1,) * (4 - block_mask.dim()) + tuple(block_mask.shape))
        offset = key_length - query_length if is_causal else None
        return cls(mask, _pair(block_size), query_length, key_length, offset)

    @classmethod
    def from_scores(
        cls,
        scores: Float[Tensor, "*batch_heads query_blocks key_blocks"],
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        threshold: float | None = None,
        block_size: BlockSize,
        query_length: int,
        key_length: int,
        is_causal: bool = False,
    ) -> "BlockPlan":
        """For each row of blocks those with the highest scores, by one of three rules.

        Under `is_causal` blocks that lie in the future as a whole are left out before the rule.

        Args:
            scores: how much each block matters; -inf is never kept.
            top_k: keep so many blocks of a row; the first of equal ones.
            top_p: keep the fewest blocks that together have this share of the row's sum. The
                scores are then shares, not negative, such as probabilities.
            threshold: keep the blocks that score at least this.
            block_size, query_length, key_length, is_causal: as in `from_block_mask`.

        Raises:
            ValueError: unless exactly one rule is given, and in its range.
        """
        rules = {"top_k": top_k, "top_p": top_p, "threshold": threshold}
        given = [name for name, value in rules.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"top_k, top_p, threshold: expected exactly one of them, got {given or 'none'}."
            )
        size = _pair(block_size)
        able = scores > -torch.inf
        if is_causal:
            offset = key_length - query_length
            able = able & (_reach(size, query_length, key_length, offset, scores.device) != 0)
        scores = scores.masked_fill(~able, -torch.inf)
        if threshold is not None:
            mask = scores >= threshold
        elif top_k is not None:
            if top_k < 1:
                raise ValueError(f"top_k: expected at least 1, got {top_k}.")
            order = scores.argsort(dim=-1, descending=True, stable=True)
            mask = torch.zeros_like(able).scatter(-1, order[..., :top_k], True)
        else:
            mask = _smallest_share(scores.masked_fill(~able, 0.0), float(top_p or 0.0))
        return cls.from_block_mask(
            mask & able,
            block_size=size,
            query_length=query_length,
            key_length=key_length,
            is_causal=is_causal,
        )

    @classmethod
    def from_rule(
        cls,
        rule: Callable[[Int[Tensor, "query_blocks 1"], Int[Tensor, " key_blocks"]], Tensor],
        *,
        block_size: BlockSize,
        query_length: int,
        key_length: int,
        is_causal: bool = False,
        device: torch.device | str | None = None,
    ) -> "BlockPlan":
        """Ask a function of the numbers of the blocks, `rule(query_block, key_block) -> bool`.

        It is called once, with all numbers, as tensors that broadcast against each other.
        """
        size = _pair(block_size)
        queries, keys = _blocks(size, query_length, key_length)
        found = rule(
            torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
        )
        return cls.from_block_mask(
            found.bool().expand(*found.shape[:-2], queries, keys),
            block_size=size,
            query_length=query_length,
            key_length=key_length,
            is_causal=is_causal,
        )

    @classmethod
    def from_mask(
        cls,
        attn_mask: Bool[Tensor, "*batch_heads queries keys"],
        *,
        block_size: BlockSize,
    ) -> "BlockPlan":
        """The blocks in which a mask of tokens shows anything.

        Pass the mask on as `bias` too, if it hides more than whole blocks.
        """
        size = _pair(block_size)
        queries, keys = attn_mask.shape[-2:]
        blocks = _blocks(size, queries, keys)
        room = (0, blocks[1] * size[1] - keys, 0, blocks[0] * size[0] - queries)
        padded = torch.nn.functional.pad(attn_mask, room)
        cells = padded.unflatten(-1, (blocks[1], size[1])).unflatten(-3, (blocks[0], size[0]))
        return cls.from_block_mask(
            cells.any(-1).any(-2), block_size=size, query_length=queries, key_length=keys
        )

    def __or__(self, other: "BlockPlan") -> "BlockPlan":
        """The blocks that either plan keeps."""
        return replace(self, block_mask=self.block_mask | self._fitting(other))

    def __and__(self, other: "BlockPlan") -> "BlockPlan":
        """The blocks that both plans keep."""
        return replace(self, block_mask=self.block_mask & self._fitting(other))

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Kept blocks and all blocks; under a causal offset of those not in the future."""
        able = self._reach != 0
        total = int(able.sum()) * self.block_mask.shape[0] * self.block_mask.shape[1]
        return int((self.block_mask & able).sum()), total

    @property
    def density(self) -> float:
        """Kept blocks over all blocks; under a causal offset over those not in the future."""
        kept, total = self.counts
        return kept / max(total, 1)

    @cached_property
    def is_dense(self) -> bool:
        """Whether every block is kept that is not in the future."""
        return bool((self.block_mask | (self._reach == 0)).all())

    def visible(self) -> Bool[Tensor, "batch heads queries keys"]:
        """The plan as a mask of tokens, of their product's size: for looking and for tests."""
        (queries, keys), device = self.block_size, self.block_mask.device
        mask = self.block_mask.repeat_interleave(queries, 2).repeat_interleave(keys, 3)
        mask = mask[:, :, : self.query_length, : self.key_length]
        if self.causal_offset is None:
            return mask
        row = torch.arange(self.query_length, device=device)[:, None] + self.causal_offset
        return mask & (torch.arange(self.key_length, device=device) <= row)

    def picture(self, batch: int = 0, head: int = 0) -> str:
        """The map of one head, a line for each row of blocks: # kept, + cut by the diagonal."""
        mask = self.block_mask[batch, head].long() * self._reach.long()
        return "\n".join("".join(".+#"[cell] for cell in row) for row in mask.tolist())

    def __repr__(self) -> str:
        batch, heads, queries, keys = self.block_mask.shape
        causal = "" if self.causal_offset is None else f", causal_offset={self.causal_offset}"
        return (
            f"BlockPlan({batch} x {heads} heads, {queries} x {keys} blocks of {self.block_size}, "
            f"{self.query_length} queries, {self.key_length} keys, density {self.density:.3f}"
            f"{causal})"
        )

    @cached_property
    def _reach(self) -> Int[Tensor, "query_blocks key_blocks"]:
        """Of each block 2 where all its pairs may be seen, 1 where some, 0 where none."""
        return _reach(
            self.block_size,
            self.query_length,
            self.key_length,
            self.causal_offset,
            self.block_mask.device,
        )

    def groups(self, batch: int, heads: int) -> tuple[list[RowGroup], list[RowGroup]]:
        """The rows of blocks, grouped: first with their whole blocks, then with those that are cut.

        Computed once for each `(batch, heads)`.
        """
        known: dict[tuple[int, int], tuple[list[RowGroup], list[RowGroup]]]
        known = self.__dict__.setdefault("_groups", {})
        if (batch, heads) not in known:
            whole, cut = (one.expand(batch, heads, -1, -1) for one in self.whole_and_cut)
            ragged = self.key_length % self.block_size[1] != 0
            known[batch, heads] = _grouped(whole, ragged), _grouped(cut, ragged)
        return known[batch, heads]

    @cached_property
    def whole_and_cut(self) -> tuple[Tensor, Tensor]:
        """The kept blocks, as masks of blocks: those seen as a whole, and those seen in part."""
        return self.block_mask & (self._reach == 2), self.block_mask & (self._reach == 1)

    def _fitting(self, other: "BlockPlan") -> Tensor:
        mine = self.block_size, self.query_length, self.key_length, self.causal_offset
        theirs = other.block_size, other.query_length, other.key_length, other.causal_offset
        if mine != theirs:
            raise ValueError(
                "plan: expected two plans of one block_size, query_length, key_length and "
                f"causal_offset, got {mine} and {theirs}."
            )
        return other.block_mask


def _pair(block_size: BlockSize) -> tuple[int, int]:
    return (block_size, block_size) if isinstance(block_size, int) else block_size


def _blocks(block_size: tuple[int, int], queries: int, keys: int) -> tuple[int, int]:
    return -(-queries // block_size[0]), -(-keys // block_size[1])


def _reach(
    block_size: tuple[int, int],
    query_length: int,
    key_length: int,
    offset: int | None,
    device: torch.device,
) -> Tensor:
    queries, keys = _blocks(block_size, query_length, key_length)
    if offset is None:
        return torch.full((queries, keys), 2, device=device)
    first = torch.arange(queries, device=device)[:, None] * block_size[0]
    last = (first + block_size[0]).clamp_max(query_length) - 1
    start = torch.arange(keys, device=device) * block_size[1]
    end = (start + block_size[1]).clamp_max(key_length) - 1
    return (start <= last + offset).long() + (end <= first + offset).long()


def _smallest_share(scores: Tensor, top_p: float) -> Tensor:
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a share, 0 < top_p <= 1, got {top_p}.")
    if bool((scores < 0).any()):
        raise ValueError(
            "scores: expected shares that are not negative with top_p, such as probabilities, got "
            f"{float(scores.min())}."
        )
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    wanted = before < top_p * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(wanted).scatter(-1, order, wanted)


def _grouped(mask: Tensor, has_ragged: bool) -> list[RowGroup]:
    """The rows of a mask of blocks by how many they keep and whether the last one is short."""
    flat = mask.flatten(0, 2)
    counts = flat.sum(-1)
    order = flat.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    ragged = flat[:, -1] if has_ragged else torch.zeros_like(counts, dtype=torch.bool)
    kinds = counts * 2 + ragged
    groups = []
    for kind in kinds[counts > 0].unique().tolist():
        rows = (kinds == kind).nonzero().squeeze(-1)
        groups.append(RowGroup(rows, order[rows, : kind // 2], bool(kind % 2)))
    return groups
