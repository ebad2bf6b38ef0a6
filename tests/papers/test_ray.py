"""`--all --ray`: two local workers, one of them killed midway, and still every run exactly once."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from attending.papers import Summary
from attending.papers._experiment import Experiment
from attending.papers._ray import on_ray
from attending.papers._run import run_experiments
from tests.papers import pi

ray = pytest.importorskip("ray", reason="needs the extra sweep")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray of two workers; gives the log of the runs that they start."""
    log = tmp_path / "log"
    monkeypatch.setenv(pi.LOG, str(log))
    monkeypatch.setenv(pi.DIES_UNLESS, str(tmp_path / "died"))
    monkeypatch.setenv(pi.PAUSE, "0.05")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield log
    ray.shutdown()


@pytest.mark.slow
def test_one_of_two_workers_killed(
    cluster: Path, pi_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    told: list[tuple[str, str, int]] = []
    sweep = run_experiments(
        [pi_experiment],
        scale="small",
        seeds=6,
        out_dir=out,
        execute=on_ray(),
        watch=lambda *event: told.append(event),
    )
    assert (tmp_path / "died").exists()
    assert ray.is_initialized(), "a Ray that was running stays so"
    assert sweep.failures == ()
    assert Counter(told) == {("finished", "pi-points", seed): 1 for seed in range(6)}
    attempts = Counter(cluster.read_text().splitlines())
    assert attempts == {f"small {seed}": 2 if seed == 2 else 1 for seed in range(6)}
    summary = Summary.from_json((out / "pi-points.json").read_text(encoding="utf-8"))
    assert summary.seeds == tuple(range(6))
    monkeypatch.setenv(pi.PAUSE, "0")
    here = [pi.reproduce("small", seed, out).measurements["pi"] for seed in range(6)]
    assert summary.measurements["pi"].values == tuple(here)
    assert len(list((out / "runs" / "pi-points").glob("small-*.json"))) == 6

    before = len(cluster.read_text().splitlines())
    again = run_experiments(
        [pi_experiment], scale="small", seeds=6, out_dir=out, execute=on_ray(), picture=False
    )
    assert again.summaries == sweep.summaries
    assert len(cluster.read_text().splitlines()) == before, "what is stored is not run again"


@pytest.mark.slow
def test_ray_that_was_not_running_is_started_and_left(
    pi_experiment: Experiment, tmp_path: Path
) -> None:
    sweep = run_experiments(
        [pi_experiment], scale="smoke", out_dir=tmp_path, execute=on_ray(), picture=False
    )
    assert [summary.seeds for summary in sweep.summaries] == [(0,)]
    assert not ray.is_initialized()
