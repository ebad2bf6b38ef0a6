"""What attention in INT8 or INT4 would give, simulated: rounding for rounding, and no faster.

Kernels for quantised attention replace both products of attention by products of integers: query
and key, and the map and the values, are rounded to 8 or 4 bits with a scale for each group of
entries. How much that costs depends on the groups. The functions here make the same roundings and
compute with what is left of the numbers, so that the loss of quality can be measured on any
machine. Nothing is saved: plain PyTorch on a CPU has no kernel that is.

    state = simulate_quantised_attention(query, key, value, bits=8)                  # blocks
    state = simulate_quantised_attention(query, key, value, bits=8, groups="row")    # a bad idea
    state = simulate_quantised_attention(query, key, value, bits=4, plan=plan)       # and sparse

A symmetric quantiser of b bits has codes from -(2^(b-1) - 1) to 2^(b-1) - 1:

    scale = max(max |x|, 1e-7) / levels      code = round(x / scale)      levels = 127 or 7

Query codes share a scale over 32 consecutive tokens of a head, key codes over 64, all channels
together, without smoothing, as in the authors' kernels. For the map there are three kinds of
groups:

- "block": a scale for each block of queries x keys of the probabilities (the paper's, 64 x 64;
  round half to even [inferred]). Small where the block is small, so what lies far from the large
  entries keeps its digits.
- "row": one scale for all keys of a query. The baseline that the paper compares with.
- "fixed": the authors' INT8 kernel. Scores are exponentiated against the running maximum over the
  blocks so far, and `127 * exp(score - running maximum)` is cut off (not rounded) to a code; the
  sum below the line is not quantised.

Values share a scale over a block of keys and all channels; the kernel leaves that to its caller, so
these groups are [inferred].

Source: PAROAttention (Zhao et al., arXiv 2506.16054) and the authors' CUDA quantiser. Their example
keeps the second product in FP16; `map_bits=None` is that.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor
from torch.nn.functional import pad

from attending.core.block_plan import BlockPlan
from attending.core.check import check_arguments, check_mask
from attending.core.precision import full_precision
from attending.core.state import AttentionState
from attending.sparse.block_scores import SLAB_SCORES

Bits = Literal[4, 8]
MapGroups = Literal["block", "row", "fixed"]

QUERY_GROUP, KEY_GROUP = 32, 64  # tokens that share a scale, in the authors' kernels
SMALLEST = 1e-7  # the largest entry that a group is taken to have at least


class QuantisedTokens(NamedTuple):
    """Integer codes and their scales.

    Attributes:
        codes: signed; for 4 bits they are from -7 to 7, a byte each.
        scale: of each group of consecutive tokens, of each head.
        group_size: tokens in a group; the last may have fewer.
    """

    codes: Int8[Tensor, "batch heads tokens dim"]
    scale: Float[Tensor, "batch heads groups"]
    group_size: int

    def scale_of_tokens(self) -> Float[Tensor, "batch heads tokens 1"]:
        """The scale of every token."""
        scale = self.scale.repeat_interleave(self.group_size, -1)
        return scale[..., : self.codes.shape[2], None]

    def dequantise(self) -> Float[Tensor, "batch heads tokens dim"]:
        """`scale * code`."""
        return self.codes * self.scale_of_tokens()


@torch.no_grad()
def quantise_tokens(
    tokens: Float[Tensor, "batch heads tokens dim"], group_size: int, *, bits: Bits = 8
) -> QuantisedTokens:
    """Round to integers, symmetrically, with a scale for each group of tokens of a head.

    Args:
        tokens: query, key or value.
        group_size: consecutive tokens that share a scale, with all their channels.
        bits: 8 or 4.

    Raises:
        ValueError: for other bits, and groups of no tokens.
    """
    levels = _levels("bits", bits)
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1 token, got {group_size}.")
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    filled = pad(tokens, (0, 0, 0, -tokens.shape[2] % group_size))
    groups = filled.unflatten(2, (-1, group_size))
    largest = groups.abs().amax((-1, -2), keepdim=True).clamp_min(SMALLEST)
    codes = (groups * levels / largest).round().flatten(2, 3)[:, :, : tokens.shape[2]]
    return QuantisedTokens(codes.to(torch.int8), largest[..., 0, 0] / levels, group_size)


@torch.no_grad()
def quantise_map(
    attention: Float[Tensor, "batch heads queries keys"],
    *,
    bits: Bits = 8,
    groups: Literal["block", "row"] = "block",
    block_size: int = 64,
) -> Float[Tensor, "batch heads queries keys"]:
    """A map after a round trip through integers: `scale * round(p / scale)`, half to even.

    Args:
        attention: probabilities (not negative), or whole rows of blocks of them.
        bits: 8 or 4.
        groups: a scale for each block, or for each row.
        block_size: along each side of a block.

    Raises:
        ValueError: for other bits or groups.
    """
    levels = _levels("bits", bits)
    if groups not in ("block", "row"):
        raise ValueError(f"groups: expected 'block' or 'row', got {groups!r}.")
    if groups == "row":
        scale = attention.amax(-1, keepdim=True).clamp_min(SMALLEST) / levels
        return (attention / scale).round_().mul_(scale)
    height, width = attention.shape[-2:]
    room = (0, -width % block_size, 0, -height % block_size)
    filled = pad(attention, room) if any(room) else attention
    tall = filled.unflatten(-2, (-1, block_size))
    # One side after the other is faster than both at once.
    largest = tall.amax(-2, keepdim=True).unflatten(-1, (-1, block_size)).amax(-1, keepdim=True)
    scale = largest.clamp_min(SMALLEST) / levels
    codes = tall.unflatten(-1, (-1, block_size)) / scale
    rounded: Tensor = codes.round_().mul_(scale).flatten(-2).flatten(-3, -2)
    return rounded[..., :height, :width]


def integer_product(
    left: Int8[Tensor, "*batch rows inner"], right: Int8[Tensor, "*batch inner columns"]
) -> Int32[Tensor, "*batch rows columns"]:
    """The product of codes in integers, as hardware does it; exact.

    By `torch._int_mm` where this build of PyTorch has it, else in float64, which is exact too. What
    the simulation computes in float32 has the same value as long as `127 * 127 * inner` is below
    2^24, that is up to 1040 channels.
    """
    front, (rows, inner), columns = left.shape[:-2], left.shape[-2:], right.shape[-1]
    if not hasattr(torch, "_int_mm"):
        return (left.double() @ right.double()).to(torch.int32)
    pairs = zip(left.reshape(-1, rows, inner), right.reshape(-1, inner, columns), strict=True)
    products = [torch._int_mm(one.contiguous(), other.contiguous()) for one, other in pairs]
    return torch.stack(products).view(*front, rows, columns)


@torch.no_grad()
@full_precision
def simulate_quantised_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    bits: Bits | None = 8,
    map_bits: Bits | Literal["same"] | None = "same",
    groups: MapGroups = "block",
    block_size: int = 64,
    plan: BlockPlan | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    integers: bool = False,
) -> AttentionState:
    """The state of attention whose two products are made of integers.

        scores = scale * (scale_q * scale_k) * (codes of query . codes of key)
        output = sum over keys of quantised(softmax(scores)) * quantised(value)

    In memory that grows with `block_size x keys`. No gradient: rounding has none.

    Args:
        query, key, value: as in `attention_state`; query heads may share key heads.
        bits: of query and key, 8 or 4; None leaves them as they are.
        map_bits: of the map and of the values; "same" is `bits`. None leaves them as they are.
        groups: entries of the map that share a scale; see the module.
        block_size: along each side of a block of the map, and keys in a group of values.
        plan: blocks to look at; the others are hidden before the softmax, as a kernel that skips
            them does. Its blocks need not be those of the quantiser.
        bias: boolean (True = visible) or float, broadcasts to `[batch, heads, queries, keys]`.
        scale: of the scores; `dim ** -0.5` by default.
        integers: multiply query and key by `integer_product`, matrix by matrix. It gives the same
            scores to rounding, slowly: a check that this simulates what it says.

    Returns:
        The state. `lse` is that of the quantised scores; output 0 and lse -inf where a query sees
        no key.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, value, None, False, scale, True)
    if map_bits == "same":
        map_bits = bits
    if groups not in get_args(MapGroups):
        raise ValueError(f"groups: expected one of {get_args(MapGroups)}, got {groups!r}.")
    if plan is not None and (plan.query_length, plan.key_length) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"plan: expected one for {query.shape[2]} queries and {key.shape[2]} keys, got {plan!r}"
        )
    bias = None if bias is None else check_mask(bias, query, key)[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    shared = query.shape[1] // key.shape[1]
    key, value = (one.to(dtype).repeat_interleave(shared, 1) for one in (key, value))
    asked = None if bits is None else quantise_tokens(query, QUERY_GROUP, bits=bits)
    asking = None if bits is None else quantise_tokens(key, KEY_GROUP, bits=bits)
    if map_bits is not None:
        value = quantise_tokens(value, block_size, bits=map_bits).dequantise().to(dtype)
    step = block_size * max(
        1, SLAB_SCORES // max(1, query.shape[:2].numel() * block_size * key.shape[2])
    )
    outputs, lses = [], []
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        if asked is None or asking is None:
            scores = query[:, :, rows].to(dtype) @ key.mT
        else:
            codes = asked.codes[:, :, rows]
            if integers:
                product = integer_product(codes, asking.codes.mT).to(dtype)
            else:
                product = codes.to(dtype) @ asking.codes.to(dtype).mT
            scores = product.mul_(asked.scale_of_tokens()[:, :, rows])
            scores.mul_(asking.scale_of_tokens().mT)
        scores.mul_(arguments.scale)
        if bias is not None:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, rows])
        if plan is not None:
            scores = scores.masked_fill(~_visible(plan, start, scores.shape[2]), -math.inf)
        lse = scores.logsumexp(-1)
        outputs.append(_rounded(scores, lse, map_bits, groups, block_size) @ value)
        lses.append(lse)
    if not outputs:
        return AttentionState(query.new_zeros(*query.shape[:3], value.shape[-1]), query[..., 0])
    return AttentionState(torch.cat(outputs, 2).to(query.dtype), torch.cat(lses, 2))


