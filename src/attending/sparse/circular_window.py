"""Each image token looks at the tokens in a circle around it, and at all of the text: CLEAR.

For owners of a pretrained text-to-image transformer who want large images: the cost of attention
grows linearly with the number of image tokens instead of with its square. In a joint sequence of
text and image tokens, the image row by row,

    query i sees key j   if i is text, or j is text,
                         or (y_i - y_j)^2 + (x_i - x_j)^2 < radius^2        (strict)

Queries, keys, norms, rotation and softmax stay those of the model. At the edges the circle is cut.
With a radius beyond the diagonal this is full attention, with radius 1 a token sees itself and the
text. Per layer the receptive field grows by `radius` rounded up, less 1.

Optionally with down-sampled keys and values (`down_factor` f): the image's keys and values, after
norm and rotation, are summed in f x f blocks with learned weights and appended as further keys.
Image queries see all of them, text queries none. That part is quadratic again, with 1 / f^2.

    output = circular_window_attention(query, key, value, grid=(64, 64), radius=8, text_length=512)

How it is done: text columns and circles are states over disjoint keys, which are merged; see
`attending.sparse._window_tiles` for the circles. Nothing of the size of the map is made, except
where the map is so small that a mask costs less.

Source: Liu, Tan and Wang, "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers
Up" (arXiv 2412.16112), and its code (Huage001/CLEAR, commit 98e9fed). Where we differ: the code
keeps one mask for the process, so that an image of another size may get the mask of the one before,
and its down-sampling takes 512 text tokens for granted; here everything follows from the arguments.
Discs over the frames of a video are ours, the paper has images only.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.blocks import SMALL_MAP
from attending.core.check import check_arguments
from attending.core.state import AttentionState, attend, merge
from attending.sparse._grid_window import (
    Grid,
    Shape,
    Window,
    check_factor,
    check_length,
    window_shape,
)
from attending.sparse._window_tiles import find_kinds, tile_kinds, window_state

TILE = 8  # rows and columns of a tile of queries; measured: 4 and 16 are slower for radius 8 and 16
MOST_OF_SMALL_MAP = 1 / 3  # of which tiles compute less, so that a mask costs more than they do
BASE_LENGTH = 64**2 + 512  # tokens of a FLUX image of 1024 x 1024 and its text


def circular_window_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    grid: Grid,
    radius: float,
    *,
    text_length: int = 0,
    text_first: bool = True,
    frame_radius: int | None = None,
    down_factor: int | None = None,
    pool_weight: Float[Tensor, "factor factor"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention of text and image tokens within circles on the image.

    Differentiable in query, key, value and pool_weight. Memory grows with the number of tokens.
    Query heads may share key heads.

    Args:
        query, key, value: of the joint sequence, image tokens row by row (of a video, frame by
            frame), as they come to `scaled_dot_product_attention`.
        grid: `(height, width)` of the image in tokens, or `(frames, height, width)` of a video.
        radius: in tokens, larger than 0; strict, so 1 is the token alone. The paper has 8, 16, 32.
        text_length: text tokens in the sequence, which see and are seen by everything.
        text_first: whether they come before the image tokens (FLUX) or after them (SD3).
        frame_radius: of a video, the frames that a token sees: those less than so many away, in
            each of them the circle around its own place. 1: its own frame; None: all. Ours.
        down_factor: append keys and values down-sampled by this factor to what image queries see;
            it has to divide height and width. None for none. The paper has 4.
        pool_weight: learned weights of the down-sampling, shared by all heads; the mean (1 / f^2)
            by default.
        scale: of the scores; `dim ** -0.5` by default. See `log_length_scale`.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, value, None, False, scale, True)
    shape, window = window_shape(grid, radius, frame_radius)
    tokens = math.prod(shape)
    check_length("query", query, tokens, text_length)
    check_length("key", key, tokens, text_length)
    pooled = None
    if down_factor is not None:
        pooled = [pool_tokens(_image(one, text_length, text_first), grid, down_factor, pool_weight)
                  for one in (key, value)]  # fmt: skip
    elif pool_weight is not None:
        raise ValueError("down_factor: expected a factor with pool_weight, got None.")
    asked, keys, values = (_image(one, text_length, text_first) for one in (query, key, value))
    states = [grid_window_state(asked, keys, values, shape, window, arguments.scale)]
    others = [_text(one, text_length, text_first) for one in (key, value)]
    if pooled is not None:
        others = [torch.cat(pair, 2) for pair in zip(others, pooled, strict=True)]
    if others[0].shape[2]:
        states.append(attend(asked, others[0], others[1], scale=arguments.scale))
    image = merge(*states).output
    if not text_length:
        return image
    asking = _text(query, text_length, text_first)
    text = attend(asking, key, value, scale=arguments.scale).output
    return torch.cat([text, image] if text_first else [image, text], 2)


def grid_window_state(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    grid: Shape,
    window: Window,
    scale: float,
    key_grid: Shape | None = None,
    lead: Shape = (0, 0, 0),
) -> AttentionState:
    """The state of grid tokens over the tokens in their windows, unchecked: a part to merge.

    Args:
        query, key, value: of grid tokens only.
        grid: frames, height and width of the queries.
        window: what each sees.
        scale: of the scores.
        key_grid: of the keys, if there are more than queries: rows beyond the edge of a part.
        lead: place of the first query in the grid of keys.
    """
    key_grid = grid if key_grid is None else key_grid
    kinds = tile_kinds(grid, window, (1, TILE, TILE), key_grid, lead)
    entries = query.shape[2] * key.shape[2]
    computed = sum(kind.entries for kind in kinds)
    if computed == entries and all(kind.visible is None for kind in kinds):
        return attend(query, key, value, scale=scale)
    if entries > SMALL_MAP or computed < MOST_OF_SMALL_MAP * entries:
        return window_state(query, key, value, kinds, scale)
    mask = _small_mask(grid, window, key_grid, lead).to(query.device)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    bias = bias.masked_fill(~mask, -math.inf)[None, None]
    return attend(query, key, value, bias=bias, scale=scale)


def circular_window_mask(
    grid: Grid,
    radius: float,
    *,
    text_length: int = 0,
    text_first: bool = True,
    frame_radius: int | None = None,
    down_factor: int | None = None,
) -> Bool[Tensor, "queries keys"]:
    """What `circular_window_attention` lets each token see, True = seen: for looking and for tests.

    Its size is that of the whole map.

    Args:
        grid, radius, text_length, text_first, frame_radius, down_factor: as there. Down-sampled
            keys come last.
    """
    shape, window = window_shape(grid, radius, frame_radius)
    mask = _mask(shape, window, shape, (0, 0, 0))  # a new one, which the caller may change
    before, after = (text_length, 0) if text_first else (0, text_length)
    mask = torch.nn.functional.pad(mask, (before, after, before, after), value=True)
    if down_factor is None:
        return mask
    check_factor(shape, down_factor)
    pooled = math.prod(shape) // down_factor**2
    is_image = torch.ones(math.prod(shape), dtype=torch.bool)
    is_image = torch.nn.functional.pad(is_image, (before, after), value=False)
    return torch.cat([mask, is_image[:, None].expand(-1, pooled)], 1)


def pool_tokens(
    tokens: Float[Tensor, "batch heads tokens dim"],
    grid: Grid,
    factor: int,
    weight: Float[Tensor, "factor factor"] | None = None,
) -> Float[Tensor, "batch heads pooled dim"]:
    """Weighted sums of image tokens over blocks.

        pooled[Y, X] = sum_ab weight[a, b] tokens[f Y + a, f X + b]

    Args:
        tokens: keys or values of image tokens, row by row.
        grid: as in `circular_window_attention`; the frames of a video are down-sampled one by one.
        factor: rows and columns of a block; it has to divide height and width.
        weight: of the places in a block; the mean by default.

    Raises:
        ValueError: for a factor that does not divide the grid, or a weight of another shape.
    """
    shape, _ = window_shape(grid, 1.0, None)
    check_factor(shape, factor)
    check_length("tokens", tokens, math.prod(shape), 0)
    if weight is None:
        weight = tokens.new_full((factor, factor), factor**-2)
    if tuple(weight.shape) != (factor, factor):
        raise ValueError(
            f"weight: expected [{factor}, {factor}], a weight for each place of a block, got "
            f"{list(weight.shape)}."
        )
    frames, height, width = shape
    cut = tokens.unflatten(2, (frames, height // factor, factor, width // factor, factor))
    return torch.einsum("bntyaxcd,ac->bntyxd", cut, weight.to(cut)).flatten(2, 4)


def log_length_scale(
    dim: int, key_length: int, *, base_length: int = BASE_LENGTH, factor: float = 1.0
) -> float:
    """A softmax scale that sharpens attention where there are more keys than in training.

        scale = sqrt( log(factor * key_length) / log(base_length) / dim )

    The official code uses it at resolutions beyond that of training ("proportional attention").
    It is `dim ** -0.5` at the length of training.

    Args:
        dim: of a head.
        key_length: tokens of the joint sequence.
        base_length: of training; that of FLUX at 1024 x 1024 by default.
        factor: of the length, within the logarithm. The official code with down-sampled keys has
            10, and does not say why.

    Raises:
        ValueError: for lengths whose logarithm is not positive.
    """
    if dim < 1 or base_length <= 1 or factor * key_length <= 1:
        raise ValueError(
            "dim, key_length, base_length: expected at least 1 and lengths of more than 1, got "
            f"{dim}, {factor} * {key_length} and {base_length}."
        )
    return math.sqrt(math.log(factor * key_length) / math.log(base_length) / dim)


@lru_cache(maxsize=64)
def window_entries(grid: Shape, window: Window) -> int:
    """How many pairs of grid tokens see each other: the entries of the mask."""
    frames, rows, columns = (torch.arange(1 - size, size) for size in grid)
    sees = window.sees(frames[:, None, None], rows[:, None], columns)
    pairs = (
        (grid[0] - frames.abs())[:, None, None]
        * (grid[1] - rows.abs())[:, None]
        * (grid[2] - columns.abs())
    )
    return int((sees * pairs).sum())


@lru_cache(maxsize=16)
def _small_mask(grid: Shape, window: Window, key_grid: Shape, lead: Shape) -> Tensor:
    return _mask(grid, window, key_grid, lead)


def _mask(grid: Shape, window: Window, key_grid: Shape, lead: Shape) -> Tensor:
    """Of the whole map: one tile as large as the grid."""
    (kind,) = find_kinds(grid, window, grid, key_grid, lead)
    mask = torch.zeros(math.prod(grid), math.prod(key_grid), dtype=torch.bool)
    mask[:, kind.key_starts + kind.keys] = True if kind.visible is None else kind.visible
    return mask


def _image(tensor: Tensor, text_length: int, text_first: bool) -> Tensor:
    end = tensor.shape[2] - text_length
    return tensor[:, :, text_length:] if text_first else tensor[:, :, :end]


def _text(tensor: Tensor, text_length: int, text_first: bool) -> Tensor:
    end = tensor.shape[2] - text_length
    return tensor[:, :, :text_length] if text_first else tensor[:, :, end:]
