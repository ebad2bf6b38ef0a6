"""Attention within circles on an image whose rows are spread over several devices: CLEAR's halo.

Each rank of a `torch.distributed` group has a slab of whole rows of the image (of a video: whole
frames), and all ranks have all of the text. An image query sees no further than `radius`, so a rank
needs keys and values of `ceil(radius) - 1` rows beyond each end of its slab and of no more: with
the strict circle of CLEAR, r - 1 rows, `2 (r - 1) W` tokens a layer instead of all `H W`.

Text queries see the whole image. Their outputs are put together from what each rank finds:

    "exact"     each rank attends from the text to its own slab; the states are merged by their lse
                (text columns counted once), which costs one number more per text token and head
    "average"   the mean of attention over text and the rank's slab, as the paper does: an
                approximation without training                                          [recall]

    torch.distributed.init_process_group("gloo")            # or "nccl", by torchrun
    output = halo_window_attention(query, key, value, grid=(64, 64), radius=8, text_length=512)

Source: CLEAR (arXiv 2412.16112); the paper's section is [recall], and the official repository has
no code for it. The number of rows follows from the strict inequality of the code. The exact merge
is ours; so are slabs of different heights, and slabs lower than the halo.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.state import AttentionState, attend, merge
from attending.sparse._grid_window import Grid, check_length, window_shape
from attending.sparse.circular_window import grid_window_state

TextQueries = Literal["exact", "average"]
"""How text queries see the image, of which each rank has a part."""


def even_slabs(rows: int, ranks: int) -> list[int]:
    """How many rows each rank has, as even as can be, the first ones more.

    Raises:
        ValueError: for fewer rows than ranks.
    """
    if not 1 <= ranks <= rows:
        raise ValueError(f"ranks: expected from 1 to {rows}, the number of rows, got {ranks}.")
    return [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]


@torch.no_grad()
def halo_window_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    grid: Grid,
    radius: float,
    *,
    text_length: int = 0,
    text_first: bool = True,
    frame_radius: int | None = None,
    slabs: Sequence[int] | None = None,
    text_queries: TextQueries = "exact",
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """`circular_window_attention` of which every rank computes its part. For inference.

    Args:
        query, key, value: of all text tokens, the same on all ranks, and of this rank's image
            tokens.
        grid: of the whole image, `(height, width)`; of a video, `(frames, height, width)`.
        radius, text_length, text_first, frame_radius, scale: as in `circular_window_attention`.
        slabs: rows of each rank (of a video: frames), in the order of ranks; `even_slabs` by
            default.
        text_queries: see `TextQueries`. Image queries are exact with both.
        group: the ranks; all by default.

    Returns:
        Outputs of the text, the same on all ranks, and of this rank's image tokens.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
        RuntimeError: without a process group.
    """
    if text_queries not in get_args(TextQueries):
        raise ValueError(f'text_queries: expected "exact" or "average", got {text_queries!r}.')
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "halo_window_attention needs torch.distributed.init_process_group first, as torchrun "
            "prepares it; on one device, use circular_window_attention."
        )
    arguments = check_arguments(query, key, value, None, False, scale, True)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    shape, window = window_shape(grid, radius, frame_radius)
    axis = 0 if len(grid) == 3 else 1
    slabs = even_slabs(shape[axis], ranks) if slabs is None else list(slabs)
    if len(slabs) != ranks or sum(slabs) != shape[axis] or min(slabs) < 1:
        raise ValueError(
            f"slabs: expected at least one row for each of {ranks} ranks, {shape[axis]} in all, "
            f"got {slabs}."
        )
    mine = (*shape[:axis], slabs[rank], *shape[axis + 1 :])
    check_length("query", query, math.prod(mine), text_length)
    parts = []
    for one in (query, key, value):
        end = one.shape[2] - text_length
        text = one[:, :, :text_length] if text_first else one[:, :, end:]
        parts.append((text, one[:, :, text_length:] if text_first else one[:, :, :end]))
    (text_query, image_query), (text_key, image_key), (text_value, image_value) = parts
    row = math.prod(shape[axis + 1 :])
    reach = window.reach(shape)[axis]
    both = torch.cat([image_key, image_value], -1)
    around, before = exchange_halo(both, slabs, reach, row, group=group)
    keys, values = around.split([key.shape[-1], value.shape[-1]], -1)
    seen = (*shape[:axis], around.shape[2] // row, *shape[axis + 1 :])
    lead = (before, 0, 0) if axis == 0 else (0, before, 0)
    states = [
        grid_window_state(
            image_query,
            keys,
            values,
            (mine[0], mine[1], mine[2]),
            window,
            arguments.scale,
            (seen[0], seen[1], seen[2]),
            lead,
        )
    ]
    if not text_length:
        return states[0].output
    states.append(attend(image_query, text_key, text_value, scale=arguments.scale))
    image = merge(*states).output
    of_text = attend(text_query, text_key, text_value, scale=arguments.scale)
    of_slab = attend(text_query, image_key, image_value, scale=arguments.scale)
    if text_queries == "exact":
        text = merge(of_text, merge_over_ranks(of_slab, group)).output
    else:
        text = merge(of_text, of_slab).output.contiguous()
        dist.all_reduce(text, group=group)
        text = text / ranks
    return torch.cat([text, image] if text_first else [image, text], 2)


def exchange_halo(
    tensor: Float[Tensor, "batch heads tokens dim"],
    slabs: Sequence[int],
    halo: int,
    row: int,
    *,
    group: dist.ProcessGroup | None = None,
) -> tuple[Float[Tensor, "batch heads more_tokens dim"], int]:
    """The rank's rows and up to `halo` rows of others before and after them.

    Each rank sends only what another needs, also to ranks that are not next to it if slabs are
    lower than the halo.

    Args:
        tensor: this rank's rows, one after another.
        slabs: rows of each rank.
        halo: rows beyond each end.
        row: tokens in a row.
        group: the ranks; all by default.

    Returns:
        The rows, and how many of them come before the rank's own.
    """
    rank = dist.get_rank(group)
    starts = [0, *itertools.accumulate(slabs)]
    spans = [(max(0, one - halo), min(starts[-1], two + halo)) for one, two in
             itertools.pairwise(starts)]  # fmt: skip
    tensor = tensor.contiguous()
    operations, pieces = [], []
    for other, (begin, end) in enumerate(itertools.pairwise(starts)):
        if other == rank:
            pieces.append(tensor)
            continue
        peer = other if group is None else dist.get_global_rank(group, other)
        # What of mine the other one sees, and what of its I see.
        low, high = max(starts[rank], spans[other][0]), min(starts[rank + 1], spans[other][1])
        if low < high:
            part = tensor[:, :, (low - starts[rank]) * row : (high - starts[rank]) * row]
            operations.append(dist.P2POp(dist.isend, part.contiguous(), peer, group))
        low, high = max(begin, spans[rank][0]), min(end, spans[rank][1])
        if low < high:
            shape = (*tensor.shape[:2], (high - low) * row, tensor.shape[3])
            pieces.append(tensor.new_empty(shape))
            operations.append(dist.P2POp(dist.irecv, pieces[-1], peer, group))
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return torch.cat(pieces, 2), starts[rank] - spans[rank][0]


def merge_over_ranks(
    state: AttentionState, group: dist.ProcessGroup | None = None
) -> AttentionState:
    """The state over the keys of all ranks, of which each has some; the same on all ranks.

        lse    = log sum_u exp lse_u
        output = sum_u exp(lse_u - lse) output_u

    Two reductions: the largest lse, and the weighted outputs with their weights. Half precision is
    summed in float32.
    """
    highest = state.lse.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    shift = highest.masked_fill(highest == -math.inf, 0.0)
    weight = torch.exp(state.lse - shift)[..., None]
    both = torch.cat([state.output.to(weight.dtype) * weight, weight], -1)
    dist.all_reduce(both, group=group)
    total = both[..., -1:]
    empty = total == 0
    output = (both[..., :-1] / total.masked_fill(empty, 1.0)).to(state.output.dtype)
    lse = (shift + total.squeeze(-1).log()).masked_fill(empty.squeeze(-1), -math.inf)
    return AttentionState(output, lse)
