"""A small real experiment, as a paper's module would be: pi from the share of points in a circle.

Two environment variables serve the tests: a file that gets a line whenever a run starts, and a file
whose absence lets seed 2 kill its own process halfway, once.
"""

import math
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers import Figure, Paper, Reproduction, Rule, Scale, Series, Verdict

LOG = "ATTENDING_TEST_LOG"
DIES_UNLESS = "ATTENDING_TEST_DIES_UNLESS"
PAUSE = "ATTENDING_TEST_PAUSE"


def judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    if all(abs(value - math.pi) < 0.1 for value in ours["pi"]):
        return "held"
    near = all(abs(value - math.pi) < 1.0 for value in ours["pi"])
    return "held in direction" if near else "did not hold"


PAPER = Paper(
    slug="pi-points",
    title="Pi by counting points",
    arxiv=None,
    date="1812-01",
    venue=None,
    purpose="Gives pi to those who have random numbers and no series.",
    claim="Four times the share of random points that lie in the circle is pi.",
    figures=(
        Figure("pi", "3.14159", "recall", measurement="pi"),
        Figure("digits by hand", "707", "recall"),
    ),
    extension_points=("random.Random",),
    status="built",
    symbols=("random.Random",),
    rule=Rule("held if every seed is within 0.1 of pi, in direction if within 1", judge),
)


def settings(scale: Scale) -> dict[str, Any]:
    return {"points": {"smoke": 300, "small": 20_000, "full": 10**6}[scale]}


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    if LOG in os.environ:
        with open(os.environ[LOG], "a") as log:
            log.write(f"{scale} {seed}\n")
    points = settings(scale)["points"]
    generator = random.Random(seed)
    inside, numbers, estimates = 0, [], []
    for number in range(1, points + 1):
        inside += generator.random() ** 2 + generator.random() ** 2 < 1
        if number % (points // 10) == 0:
            numbers.append(number)
            estimates.append(4 * inside / number)
            time.sleep(float(os.environ.get(PAUSE, "0")))
        if number == points // 2 and seed == 2:
            _die_once()
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements={"pi": 4 * inside / points, "inside": inside},
        series=(Series("estimate", numbers, estimates, "pi", "points", "estimate"),),
        settings=settings(scale),
    )


def _die_once() -> None:
    if DIES_UNLESS in os.environ and not Path(os.environ[DIES_UNLESS]).exists():
        Path(os.environ[DIES_UNLESS]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
