"""PAROAttention: an order of the tokens for each head, and fixed blocks in that order.

    state = paro_attention(query, key, value, plan, layer="blocks.0.attn1", step=7)

A plan is made once, by `attending.sparse.paro_calibration`; `attending.interventions.PAROAttention`
does both with a running model. Nothing is predicted at run time. A call permutes query, key and
value, attends over the blocks of the plan, and permutes the output back.

Source: PAROAttention (Zhao et al., arXiv 2506.16054). This follows the runtime in the authors'
code, with these differences: a step never asks for a mask that the plan does not have (in their own
example the 10 masks are used up after ten of the steps); any number of tokens and any size of block
will do; "empty" heads, which their pipeline computes and does not use, are not here.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from attending.core.state import AttentionState, attention_state
from attending.sparse.axis_order import (
    axis_orders,
    head_token_index,
    inverse_index,
    permute_key_bias,
    permute_tokens,
)
from attending.sparse.quantised_attention import MapGroups, simulate_quantised_attention

Quant = Literal["int8", "int4"]
_BITS: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}
_PLACES = torch.arange(8, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class PAROPlan:
    """The order of every head, and the blocks that it looks at in every part of the sampling.

    Made by `PAROCalibration.plan`, kept with `attending.interventions.save_settings`.

    Attributes:
        grid: tokens along each axis, as (frames, height, width) or (height, width).
        layers: names of the layers, in the order of the tensors' first dimension.
        orders: numbers in `axis_orders(grid)`.
        packed_masks: a bit for each block, row after row, the first in the lowest bit.
        block_size: tokens along each side of a block.
        steps: of the sampling that was watched.
        timestep_bins: equal parts of the sampling; each of the first parts has a mask of its own,
            the rest share the last one.
        text_tokens, text_first: tokens outside the grid, see `axis_order.token_index`.
    """

    grid: tuple[int, ...]
    layers: tuple[str, ...]
    orders: Int[Tensor, "layers heads"]
    packed_masks: UInt8[Tensor, "masks layers heads bytes"]
    block_size: int
    steps: int
    timestep_bins: int
    text_tokens: int = 0
    text_first: bool = True

    def __post_init__(self) -> None:
        axis_orders(self.grid)
        bits = self.blocks**2
        expected = (*self.orders.shape, -(-bits // 8))
        if len(self.layers) != len(self.orders) or self.packed_masks.shape[1:] != expected:
            raise ValueError(
                f"packed_masks: expected [masks, {len(self.layers)} layers, heads, "
                f"{-(-bits // 8)}] bytes for {self.blocks} x {self.blocks} blocks, and orders "
                f"[layers, heads], got {list(self.packed_masks.shape)} and "
                f"{list(self.orders.shape)}."
            )

    @property
    def tokens(self) -> int:
        """Tokens of the grid and of the text."""
        return prod(self.grid) + self.text_tokens

    @property
    def blocks(self) -> int:
        """Blocks along each side of a map."""
        return -(-self.tokens // self.block_size)

    @property
    def density(self) -> float:
        """Kept blocks over all blocks, over all masks, layers and heads."""
        return float(self.masks().double().mean())

    def masks(self) -> Bool[Tensor, "masks layers heads blocks blocks"]:
        """All masks of blocks, one byte for each block."""
        return unpack_masks(self.packed_masks, self.blocks)

    def names(self, layer: str | int) -> tuple[str, ...]:
        """The order of each head of a layer, by its letters."""
        return tuple(axis_orders(self.grid)[n] for n in self.orders[self._row(layer)].tolist())

    def mask_number(self, step: int, steps: int | None = None) -> int:
        """Which mask serves a step: that of its part of the sampling, or the last one.

        Args:
            step: from 0; steps past the last have the mask of the last.
            steps: of this sampling, if not as many as were watched.
        """
        steps = self.steps if steps is None else steps
        if step < 0 or steps < 1:
            raise ValueError(
                f"step, steps: expected a step from 0 of at least 1, got {step} of {steps}."
            )
        return min(step * self.timestep_bins // steps, len(self.packed_masks) - 1)

    def block_plan(
        self,
        layer: str | int,
        step: int,
        steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> BlockPlan:
        """The blocks of a layer at a step, in the orders of its heads. Made once and kept."""
        row, number = self._row(layer), self.mask_number(step, steps)
        known: dict[object, BlockPlan] = self.__dict__.setdefault("_plans", {})
        place = (row, number, torch.device(device))
        if place not in known:
            mask = unpack_masks(self.packed_masks[number, row], self.blocks).to(device)
            known[place] = BlockPlan.from_block_mask(
                mask,
                block_size=self.block_size,
                query_length=self.tokens,
                key_length=self.tokens,
            )
        return known[place]

    def index(
        self, layer: str | int, device: torch.device | str = "cpu"
    ) -> tuple[Int[Tensor, "heads tokens"], Int[Tensor, "heads tokens"]] | None:
        """The permutation of each head of a layer and its inverse; None if no head is permuted."""
        row = self._row(layer)
        known: dict[object, tuple[Tensor, Tensor] | None]
        known = self.__dict__.setdefault("_indices", {})
        place = (row, torch.device(device))
        if place not in known:
            orders = self.orders[row].tolist()
            index = head_token_index(
                self.grid,
                orders,
                text_tokens=self.text_tokens,
                text_first=self.text_first,
                device=device,
            )
            known[place] = (index, inverse_index(index)) if any(orders) else None
        return known[place]

    def dense(self) -> "PAROPlan":
        """The same orders with every block kept: for quantisation alone."""
        return replace(self, packed_masks=pack_masks(torch.ones_like(self.masks()[:1])))

    def __repr__(self) -> str:
        """In short: what it is for and not its numbers."""
        return (
            f"PAROPlan(grid {self.grid}, {self.text_tokens} text tokens, {len(self.layers)} layers "
            f"of {self.orders.shape[1]} heads, {len(self.packed_masks)} masks of {self.blocks} x "
            f"{self.blocks} blocks of {self.block_size}, density {self.density:.3f})"
        )

    def _row(self, layer: str | int) -> int:
        if isinstance(layer, str) and layer in self.layers:
            return self.layers.index(layer)
        if isinstance(layer, int) and 0 <= layer < len(self.layers):
            return layer
        raise ValueError(
            f"layer: expected one of {', '.join(self.layers)}, or its number from 0, got {layer!r}."
        )


def paro_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    plan: PAROPlan,
    layer: str | int,
    step: int,
    *,
    steps: int | None = None,
    quant: Quant | None = None,
    groups: MapGroups = "block",
    quant_block: int = 64,
    renormalize: bool = True,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> AttentionState:
    """Attention of one layer at one step, over the plan's blocks in the order of each head.

    Differentiable without `quant`. With all blocks kept and no `quant` it is dense attention.

    Args:
        query, key, value: with positions in them, in the order of the model; query heads may share
            key heads.
        plan: for these tokens and heads.
        layer: its name in the plan, or its number.
        step: of the sampling, from 0.
        steps: of this sampling, if not as many as were watched.
        quant: simulate both products in integers, see `quantised_attention`; slow.
        groups: entries of the map that share a scale, with `quant`.
        quant_block: along each side of a block of them; need not be the plan's.
        renormalize: the kept blocks are all there is, as in the authors' kernel. False multiplies
            the dense map by the mask, as their simulation does: rows sum to less than 1, and the
            dense normaliser is computed too, which saves nothing.
        bias: of keys, boolean (True = visible) or float, `[batch, heads, 1, tokens]` where batch
            and heads may be 1: for padded text.
        scale: of the scores; `dim ** -0.5` by default.

    Returns:
        The state, in the order of the model. Without `renormalize`, `lse` is over all keys.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    heads = plan.orders.shape[1]
    if query.dim() != 4 or query.shape[1:3] != (heads, plan.tokens):
        raise ValueError(
            f"query: expected [batch, {heads} heads, {plan.tokens} tokens, dim] for {plan!r}, got "
            f"{list(query.shape)}."
        )
    if quant is not None and quant not in _BITS:
        raise ValueError(f"quant: expected None, 'int8' or 'int4', got {quant!r}.")
    blocks, index = (
        plan.block_plan(layer, step, steps, query.device),
        plan.index(layer, query.device),
    )
    if index is not None:
        shared = heads // key.shape[1]
        if shared > 1:
            key, value = (one.repeat_interleave(shared, 1) for one in (key, value))
        query, key, value = (permute_tokens(one, index[0]) for one in (query, key, value))
        if bias is not None:
            bias = permute_key_bias(bias, index[0])
    if quant is None:
        state = block_sparse_attention(query, key, value, blocks, bias=bias, scale=scale)
    else:
        state = _quantised(query, key, value, blocks, quant, groups, quant_block, bias, scale)
    if not renormalize:
        narrow = value[..., :1]
        if quant is None:
            whole = attention_state(query, key, narrow, bias, scale=scale, enable_gqa=True)
        else:
            whole = _quantised(query, key, narrow, None, quant, groups, quant_block, bias, scale)
        share = torch.exp(state.lse - whole.lse).nan_to_num(0.0)  # nothing is visible at all
        state = AttentionState((state.output * share[..., None]).to(query.dtype), whole.lse)
    if index is None:
        return state
    lse = permute_tokens(state.lse[..., None], index[1])[..., 0]
    return AttentionState(permute_tokens(state.output, index[1]), lse)


def _quantised(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan | None,
    quant: Quant,
    groups: MapGroups,
    quant_block: int,
    bias: Tensor | None,
    scale: float | None,
) -> AttentionState:
    return simulate_quantised_attention(
        query,
        key,
        value,
        bits=_BITS[quant],
        groups=groups,
        block_size=quant_block,
        plan=plan,
        bias=bias,
        scale=scale,
    )


def pack_masks(
    masks: Bool[Tensor, "*batch blocks blocks"],
) -> UInt8[Tensor, "*batch bytes"]:
    """A bit for each block, row after row, the first in the lowest bit."""
    flat = masks.flatten(-2).to(torch.uint8)
    bytes_ = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = (bytes_ << _PLACES.to(masks.device)).sum(-1, dtype=torch.uint8)
    return packed


def unpack_masks(
    packed: UInt8[Tensor, "*batch bytes"], blocks: int
) -> Bool[Tensor, "*batch blocks blocks"]:
    """The masks that were packed, of `blocks` x `blocks` blocks."""
    bits = (packed[..., None] >> _PLACES.to(packed.device)) & 1
    masks: Tensor = bits.flatten(-2)[..., : blocks**2].bool().unflatten(-1, (blocks, blocks))
    return masks
