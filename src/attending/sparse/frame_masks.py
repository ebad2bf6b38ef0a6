"""Which frames of a video see which: masks of frames, and the blocks of tokens that they mean.

A video transformer attends over `frames * tokens_per_frame` tokens, frame after frame. Efficient-
vDiT (Ding et al. 2025, arXiv 2502.06155) finds that the map of such a model repeats from frame to
frame, with most of the mass on the frame itself, and keeps of it: each frame's own tile, and all
tiles of `k` reference frames, which see everything and are seen by everyone.

    mask = frame_reference_mask(frames=8, k=2)             # [8, 8]
    plan = expand_frame_mask(mask, tokens_per_frame=64)    # for block_sparse_attention
    plan.density, frame_sparsity(mask)

For fixed `k` the cost is linear in the number of frames: `(k + 1) * tokens_per_frame` keys for
each token that is not in a reference frame.

No official code was found. That the references are evenly spaced is established by the sparsities
that the paper prints, nine of them, which this family gives to 0.01 % and others do not (a test
holds us to it). Whether a reference is the first or the last frame of its group is open: both give
these numbers; the first is ours ("even"), the last is there as "even_last". [inferred]
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from attending.core.block_plan import BlockPlan

Placement = Literal["even", "even_last", "first", "random"]


def reference_frames(
    frames: int,
    k: int,
    *,
    placement: Placement = "even",
    generator: torch.Generator | None = None,
) -> list[int]:
    """The numbers of the `k` frames that everything sees, ascending.

    Args:
        frames: of the video, as the transformer sees it (latent frames).
        k: how many; at least 1, all of them make attention full.
        placement: `"even"`: `floor(i * frames / k)`, the first of each of k groups; `"even_last"`:
            the last of each group; `"first"`: the first k; `"random"`. The last two are there to
            compare with.
        generator: of the random ones.

    Raises:
        ValueError: for a `k` outside 1..frames, or an unknown placement.
    """
    if frames < 1 or not 1 <= k <= frames:
        raise ValueError(
            f"k: expected from 1 reference frame to all {frames} frames, got {k}. Without any "
            "reference, frames would not see each other: use frame_window_mask(frames, 0)."
        )
    if placement not in get_args(Placement):
        raise ValueError(
            f"placement: expected one of {', '.join(get_args(Placement))}, got {placement!r}."
        )
    if placement == "first":
        return list(range(k))
    if placement == "random":
        return sorted(torch.randperm(frames, generator=generator)[:k].tolist())
    if placement == "even_last":
        return [(i + 1) * frames // k - 1 for i in range(k)]
    return [i * frames // k for i in range(k)]


def frame_reference_mask(
    frames: int,
    k: int,
    *,
    placement: Placement = "even",
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "frames frames"]:
    """The mask "k : (frames - k)" of Efficient-vDiT: True where frame a sees frame c.

        mask[a, c] = (a == c) or a in references or c in references

    Symmetric. A reference frame sees all frames, another sees `k + 1`. Its sparsity is
    `(frames - k) (frames - k - 1) / frames^2`; `k = frames` is full attention.

    Args:
        frames, k, placement, generator: as in `reference_frames`.
    """
    chosen = reference_frames(frames, k, placement=placement, generator=generator)
    return mask_of_references(frames, chosen)


def mask_of_references(frames: int, references: Sequence[int]) -> Bool[Tensor, "frames frames"]:
    """The mask with these reference frames.

    Raises:
        ValueError: for references that are no frames.
    """
    if not all(0 <= reference < frames for reference in references):
        raise ValueError(
            f"references: expected numbers of frames, 0 to {frames - 1}, got {list(references)}."
        )
    chosen = torch.zeros(frames, dtype=torch.bool)
    chosen[list(references)] = True
    return torch.eye(frames, dtype=torch.bool) | chosen[:, None] | chosen


def frame_window_mask(frames: int, radius: int) -> Bool[Tensor, "frames frames"]:
    """A sliding window: True where two frames are at most `radius` apart. The simplest rival.

    It keeps exactly as many pairs of frames as `radius` references: both leave out
    `(frames - radius) (frames - radius - 1)`.

    Raises:
        ValueError: for a negative radius or no frames.
    """
    if frames < 1 or radius < 0:
        raise ValueError(
            f"frames, radius: expected at least 1 and at least 0, got {frames} and {radius}."
        )
    frame = torch.arange(frames)
    return (frame[:, None] - frame).abs() <= radius


def frame_sparsity(mask: Bool[Tensor, "frames frames"]) -> float:
    """The share of pairs of frames that a mask leaves out."""
    _check_mask(mask)
    return 1.0 - int(mask.sum()) / mask.numel()


def expand_frame_mask(
    mask: Bool[Tensor, "frames frames"],
    tokens_per_frame: int,
    *,
    block_size: int | None = None,
    text_tokens: int = 0,
    text_first: bool = True,
) -> BlockPlan:
    """The plan of a mask of frames: a block is kept if any pair of its tokens is.

    Without `block_size` a block is a frame, and the plan is the mask, exactly (unless there is
    text whose length has no common divisor with a frame's). The kernels of GPUs
    want blocks of 128: where those do not divide a frame, the blocks that straddle a border are
    kept whole, which costs some sparsity (0.7 to 1.4 points in the paper's models: it prints
    17.60 % where the mask of frames leaves out 18.75 %), and the tokens there see more than the
    mask says. `frame_token_mask`, as the `bias` of `block_sparse_attention`, hides that again.

    Args:
        mask: True where frame a (row) sees frame c (column).
        tokens_per_frame: of the transformer's sequence: frame after frame, frames outermost. Of a
            model with another order permute the tokens first.
        block_size: tokens in a block; None for `default_block_size`.
        text_tokens: of models that keep the text in the same sequence (CogVideoX, joint
            attention): they see all and are seen by all. [inferred]
        text_first: whether the text precedes the video.

    Raises:
        ValueError: for a mask that is not square and boolean, or sizes below 1.
    """
    _check_mask(mask)
    sizes = _segment_sizes(len(mask), tokens_per_frame, text_tokens, text_first)
    size = default_block_size(tokens_per_frame, text_tokens) if block_size is None else block_size
    if size < 1:
        raise ValueError(f"block_size: expected at least 1 token, got {size}.")
    length = sum(sizes)
    touched = _touched(sizes, size).to(mask.device)
    shown = _with_text(mask, text_tokens, text_first).float()
    return BlockPlan.from_block_mask(
        touched @ shown @ touched.T > 0, block_size=size, query_length=length, key_length=length
    )


def default_block_size(tokens_per_frame: int, text_tokens: int = 0) -> int:
    """A whole frame; with text the largest that cuts no border, or 128 if that is below 16."""
    size = math.gcd(tokens_per_frame, text_tokens)
    return size if size >= 16 or not text_tokens else 128


def frame_token_mask(
    mask: Bool[Tensor, "frames frames"],
    tokens_per_frame: int,
    *,
    text_tokens: int = 0,
    text_first: bool = True,
) -> Bool[Tensor, "tokens tokens"]:
    """The mask of tokens that a mask of frames means: of the size of the map.

    For the blocks that `expand_frame_mask` kept whole, and for tests.

    Args:
        mask, tokens_per_frame, text_tokens, text_first: as in `expand_frame_mask`.
    """
    _check_mask(mask)
    sizes = _segment_sizes(len(mask), tokens_per_frame, text_tokens, text_first)
    counts = torch.tensor(sizes, device=mask.device)
    shown = _with_text(mask, text_tokens, text_first)
    return shown.repeat_interleave(counts, 0).repeat_interleave(counts, 1)


def _segment_sizes(
    frames: int, tokens_per_frame: int, text_tokens: int, text_first: bool
) -> list[int]:
    if tokens_per_frame < 1 or text_tokens < 0:
        raise ValueError(
            "tokens_per_frame, text_tokens: expected at least 1 and at least 0, got "
            f"{tokens_per_frame} and {text_tokens}."
        )
    video = [tokens_per_frame] * frames
    text = [text_tokens] if text_tokens else []
    return text + video if text_first else video + text


def _with_text(mask: Tensor, text_tokens: int, text_first: bool) -> Tensor:
    """The mask with one more segment for the text, which sees all and is seen by all."""
    if not text_tokens:
        return mask
    room = (1, 0, 1, 0) if text_first else (0, 1, 0, 1)
    return torch.nn.functional.pad(mask, room, value=True)


def _touched(sizes: Sequence[int], block_size: int) -> Tensor:
    """Which blocks have tokens of which segments, `[blocks, segments]`, 0 or 1."""
    end = torch.tensor(sizes).cumsum(0)
    first = end - torch.tensor(sizes)
    blocks = -(-int(end[-1]) // block_size)
    start = torch.arange(blocks)[:, None] * block_size
    return ((start < end) & (start + block_size > first)).float()


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: expected booleans [frames, frames], got {mask.dtype} {list(mask.shape)}."
        )