def _rounded(
    scores: Tensor, lse: Tensor, bits: Bits | None, groups: MapGroups, block_size: int
) -> Tensor:
    """The map that meets the values."""
    level = lse.masked_fill(lse == -math.inf, math.inf)[..., None]
    if bits is None:
        return (scores - level).exp_()
    if groups != "fixed":
        probabilities = (scores - level).exp_()
        return quantise_map(probabilities, bits=bits, groups=groups, block_size=block_size)
    levels, keys = _levels("map_bits", bits), scores.shape[-1]
    blocks = pad(scores, (0, -keys % block_size), value=-math.inf).unflatten(-1, (-1, block_size))
    running = blocks.amax(-1, keepdim=True).cummax(-2).values
    running = running.masked_fill(running == -math.inf, 0.0)  # nothing was seen so far
    codes = (torch.exp(blocks - running) * levels).trunc()
    return (codes / levels * torch.exp(running - level[..., None])).flatten(-2)[..., :keys]


def _visible(plan: BlockPlan, start: int, count: int) -> Tensor:
    """Some rows of `plan.visible()`, without the others."""
    row = torch.arange(start, start + count, device=plan.block_mask.device)
    mask = plan.block_mask[:, :, row // plan.block_size[0]]
    mask = mask.repeat_interleave(plan.block_size[1], -1)[..., : plan.key_length]
    if plan.causal_offset is None:
        return mask
    column = torch.arange(plan.key_length, device=row.device)
    return mask & (column <= row[:, None] + plan.causal_offset)


def _levels(name: str, bits: int) -> int:
    """Codes on each side of zero."""
    if bits not in (4, 8):
        raise ValueError(f"{name}: expected 8 or 4, got {bits!r}.")
    return int(2 ** (bits - 1) - 1)
