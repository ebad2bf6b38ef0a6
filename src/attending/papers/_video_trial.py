"""The same videos with and without a method: what it changes, and what it saves.

    trial = video_trial({"sparse": BlockSparse(planner), "cached": cache}, seeds=(0, 1, 2))
    print(trial.table())
    trial.mean("sparse", "psnr"), trial.spread("sparse", "psnr"), trial.mean("sparse", "density")

``wan-shapes`` paints the captions of held-out scenes once as it is, "dense", and once within each
method, all from the same noise.  How near a method's videos come to the dense ones is what papers
on faster attention report (PSNR, SSIM, relative error); it is no measure of how good either is.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from attending import zoo
from attending.probes.image_quality import psnr, ssim
from attending.zoo.entry import ZooModel
from attending.zoo.shapes_motion import make_moving_scenes
from attending.zoo.video_tasks import make_videos

DENSE = "dense"
# In decibels: equal videos have an infinite PSNR, which has no mean and no place in JSON.
HIGHEST_PSNR = 100.0
# Called with the model: a context manager, within which the model does as the method wants; what it
# yields may be the run of an intervention.  None leaves the model as it is.
Method = Callable[[nn.Module], AbstractContextManager[Any]] | None


@dataclass(frozen=True)
class VideoScore:
    """The videos of one method from one seed, against the dense ones.

    Attributes:
        method: Its name.
        seed: Of the scenes and the noise.
        psnr: In decibels, the mean over frames, each at most :data:`HIGHEST_PSNR`.
        ssim: The mean over frames.
        relative_l2: ``||video - dense|| / ||dense||`` with colours from -1 to 1, over all videos.
        seconds: Passed on the clock.
        cpu_seconds: Spent by the processor, which other programs disturb less.
        seconds_ratio: ``seconds`` by those of dense from the same seed; below 1 is faster.
        cpu_ratio: The same of ``cpu_seconds``.
        stats: What the run of an intervention counted (``run.stats``); empty if there is no run.
    """

    method: str
    seed: int
    psnr: float
    ssim: float
    relative_l2: float
    seconds: float
    cpu_seconds: float
    seconds_ratio: float
    cpu_ratio: float
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoTrial:
    """All scores, and what was painted.

    Attributes:
        scores: Of every method, dense first, for every seed.
        videos: Of the first seed, by method, ``[videos, frames, 3, height, width]`` in [0, 1].
        captions: Of these videos.
    """

    scores: tuple[VideoScore, ...]
    videos: dict[str, Float[Tensor, "videos frames 3 height width"]]
    captions: tuple[str, ...]

    @property
    def methods(self) -> list[str]:
        """Their names, dense first."""
        return list(dict.fromkeys(score.method for score in self.scores))

    def values(self, method: str, figure: str) -> list[float]:
        """A field of :class:`VideoScore` or, if there is none of that name, of its ``stats``.

        One number a seed.

        Raises:
            ValueError: There is no such method, or no such figure of it.
        """
        scores = [score for score in self.scores if score.method == method]
        if not scores:
            raise ValueError(f"method: expected one of {self.methods}, got {method!r}")
        plain = figure in VideoScore.__dataclass_fields__ and figure not in ("method", "stats")
        if not plain and any(figure not in score.stats for score in scores):
            raise ValueError(
                f"figure: expected a field of VideoScore or one of {sorted(scores[0].stats)} for "
                f"{method!r}, got {figure!r}"
            )
        return [float(getattr(score, figure) if plain else score.stats[figure]) for score in scores]

    def mean(self, method: str, figure: str) -> float:
        """Over the seeds; see :meth:`values`."""
        return fmean(self.values(method, figure))

    def spread(self, method: str, figure: str) -> float:
        """Standard deviation over the seeds; 0 for a single seed."""
        values = self.values(method, figure)
        return stdev(values) if len(values) > 1 else 0.0

    def table(self) -> str:
        """Means over the seeds as a table in Markdown, the spread of PSNR beside it."""
        lines = [
            "| method | PSNR (dB) | SSIM | relative L2 | seconds / dense | CPU / dense | density |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in self.methods:
            psnr_mean, psnr_spread = self.mean(method, "psnr"), self.spread(method, "psnr")
            has_density = all("density" in s.stats for s in self.scores if s.method == method)
            cells = [
                method,
                f"{psnr_mean:.2f} ± {psnr_spread:.2f}",
                f"{self.mean(method, 'ssim'):.4f}",
                f"{self.mean(method, 'relative_l2'):.4f}",
                f"{self.mean(method, 'seconds_ratio'):.2f}",
                f"{self.mean(method, 'cpu_ratio'):.2f}",
                f"{self.mean(method, 'density'):.3f}" if has_density else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def video_trial(
    methods: Mapping[str, Method],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    videos_per_seed: int = 4,
    steps: int = 20,
    frames: int = 8,
    guidance_scale: float = 3.0,
    steps_of: Mapping[str, int] | None = None,
    wan: ZooModel | None = None,
) -> VideoTrial:
    """Paint the same videos with each method.

    Dense runs first for every seed, then the methods in turn, each seed beginning with another
    one; so what slows the machine down for a while slows all of them.  One short dense run before
    all others, which is not counted, warms up.

    Args:
        methods: By name; an entry "dense" is left out, as dense is always there.
        seeds: One set of scenes and noise for each.
        videos_per_seed: Painted as one batch.
        steps: Of the sampler.
        frames: Of a video, 8 or 16.
        guidance_scale: As for :func:`attending.zoo.video_tasks.make_videos`; 1 halves the time.
        steps_of: Other numbers of steps for some methods, such as a distilled model's.
        wan: The model; ``None`` is ``zoo.load("wan-shapes")``.

    Raises:
        ValueError: No method or seed; ``steps_of`` names a method that is not there.
    """
    names = [name for name in methods if name != DENSE]
    if not names or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"methods, seeds: expected at least one each, seeds once each, got {list(methods)} and "
            f"{list(seeds)}"
        )
    if videos_per_seed < 1:
        raise ValueError(f"videos_per_seed: expected at least 1, got {videos_per_seed}")
    own_steps = dict(steps_of or {})
    if unknown := sorted(set(own_steps) - set(names)):
        raise ValueError(f"steps_of: expected names of methods, got {unknown}; they are {names}")
    wan = zoo.load("wan-shapes") if wan is None else wan
    scores: dict[tuple[int, str], VideoScore] = {}
    shown: dict[str, Tensor] = {}
    told: tuple[str, ...] = ()

    def paint(method: Method, captions: Sequence[str], seed: int, steps: int) -> "_Painted":
        return _paint(
            wan,
            method,
            captions,
            seed=1000 * seed,
            frames=frames,
            steps=steps,
            guidance_scale=guidance_scale,
        )

    for number, seed in enumerate(seeds):
        captions = tuple(
            scene.caption
            for scene in make_moving_scenes(
                videos_per_seed, seed, frames, min_objects=1, max_objects=2
            )
        )
        if not number:
            told = captions
            paint(None, captions, seed, 1)
        turn = number % len(names)
        dense = paint(None, captions, seed, steps)
        painted = {DENSE: dense}
        for name in [*names[turn:], *names[:turn]]:
            painted[name] = paint(methods[name], captions, seed, own_steps.get(name, steps))
        for name, own in painted.items():
            scores[seed, name] = _score(name, seed, own, dense)
        if not number:
            shown = {name: painted[name].videos for name in [DENSE, *names]}
    order = [(seed, name) for name in [DENSE, *names] for seed in seeds]
    return VideoTrial(tuple(scores[key] for key in order), shown, told)


@dataclass(frozen=True, eq=False)
class _Painted:
    videos: Tensor
    seconds: float
    cpu_seconds: float
    stats: dict[str, float]


def _paint(
    wan: ZooModel, method: Method, captions: Sequence[str], *, seed: int, **settings: Any
) -> _Painted:
    block = nullcontext() if method is None else method(wan.model)
    with block as run:
        clock, cpu = time.perf_counter(), time.process_time()
        videos = make_videos(wan, captions, seed=seed, batch_size=len(captions), **settings)
        seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    stats = getattr(run, "stats", None) or {}
    return _Painted(videos, seconds, cpu_seconds, {name: float(v) for name, v in stats.items()})


def _score(name: str, seed: int, own: _Painted, dense: _Painted) -> VideoScore:
    frames, truth = own.videos.flatten(0, 1), dense.videos.flatten(0, 1)
    near = psnr(frames, truth).clamp(max=HIGHEST_PSNR)
    if bool(near.isnan().any()):
        raise ValueError(f"methods: expected finite videos, got NaN from {name!r}")
    error = (own.videos - dense.videos).norm() / (dense.videos - 0.5).norm()
    return VideoScore(
        method=name,
        seed=seed,
        psnr=float(near.mean()),
        ssim=float(ssim(frames, truth).mean()),
        relative_l2=float(error) if math.isfinite(error) else math.inf,
        seconds=own.seconds,
        cpu_seconds=own.cpu_seconds,
        seconds_ratio=own.seconds / dense.seconds,
        cpu_ratio=own.cpu_seconds / dense.cpu_seconds,
        stats=own.stats,
    )
