"""The checks of painted videos must be right about videos whose truth is known."""

import pytest
import torch

from attending.zoo.shapes_motion import make_moving_scenes, render_videos
from attending.zoo.video_checks import (
    caption_scores,
    foreground,
    single_colors,
    single_motions,
)


@pytest.mark.parametrize("frames", [2, 8])
def test_the_world_itself_passes(frames: int) -> None:
    scenes = make_moving_scenes(150, 17, frames, max_objects=1)
    videos = render_videos(scenes)
    scores = caption_scores(videos, scenes)
    assert scores["color"] > 0.93
    assert scores["motion"] > 0.95
    assert scores["both"] <= min(scores["color"], scores["motion"])
    truth = torch.stack([scene.foreground() for scene in scenes])
    found = foreground(videos)
    both, either = (found & truth).sum(), (found | truth).sum()
    assert both / either > 0.6


def test_wrong_videos_fail() -> None:
    scenes = make_moving_scenes(80, 3, 8, max_objects=1)
    videos = render_videos(scenes)
    shuffled = caption_scores(videos.roll(1, 0), scenes)
    assert shuffled["color"] < 0.35  # colours are not all as common
    assert shuffled["motion"] < 0.35
    reversed_scores = caption_scores(videos.flip(1), scenes)
    moving = sum(bool(scene.directions[0]) for scene in scenes) / len(scenes)
    assert reversed_scores["motion"] <= 1 - moving + 0.05
    assert reversed_scores["color"] == caption_scores(videos, scenes)["color"]


def test_empty_videos_have_neither_colour_nor_motion() -> None:
    blank = torch.full((2, 4, 3, 32, 32), 0.5)
    assert single_colors(blank) == ["", ""]
    assert single_motions(blank) == [None, None]


def test_bad_input() -> None:
    scenes = make_moving_scenes(2, 0, 4, min_objects=2, max_objects=2)
    videos = render_videos(scenes)
    with pytest.raises(ValueError, match="max_objects=1"):
        caption_scores(videos, scenes)
    with pytest.raises(ValueError, match="got 1 and 2"):
        caption_scores(videos[:1], scenes)
