"""The experiment of ProfilingDiT: which blocks of wan-shapes to cache, and when to compute them.

For each seed:

1. Profile. Clips of `zoo.shapes_motion`, whose foreground is known to the pixel, are mixed with
   noise as the model was trained, at the levels of the sampler, and the model looks at them. Their
   scenes are others than those that are painted later.
2. Calibrate. Videos of those other scenes are painted without a cache; TeaCache's polynomial is
   fitted to them, and the thresholds of TeaCache and First Block Cache are set so that they compute
   as many blocks as the others.
3. Paint the same captions from the same noise with every method, and compare with the videos
   without a cache: `attending.papers._video_trial`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attending.diffusion.flow_matching import noise_levels
from attending.interventions.cache_schedule import (
    DecreasingSteps,
    FixedSteps,
    UniformSteps,
    block_calls,
)
from attending.interventions.diffusers_caches import FirstBlockCache, PyramidAttentionBroadcast
from attending.interventions.drift_calibration import DriftCalibration, calibrate_drift
from attending.interventions.drift_schedule import relative_l1
from attending.interventions.feature_cache import ProfilingCache
from attending.interventions.intervention import InterventionWarning
from attending.interventions.output_cache import FORA
from attending.papers._video_trial import VideoTrial, video_trial
from attending.probes.block_profile import BlockProfile, profile_blocks
from attending.probes.foreground import foreground_tokens, step_moves
from attending.zoo.entry import ZooModel
from attending.zoo.shapes_motion import make_moving_scenes
from attending.zoo.video_tasks import SHIFT, make_videos

LISTS = ("background", "foreground", "mixed")
SCHEDULES = ("stepwise", "uniform", "inverse")
PEERS = ("all_blocks", "teacache", "fora", "first_block", "pab", "fewer_steps")
PATCH = (1, 4, 4)
OTHER_SCENES = 5000  # seeds of profiling and calibration are these above those of painting


@dataclass(frozen=True)
class Budget:
    """What all methods have to spend.

    Attributes:
        steps: of the sampler.
        warmup: first steps that are computed in any case.
        interval: of the uniform schedule.
        longest: first gap of the stepwise schedule.
        blocks: of the model.
        cached: how many blocks a list holds.
    """

    steps: int
    warmup: int
    interval: int
    longest: float
    blocks: int
    cached: int

    @property
    def schedules(self) -> dict[str, UniformSteps | DecreasingSteps]:
        """The three, by name, which compute equally many steps.

        Raises:
            ValueError: if they do not.
        """
        found: dict[str, UniformSteps | DecreasingSteps] = {
            "stepwise": DecreasingSteps(self.steps, self.warmup, self.longest),
            "uniform": UniformSteps(self.interval, self.warmup),
            "inverse": DecreasingSteps(self.steps, self.warmup, self.longest, inverse=True),
        }
        counts = {name: len(schedule.computed(self.steps)) for name, schedule in found.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"longest: expected schedules that compute equally many steps, got {counts}; "
                "choose another."
            )
        return found

    @property
    def density(self) -> float:
        """The share of block calls that lists with these schedules compute."""
        computed = self.schedules["uniform"].computed(self.steps)
        calls = block_calls(computed, self.steps, self.blocks, self.cached)
        return calls / (self.steps * self.blocks)

    @property
    def whole_steps(self) -> int:
        """How many steps can be computed in full for the same number of block calls."""
        return min(self.steps - 1, round(self.density * self.steps))

    def spread_evenly(self) -> FixedSteps:
        """That many steps: the warm-up, and the others evenly over the rest."""
        rest, count = self.steps - self.warmup, max(1, self.whole_steps - self.warmup)
        chosen = tuple(self.warmup + (rest * number) // count for number in range(count))
        return FixedSteps(chosen, self.warmup)


def profile(wan: ZooModel, seed: int, clips: int, frames: int, levels: int) -> BlockProfile:
    """R of the blocks of wan-shapes on noised clips whose foreground is known."""
    scenes = make_moving_scenes(clips, OTHER_SCENES + seed, frames, min_objects=1, max_objects=2)
    videos = torch.stack([scene.video() for scene in scenes]).transpose(1, 2) * 2 - 1
    masks = torch.stack([foreground_tokens(scene.foreground(), PATCH) for scene in scenes])
    generator = torch.Generator().manual_seed(OTHER_SCENES + seed)
    noise = torch.randn(videos.shape, generator=generator)
    states = wan.processor([scene.caption for scene in scenes])

    def look() -> None:
        for level in noise_levels(levels, SHIFT)[:-1].tolist():
            noised = (1 - level) * videos + level * noise
            time = torch.full((clips,), 1000 * level)
            wan.model(hidden_states=noised, timestep=time, encoder_hidden_states=states)

    return profile_blocks(wan.model, look, masks, frames=frames)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What videos without a cache show.

    Attributes:
        tea: the polynomial of TeaCache, and its threshold for a share of the steps.
        first_threshold: with which First Block Cache computes as many blocks as the budget has.
        moves: mean |v[s] - v[s-1]| of the predictions.
    """

    tea: DriftCalibration
    first_threshold: float
    moves: Tensor


