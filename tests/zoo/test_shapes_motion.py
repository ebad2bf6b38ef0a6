"""Moving scenes: frames, masks and words must agree on what moves where."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.zoo import shapes
from attending.zoo.shapes_motion import (
    DIRECTIONS,
    LONGEST,
    SHORTEST,
    make_moving_scene,
    make_moving_scenes,
    render_videos,
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), frames=st.integers(1, 16))
def test_objects_go_where_the_words_say(seed: int, frames: int) -> None:
    moving = make_moving_scene(seed, frames)
    assert moving == make_moving_scene(seed, frames)
    assert len(moving.frames) == frames
    velocities = moving.velocities()
    assert velocities.shape == (len(moving.directions), 2)
    for index, direction in enumerate(moving.directions):
        way = torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
        places = torch.tensor([[f.objects[index].x, f.objects[index].y] for f in moving.frames])
        assert places.min() >= 0.09
        assert places.max() <= 0.91
        steps = places.diff(dim=0)
        torch.testing.assert_close(
            steps, velocities[index].expand_as(steps), atol=1e-5, rtol=0, check_dtype=False
        )
        travelled = places[-1] - places[0]
        if direction and frames > 1:
            assert SHORTEST - 1e-4 < travelled.norm() < LONGEST + 1e-4
            assert (travelled / travelled.norm() - way).abs().max() < 1e-3
        else:
            assert not travelled.any()


def test_pixels_of_the_ground_never_change() -> None:
    """What differs between two frames lies where an object was or is, up to its smoothed edge."""
    for moving in make_moving_scenes(10, 3, frames=8):
        video, masks = moving.video(48), moving.masks(48)
        assert video.shape == (8, 3, 48, 48)
        assert masks.shape == (8, len(moving.directions), 48, 48)
        assert torch.equal(moving.foreground(48), masks.any(1))
        touched = masks.any(1).any(0).float()[None, None]
        near = torch.nn.functional.max_pool2d(touched, 5, stride=1, padding=2)[0, 0] > 0
        changed = (video - video[0]).abs().amax((0, 1)) > 0
        assert not (changed & ~near).any()
        assert bool(changed.any()) == any(moving.directions)
        assert not (moving.moving(48) & ~moving.foreground(48)).any()
        for time, frame in enumerate(moving.frames):
            assert torch.equal(frame.masks(48), masks[time])


def test_captions_tell_every_object() -> None:
    seen: set[str] = set()
    for moving in make_moving_scenes(60, 5):
        first = moving.frames[0]
        assert sorted(shapes.mentions(moving.caption)) == sorted(first.names)
        for thing, direction in zip(first.objects, moving.directions, strict=True):
            words = f"moving {direction}" if direction else "standing still"
            assert f"{thing.name} {words}" in moving.caption
        assert all(thing.opacity == 1 for thing in first.objects)
        seen.update(moving.directions)
    assert seen == set(DIRECTIONS)


def test_many_at_once() -> None:
    scenes = make_moving_scenes(3, 9, frames=4, still=1.0)
    assert {direction for scene in scenes for direction in scene.directions} == {""}
    videos = render_videos(scenes, 24)
    assert videos.shape == (3, 4, 3, 24, 24)
    assert torch.equal(videos[:, 0], videos[:, 3])
    assert torch.equal(videos[1], scenes[1].video(24))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="frames of at least 1, got 0"):
        make_moving_scene(0, 0)
    with pytest.raises(ValueError, match="still from 0 to 1, got 2"):
        make_moving_scene(0, still=2)
    with pytest.raises(ValueError, match=r"seed from 0 up to 2\*\*31"):
        make_moving_scene(-1)
    with pytest.raises(ValueError, match="min_objects=0"):
        make_moving_scene(0, min_objects=0)
    with pytest.raises(ValueError, match=r"lengths \[4, 5\]"):
        render_videos([make_moving_scene(0, 4), make_moving_scene(0, 5)])
