"""Let a video model of the zoo paint: captions in, videos out.

>>> from attending import zoo
>>> from attending.zoo.video_tasks import make_videos
>>> wan = zoo.load("wan-shapes")
>>> videos = make_videos(wan, ["a red circle moving left on a plain background."], steps=2)
>>> videos.shape
torch.Size([1, 8, 3, 32, 32])
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attending.diffusion import FlowStep, sample_flow
from attending.diffusion.seeds import row_seeds
from attending.zoo.entry import ZooModel

# What `wan-shapes` is trained with and best at.
SIDE = 32
SHIFT = 4.0


def make_videos(
    wan: ZooModel,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    frames: int = 8,
    steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 8,
    on_step: Callable[[FlowStep], None] | None = None,
) -> Float[Tensor, "videos frames 3 height width"]:
    """Paint one video for each caption, by :func:`attending.diffusion.sample_flow`.

    Args:
        wan: ``zoo.load("wan-shapes")``.
        captions: As those of :class:`~attending.zoo.shapes_motion.MovingScene`, of one or two
            objects; ``""`` is any video.
        seed: Of video ``i`` it is ``seed + i``, or the ``i``-th of several.
        frames: 8 or 16, the lengths of most videos that the model has seen; 4 works, too.
        steps: How often the noise is reduced; the model is called once or, with guidance, twice in
            each.
        guidance_scale: How closely to follow the caption; 1 is as the model learned it and takes
            half the time.
        batch_size: So many videos are painted at once.
        on_step: Called before every step of each batch.

    Returns:
        Red, green and blue in [0, 1], as ``render_videos`` gives them.

    Raises:
        ValueError: A caption has words that the model does not know; an argument is out of range;
            the model cannot paint videos.
    """
    if not hasattr(wan.model, "rope") or not callable(wan.processor):
        raise ValueError(
            f"wan: expected a video model such as zoo.load('wan-shapes'), got {wan.name!r}"
        )
    if isinstance(captions, str) or not captions:
        raise ValueError(f"captions: expected a list of at least one, got {captions!r}")
    if frames < 1 or batch_size < 1:
        raise ValueError(
            f"frames, batch_size: expected at least 1 each, got {frames} and {batch_size}"
        )
    seeds = row_seeds(seed, len(captions))
    with torch.no_grad():
        condition, nothing = wan.processor(list(captions)), wan.processor([""])
    parts = [
        sample_flow(
            wan.model,
            condition[start : start + batch_size],
            shape=(3, frames, SIDE, SIDE),
            steps=steps,
            guidance_scale=guidance_scale,
            unconditional=nothing,
            shift=SHIFT,
            seed=seeds[start : start + batch_size],
            on_step=on_step,
        )
        for start in range(0, len(captions), batch_size)
    ]
    return ((torch.cat(parts).transpose(1, 2) + 1) / 2).clamp(0, 1)
