"""Does a painted video show what its caption says?  Colour and motion of a single object.

>>> from attending.zoo.shapes_motion import make_moving_scenes, render_videos
>>> from attending.zoo.video_checks import single_colors, single_motions
>>> scenes = make_moving_scenes(2, 5, max_objects=1)
>>> scenes[0].caption
'an orange star moving up on a striped background.'
>>> single_colors(render_videos(scenes)), single_motions(render_videos(scenes))
(['orange', 'yellow'], ['up', 'up'])


These are rules on pixels, so they err now and then even on videos of the world itself (1 in 30);
:func:`caption_scores` of those is what a perfect painter would reach.  Shapes are not looked at.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attending.zoo._shapes_render import RGB
from attending.zoo._shapes_world import COLORS
from attending.zoo.shapes_motion import MovingScene

# How far a colour must be from that of its row's ground to count as an object's.
STANDS_OUT = 0.15
# An object that travels less than this, as a fraction of the side, stands still; in the world of
# `shapes_motion` objects travel nothing or at least a quarter.
STANDS_STILL = 0.125


def foreground(
    videos: Float[Tensor, "videos frames 3 height width"],
) -> Bool[Tensor, "videos frames height width"]:
    """The pixels that differ clearly from the median of their row, after smoothing over 3 x 3."""
    smooth = F.avg_pool2d(videos.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False)
    ground = smooth.median(-1, keepdim=True).values
    differs = (smooth - ground).abs().amax(1) > STANDS_OUT
    mask: Tensor = differs.unflatten(0, videos.shape[:2])
    return mask


def single_colors(videos: Float[Tensor, "videos frames 3 height width"]) -> list[str]:
    """The colour that most pixels of the foreground are nearest to; ``""`` if nothing stands out.

    For videos of one object.
    """
    palette = torch.tensor([RGB[name] for name in COLORS])
    found = []
    for video, mask in zip(videos, foreground(videos), strict=True):
        pixels = video.permute(0, 2, 3, 1)[mask]
        if not len(pixels):
            found.append("")
            continue
        votes = torch.cdist(pixels, palette).argmin(1)
        found.append(COLORS[int(votes.mode().values)])
    return found


def single_motions(videos: Float[Tensor, "videos frames 3 height width"]) -> list[str | None]:
    """Where the foreground's centre goes from the first frame to the last.

    For videos of one object: ``"left"``, ``"right"``, ``"up"``, ``"down"``, ``""`` if it stands
    still, ``None`` if nothing stands out at the start or at the end.
    """
    ends = foreground(videos)[:, [0, -1]].double()
    height, width = ends.shape[-2:]
    mass = ends.sum((-2, -1))
    x = (ends.sum(-2) * (torch.arange(width) / width)).sum(-1) / mass
    y = (ends.sum(-1) * (torch.arange(height) / height)).sum(-1) / mass
    found: list[str | None] = []
    for right, down in zip((x[:, 1] - x[:, 0]).tolist(), (y[:, 1] - y[:, 0]).tolist(), strict=True):
        if right != right or down != down:  # no mass, so no centre
            found.append(None)
        elif max(abs(right), abs(down)) < STANDS_STILL:
            found.append("")
        elif abs(right) > abs(down):
            found.append("right" if right > 0 else "left")
        else:
            found.append("down" if down > 0 else "up")
    return found


def caption_scores(
    videos: Float[Tensor, "videos frames 3 height width"], scenes: Sequence[MovingScene]
) -> dict[str, float]:
    """The shares of videos whose object has the colour and the motion of its scene's caption.

    Args:
        videos: Painted from the captions, or the scenes' own, which gives the ceiling.
        scenes: Of one object each.

    Returns:
        ``color`` (a guess would be right in 1 of 8), ``motion`` (1 of 5) and ``both``.

    Raises:
        ValueError: Not one video for each scene, or a scene of several objects.
    """
    if len(videos) != len(scenes) or not scenes:
        raise ValueError(
            f"videos, scenes: expected one video for each scene, got {len(videos)} and "
            f"{len(scenes)}"
        )
    if any(len(scene.directions) != 1 for scene in scenes):
        raise ValueError(
            "scenes: expected scenes of one object, got some of more; draw them with max_objects=1"
        )
    color = [
        found == scene.frames[0].objects[0].color
        for found, scene in zip(single_colors(videos), scenes, strict=True)
    ]
    motion = [
        found == scene.directions[0]
        for found, scene in zip(single_motions(videos), scenes, strict=True)
    ]
    both = [a and b for a, b in zip(color, motion, strict=True)]
    return {
        name: sum(right) / len(scenes)
        for name, right in (("color", color), ("motion", motion), ("both", both))
    }
