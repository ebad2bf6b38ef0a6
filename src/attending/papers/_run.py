"""Running experiments: seed by seed, each finished run stored at once, interrupted ones resumed."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from attending.papers._experiment import Experiment
from attending.papers._json import write_whole
from attending.papers._picture import draw, require_matplotlib
from attending.papers._record import SCALES, Scale
from attending.papers._reproduction import Reproduction, this_machine
from attending.papers._store import Store, StoredRun
from attending.papers._summary import Summary, check_measurements, summarize

FEWEST_SEEDS: dict[Scale, int] = {"smoke": 1, "small": 3, "full": 3}


@dataclass(frozen=True)
class Task:
    """One run to be made.

    Args:
        experiment: What to run.
        scale: At which scale.
        seed: With which seed.
        fingerprint: That of the experiment, taken before anything runs.
        work_dir: The folder that the run may write to.
    """

    experiment: Experiment
    scale: Scale
    seed: int
    fingerprint: str
    work_dir: Path


Event = Literal["stored", "finished", "failed"]
Watch = Callable[[Event, str, int], None]  # what happened, slug, seed
Execute = Callable[[Sequence[Task]], Iterable[tuple[Task, Reproduction | Exception]]]


@dataclass(frozen=True)
class Failure:
    """A run that raised, or, with seed None, a summary that could not be made of the runs."""

    slug: str
    seed: int | None
    error: Exception


@dataclass(frozen=True)
class Sweep:
    """What became of a set of papers. A paper with a failure has no summary."""

    summaries: tuple[Summary, ...]
    failures: tuple[Failure, ...]


def run_experiments(
    experiments: Sequence[Experiment],
    *,
    scale: Scale,
    seeds: int | None = None,
    out_dir: Path,
    execute: Execute | None = None,
    picture: bool = True,
    fresh: bool = False,
    watch: Watch | None = None,
) -> Sweep:
    """Run each experiment for seeds `0 .. seeds - 1` and write `<slug>.json` and `<slug>.png`.

    A run that is stored in `out_dir` with the same fingerprint is not made again. A failed run does
    not stop the others.

    Args:
        experiments: What to run, in this order.
        scale: `smoke`, `small` or `full`.
        seeds: How many; None takes the fewest that the scale allows (1, 3, 3).
        out_dir: The folder of the results.
        execute: Makes the runs; None makes them here, one after another.
        picture: Whether to draw the picture, which needs matplotlib.
        fresh: Whether to make stored runs again.
        watch: Told of every run: what happened, the slug, the seed.

    Returns:
        A summary of each paper, and the failures.

    Raises:
        ValueError: An unknown scale, or too few seeds for it.
        ImportError: matplotlib is missing; before anything is run.
    """
    count = _checked_seeds(scale, seeds)
    if picture:
        require_matplotlib()
    store, tell = Store(Path(out_dir)), watch or (lambda event, slug, seed: None)
    runs: dict[str, dict[int, StoredRun]] = {one.paper.slug: {} for one in experiments}
    tasks = []
    for experiment in experiments:
        slug, fingerprint = experiment.paper.slug, experiment.fingerprint(scale)
        for seed in range(count):
            stored = None if fresh else store.load(slug, scale, seed, fingerprint)
            if stored is not None:
                runs[slug][seed] = stored
                tell("stored", slug, seed)
            else:
                work_dir = store.work_dir(slug, scale, seed, fingerprint)
                tasks.append(Task(experiment, scale, seed, fingerprint, work_dir))

    summaries: dict[str, Summary] = {}
    failures: list[Failure] = []

    def conclude(experiment: Experiment) -> None:
        slug = experiment.paper.slug
        try:
            summaries[slug] = _write_summary(store, experiment, runs[slug], scale, picture)
        except Exception as error:  # the runs are stored; other papers go on
            failures.append(Failure(slug, None, error))

    for task, result in (execute or execute_here)(tasks):
        slug = task.experiment.paper.slug
        if isinstance(result, Reproduction):
            runs[slug][task.seed] = store.save(result, task.fingerprint)
            tell("finished", slug, task.seed)
        else:
            failures.append(Failure(slug, task.seed, result))
            tell("failed", slug, task.seed)
        if len(runs[slug]) == count:  # at once, so that an interruption leaves whole papers
            conclude(task.experiment)
    failed = {failure.slug for failure in failures}
    for experiment in experiments:
        if experiment.paper.slug not in summaries and experiment.paper.slug not in failed:
            conclude(experiment)  # all of its runs were stored
    ordered = (summaries[slug] for slug in runs if slug in summaries)
    return Sweep(tuple(ordered), tuple(failures))


def execute_here(tasks: Sequence[Task]) -> Iterator[tuple[Task, Reproduction | Exception]]:
    """Make the runs in this process, one after another."""
    for task in tasks:
        try:
            yield task, run_task(task)
        except Exception as error:
            yield task, error


def run_task(task: Task) -> Reproduction:
    """Make one run, take its time, and check that it is what was asked for."""
    slug = task.experiment.paper.slug
    task.work_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = task.experiment.reproduce(task.scale, task.seed, task.work_dir)
    seconds = time.perf_counter() - start
    if not any(task.work_dir.iterdir()):
        task.work_dir.rmdir()
    asked, came = (slug, task.scale, task.seed), (found.slug, found.scale, found.seed)
    if asked != came:
        raise ValueError(f"reproduce: expected the result of {asked}, got that of {came}")
    check_measurements(task.experiment, found, found)
    return replace(found, seconds=round(seconds, 3), machine=this_machine())


def _write_summary(
    store: Store, experiment: Experiment, runs: dict[int, StoredRun], scale: Scale, picture: bool
) -> Summary:
    slug = experiment.paper.slug
    command = f"attending reproduce {slug} --scale {scale} --seeds {len(runs)}"
    summary = summarize(experiment, list(runs.values()), command)
    write_whole(store.summary_path(slug), summary.to_json())
    if picture:
        found = [runs[seed].reproduction for seed in sorted(runs)]
        caption = f"{slug}, scale {scale}, {len(found)} seeds: {summary.verdict}"
        write_whole(store.picture_path(slug), draw(experiment, found, caption))
    return summary


def _checked_seeds(scale: Scale, seeds: int | None) -> int:
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    fewest = FEWEST_SEEDS[scale]
    count = fewest if seeds is None else seeds
    if count < fewest:
        raise ValueError(f"seeds: expected at least {fewest} at scale {scale}, got {count}")
    return count