def calibrate(wan: ZooModel, seed: int, budget: Budget, videos: int, frames: int) -> Calibration:
    """What the caches that go by drift are set to, from videos of other scenes."""
    first: list[Tensor] = []
    predictions: list[Tensor] = []
    scenes = make_moving_scenes(videos, OTHER_SCENES + seed, frames, min_objects=1, max_objects=2)

    def keep_first(module: nn.Module, args: Any, output: Tensor) -> None:
        first.append((output - args[0]).clone())

    def paint() -> None:
        make_videos(
            wan,
            [scene.caption for scene in scenes],
            seed=OTHER_SCENES + seed,
            frames=frames,
            steps=budget.steps,
            guidance_scale=1.0,
        )

    blocks: Any = wan.model.blocks
    handles = [
        blocks[0].register_forward_hook(keep_first),
        wan.model.register_forward_hook(lambda m, args, out: predictions.append(_sample(out))),
    ]
    try:
        tea = calibrate_drift(wan.model, paint, degree=min(4, budget.steps - 2))
    finally:
        for handle in handles:
            handle.remove()

    def first_block(threshold: float) -> int:
        computed, last = 1, first[0]
        for residual in first[1:]:
            if relative_l1(last, residual) > threshold:
                computed, last = computed + 1, residual
        return computed

    whole = budget.density * budget.steps * budget.blocks
    beyond_first = (whole - budget.steps) / (budget.blocks - 1)
    return Calibration(
        tea, _threshold(first_block, round(beyond_first)), step_moves(predictions)[0]
    )


def _threshold(computed: Callable[[float], int], wanted: int) -> float:
    """The threshold with which about so many steps are computed; fewer with a higher one."""
    low, high = 0.0, 1.0
    while computed(high) > wanted and high < 1e6:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if computed(middle) > wanted:
            low = middle
        else:
            high = middle
    return high


def _sample(output: Any) -> Tensor:
    found: Tensor = output.sample if hasattr(output, "sample") else output[0]
    return found.detach().clone()


def measure(
    wan: ZooModel,
    seed: int,
    *,
    steps: int,
    warmup: int,
    interval: int,
    longest: float,
    cached: int,
    videos: int,
    frames: int,
    clips: int,
    levels: int,
    lists: Sequence[str],
) -> tuple[dict[str, float], BlockProfile, Tensor]:
    """All numbers of one seed; the profile, and how far the predictions move at each step."""
    blocks: Any = wan.model.blocks
    budget = Budget(steps, warmup, interval, longest, len(blocks), cached)
    profiled = profile(wan, seed, clips, frames, levels)
    calibrated = calibrate(wan, seed, budget, videos, frames)
    half = cached // 2
    mixed = {*profiled.least(cached - half), *profiled.most(half)}
    chosen = {
        "background": profiled.least(cached),
        "foreground": profiled.most(cached),
        "mixed": tuple(sorted(mixed)),
    }
    methods: dict[str, Any] = {
        f"{which}_{when}": ProfilingCache(chosen[which], schedule)
        for which in lists
        for when, schedule in budget.schedules.items()
    }
    methods |= {
        "all_blocks": ProfilingCache(None, budget.spread_evenly()),
        "teacache": calibrated.tea.teacache(budget.whole_steps / steps),
        "fora": FORA(2, warmup=max(0, 2 * budget.whole_steps - steps)),
        "first_block": FirstBlockCache(calibrated.first_threshold),
        "pab": PyramidAttentionBroadcast(spatial=2, cross=2),
        "fewer_steps": None,
    }
    with warnings.catch_warnings():
        # A cache that reused nothing has a density of 1, which is reported.
        warnings.simplefilter("ignore", InterventionWarning)
        trial = video_trial(
            methods,
            seeds=(seed,),
            videos_per_seed=videos,
            steps=steps,
            frames=frames,
            guidance_scale=1.0,
            steps_of={"fewer_steps": budget.whole_steps},
            wan=wan,
        )
    numbers = _numbers(trial, methods, budget, profiled, chosen)
    numbers["teacache_fit_error"] = calibrated.tea.error
    return numbers, profiled, calibrated.moves


def _numbers(
    trial: VideoTrial,
    methods: dict[str, Any],
    budget: Budget,
    profiled: BlockProfile,
    chosen: dict[str, tuple[int, ...]],
) -> dict[str, float]:
    numbers = {}
    for name in methods:
        for figure in ("psnr", "ssim", "relative_l2", "cpu_ratio", "seconds_ratio"):
            numbers[f"{figure}_{name}"] = trial.mean(name, figure)
        numbers[f"computed_{name}"] = (
            budget.whole_steps / budget.steps
            if name == "fewer_steps"
            else trial.mean(name, "density")
        )
    ratio = profiled.ratio
    numbers["ratio_lowest"], numbers["ratio_highest"] = float(ratio.min()), float(ratio.max())
    # How well the order of blocks at a single level of noise agrees with that of their mean.
    least = set(chosen["background"])
    per_level = [
        len(least & set(row.argsort(stable=True)[: len(least)].tolist())) / max(1, len(least))
        for row in profiled.ratio_per_step
    ]
    numbers["same_blocks_at_each_level"] = sum(per_level) / len(per_level)
    numbers |= {f"ratio_{block}": float(value) for block, value in enumerate(ratio)}
    return numbers
