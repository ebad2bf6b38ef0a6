"""The experiment of Rectified SpaAttn: as many blocks, and different things for what is dropped.

1. Videos. wan-shapes paints the same captions from the same noise with dense attention and with
   every mode. All keep the same number of blocks in each row, in the same layers and steps, so the
   density is one and the same; the window, too. `attending.papers._video_trial` compares with the
   dense videos.
2. Smooth tokens. Queries, keys and values that change slowly along a line, with noise: how near
   the output of one call comes to dense attention, by how far tokens are alike.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, scaled_dot_product_attention

from attending.core.block_plan import BlockPlan
from attending.interventions.block_sparse import BlockSparse
from attending.interventions.rectified_attention import RectifiedAttention
from attending.papers._video_trial import Method, VideoTrial, video_trial
from attending.sparse.rectified import RECTIFY, Rectify, rectified_block_sparse_attention
from attending.sparse.window import window_plan
from attending.taps import AttentionCall
from attending.taps.denoising import Moment
from attending.zoo.entry import ZooModel

NAMES: dict[Rectify, str] = {mode: mode.replace("+", "_") for mode in RECTIFY}
METHODS = ("window", *NAMES.values(), "ipar_gapr_rows")


def methods(
    *, block_size: int, drop: float, dense_layers: int, dense_steps: int, **_: Any
) -> dict[str, Method]:
    """The modes, the window, and the paper's mode without the curve, all of one density."""

    def rectified(mode: Rectify, reorder: bool = True) -> Method:
        return RectifiedAttention(
            block_size=block_size,
            drop=drop,
            top_p=None,
            neighbors=False,
            dense_layers=dense_layers,
            dense_steps=dense_steps,
            rectify=mode,
            reorder=reorder,
        )

    def window(call: AttentionCall, moment: Moment) -> BlockPlan | None:
        if moment.step < dense_steps or (call.layer is not None and call.layer < dense_layers):
            return None
        blocks = -(-call.key_length // block_size)
        return window_plan(
            call.query_length,
            call.key_length,
            block_size=block_size,
            width=max(1, int((1 - drop) * blocks)),
        )

    found: dict[str, Method] = {"window": BlockSparse(window)}
    found |= {name: rectified(mode) for mode, name in NAMES.items()}
    return found | {"ipar_gapr_rows": rectified("ipar+gapr", reorder=False)}


def paint(wan: ZooModel, seed: int, settings: dict[str, Any]) -> VideoTrial:
    """The videos of one seed."""
    return video_trial(
        methods(**settings),
        seeds=(seed,),
        videos_per_seed=settings["videos"],
        steps=settings["steps"],
        frames=settings["frames"],
        guidance_scale=settings["guidance_scale"],
        wan=wan,
    )


def smooth_tokens(tokens: int, dim: int, length: float, noise: float, seed: int) -> Tensor:
    """Query, key and value `[3, 1, 1, tokens, dim]`, each a smooth line of unit variance and noise.

    Args:
        tokens, dim: the size.
        length: over which tokens are alike: the correlation at distance d is
            `exp(-(d / (2 length)) ** 2)`.
        noise: standard deviation of what is added to each token on its own.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    reach = int(4 * length)
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (distance / length) ** 2)
    kernel = (kernel / kernel.norm())[None, None]
    white = torch.randn(3 * dim, 1, tokens + 2 * reach, generator=generator, dtype=torch.float64)
    smooth = conv1d(white, kernel).view(3, 1, 1, dim, tokens).mT
    own = torch.randn(smooth.shape, generator=generator, dtype=torch.float64)
    return smooth + noise * own


@torch.no_grad()
def smooth_errors(
    seed: int,
    *,
    tokens: int,
    dim: int,
    block_size: int,
    top_k: int,
    sharpness: float,
    lengths: list[float],
    noise: float,
) -> dict[str, list[float]]:
    """Of each mode the relative error to dense attention, for each length of likeness.

    Args:
        seed: of the tokens.
        tokens, dim, noise: as in `smooth_tokens`.
        block_size, top_k: of the attention.
        sharpness: factor of the scores, so that maps are neither flat nor of single keys.
        lengths: over which tokens are alike.
    """
    errors: dict[str, list[float]] = {name: [] for name in NAMES.values()}
    for length in lengths:
        query, key, value = smooth_tokens(tokens, dim, length, noise, seed)
        query = query * sharpness
        dense = scaled_dot_product_attention(query, key, value)
        for mode, name in NAMES.items():
            output = rectified_block_sparse_attention(
                query, key, value, block_size=block_size, top_k=top_k, top_p=None, rectify=mode
            )
            errors[name].append(float((output - dense).norm() / dense.norm()))
    return errors
