"""Running: results on disk, nothing run twice, an interruption resumed, failures kept apart."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attending import papers
from attending.papers import Reproduction, Scale, Summary
from attending.papers._experiment import Experiment
from attending.papers._run import run_experiments
from attending.papers._store import Store
from tests.papers import pi

PNG = b"\x89PNG\r\n\x1a\n"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gets a line for each run that starts."""
    monkeypatch.setenv(pi.LOG, str(tmp_path / "log"))
    return tmp_path / "log"


def started(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def test_results_on_disk(pi_experiment: Experiment, tmp_path: Path) -> None:
    out = tmp_path / "results"
    told: list[tuple[str, str, int]] = []
    sweep = run_experiments(
        [pi_experiment], scale="small", out_dir=out, watch=lambda *event: told.append(event)
    )
    assert told == [("finished", "pi-points", seed) for seed in range(3)]
    (summary,) = sweep.summaries
    assert summary.verdict == "held"
    assert summary.command == "attending reproduce pi-points --scale small --seeds 3"
    assert Summary.from_json((out / "pi-points.json").read_text(encoding="utf-8")) == summary
    picture = (out / "pi-points.png").read_bytes()
    assert picture.startswith(PNG)
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (990, 495)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    runs = [f"runs/pi-points/small-{seed}.json" for seed in range(3)]
    assert names == ["pi-points.json", "pi-points.png", *runs]
    stored = json.loads((out / runs[0]).read_text(encoding="utf-8"))
    alone = pi.reproduce("small", 0, out)
    assert stored["reproduction"]["measurements"] == alone.measurements
    assert stored["reproduction"]["machine"] == summary.machines[0]
    assert "torch" in summary.machines[0]


def test_stored_runs_are_not_made_again(
    pi_experiment: Experiment, tmp_path: Path, log: Path
) -> None:
    first = run_experiments([pi_experiment], scale="small", out_dir=tmp_path, picture=False)
    again = run_experiments([pi_experiment], scale="small", out_dir=tmp_path, picture=False)
    assert again == first
    assert started(log) == ["small 0", "small 1", "small 2"]
    run_experiments([pi_experiment], scale="small", seeds=5, out_dir=tmp_path, picture=False)
    assert started(log)[3:] == ["small 3", "small 4"]
    run_experiments([pi_experiment], scale="smoke", out_dir=tmp_path, picture=False)
    assert started(log)[5:] == ["smoke 0"]
    run_experiments([pi_experiment], scale="smoke", out_dir=tmp_path, picture=False, fresh=True)
    assert started(log)[6:] == ["smoke 0"]


def test_a_damaged_run_is_made_again(pi_experiment: Experiment, tmp_path: Path, log: Path) -> None:
    run_experiments([pi_experiment], scale="smoke", out_dir=tmp_path, picture=False)
    path = Store(tmp_path).run_path("pi-points", "smoke", 0)
    whole = path.read_text(encoding="utf-8")
    for damaged in (whole[: len(whole) // 2], "[]", "{}", ""):
        path.write_text(damaged, encoding="utf-8")
        run_experiments([pi_experiment], scale="smoke", out_dir=tmp_path, picture=False)
        assert json.loads(path.read_text(encoding="utf-8"))["reproduction"]["slug"] == "pi-points"
    assert len(started(log)) == 5


def test_what_changes_the_fingerprint(pi_experiment: Experiment, tmp_path: Path) -> None:
    source = Path(pi.__file__).read_text(encoding="utf-8")
    file = tmp_path / "pi.py"

    def fingerprint(old: str = "", new: str = "", **changes: Any) -> str:
        assert old in source
        file.write_text(source.replace(old, new), encoding="utf-8")
        return replace(pi_experiment, sources=(file,), **changes).fingerprint("small")

    before = fingerprint()
    # Words for people, and the plot, do not change numbers.
    assert fingerprint("def settings", "# a comment\ndef settings") == before
    assert fingerprint('"""A small real experiment', '"""Another') == before
    assert fingerprint('title="Pi by', 'title="pi by') == before
    assert fingerprint("def settings", "def plot(runs, figure): ...\n\n\ndef settings") == before
    # The computation, the settings, the rule and the scale do.
    assert fingerprint("** 2 < 1", "** 2 <= 1") != before
    assert fingerprint("< 0.1", "< 0.2") != before
    assert fingerprint(settings=lambda scale: {"points": 7}) != before
    rule = replace(pi_experiment.rule, words="held always")
    assert fingerprint(paper=replace(pi.PAPER, rule=rule)) != before
    assert pi_experiment.fingerprint("smoke") != pi_experiment.fingerprint("small")


def test_a_changed_experiment_runs_anew(with_pi: Path, tmp_path: Path, log: Path) -> None:
    first = papers.reproduce("pi-points", out_dir=tmp_path, picture=False)
    with_pi.write_text(with_pi.read_text().replace('"smoke": 300', '"smoke": 3000'))
    sys.modules.pop("attending.papers.pi_points")
    second = papers.reproduce("pi-points", out_dir=tmp_path, picture=False)
    assert (first.settings, second.settings) == ({"points": 300}, {"points": 3000})
    assert started(log) == ["smoke 0", "smoke 0"]


@pytest.mark.parametrize(
    ("scale", "seeds", "message"),
    [
        ("small", 2, "seeds: expected at least 3 at scale small, got 2"),
        ("full", 1, "seeds: expected at least 3 at scale full, got 1"),
        ("smoke", 0, "seeds: expected at least 1 at scale smoke, got 0"),
        ("huge", 3, "scale: expected one of smoke, small, full, got 'huge'"),
    ],
)
def test_refused_before_work(
    pi_experiment: Experiment, tmp_path: Path, log: Path, scale: Scale, seeds: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_experiments([pi_experiment], scale=scale, seeds=seeds, out_dir=tmp_path)
    assert started(log) == []


def test_missing_matplotlib_is_told_before_work(
    pi_experiment: Experiment, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"attending\[prove\]"):
        run_experiments([pi_experiment], scale="smoke", out_dir=tmp_path)
    assert started(log) == []
    assert run_experiments([pi_experiment], scale="smoke", out_dir=tmp_path, picture=False)


def failing(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    if seed == 1:
        raise ArithmeticError("seed 1 cannot be computed")
    return replace(pi.reproduce(scale, seed, out_dir), slug="pi-fails")


def test_a_failure_stops_nothing_else(pi_experiment: Experiment, tmp_path: Path) -> None:
    bad = replace(pi_experiment, paper=replace(pi.PAPER, slug="pi-fails"), reproduce=failing)
    sweep = run_experiments([bad, pi_experiment], scale="small", out_dir=tmp_path, picture=False)
    assert [summary.slug for summary in sweep.summaries] == ["pi-points"]
    ((slug, seed, error),) = [(one.slug, one.seed, one.error) for one in sweep.failures]
    assert (slug, seed, type(error)) == ("pi-fails", 1, ArithmeticError)
    assert sorted(path.name for path in (tmp_path / "runs" / "pi-fails").glob("*.json")) == [
        "small-0.json",
        "small-2.json",
    ]
    assert not (tmp_path / "pi-fails.json").exists()


def test_a_result_under_another_name_is_refused(pi_experiment: Experiment, tmp_path: Path) -> None:
    wrong = replace(pi_experiment, reproduce=lambda scale, seed, out: pi.reproduce(scale, 7, out))
    sweep = run_experiments([wrong], scale="smoke", out_dir=tmp_path, picture=False)
    assert "expected the result of ('pi-points', 'smoke', 0)" in str(sweep.failures[0].error)
    assert not list(tmp_path.rglob("*.json"))


def keeping(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    (out_dir / "checkpoint.json").write_text("{}")
    return pi.reproduce(scale, seed, out_dir)


def test_checkpoints_stay_in_the_folder_of_the_run(
    pi_experiment: Experiment, tmp_path: Path
) -> None:
    experiment = replace(pi_experiment, reproduce=keeping)
    run_experiments([experiment], scale="smoke", out_dir=tmp_path, picture=False)
    (kept,) = tmp_path.rglob("checkpoint.json")
    folder = f"smoke-0.{experiment.fingerprint('smoke')}"
    assert kept.parent == tmp_path / "runs" / "pi-points" / folder


def draws(runs: Any, figure: Any) -> None:
    axes = figure.subplots()
    axes.plot([run.seed for run in runs], [run.measurements["pi"] for run in runs])


def test_pictures_of_every_kind(pi_experiment: Experiment, tmp_path: Path) -> None:
    def bare(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
        return replace(pi.reproduce(scale, seed, out_dir), series=())

    seen = set()
    for changes in ({}, {"plot": draws}, {"reproduce": bare}):
        experiment = replace(pi_experiment, **changes)  # type: ignore[arg-type]
        run_experiments([experiment], scale="smoke", seeds=2, out_dir=tmp_path, fresh=True)
        picture = (tmp_path / "pi-points.png").read_bytes()
        assert picture.startswith(PNG)
        seen.add(picture)
    assert len(seen) == 3


SCRIPT = """
from pathlib import Path
from attending.papers._experiment import Experiment
from attending.papers._run import run_experiments
from tests.papers import pi

one = Experiment(pi.PAPER, pi.reproduce, pi.settings, sources=(Path(pi.__file__),))
run_experiments([one], scale="small", seeds=5, out_dir=Path("OUT"), picture=False)
"""


def test_killed_midway_and_resumed(tmp_path: Path) -> None:
    """SIGKILL between two runs' files: the rerun makes what is missing and nothing else."""
    out, log = tmp_path / "results", tmp_path / "log"
    command = [sys.executable, "-c", SCRIPT.replace("OUT", str(out))]
    environment = os.environ | {pi.LOG: str(log), pi.PAUSE: "0.05"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        patience = time.monotonic() + 60
        while len(started(log)) < 3 and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = sorted(path.name for path in out.rglob("small-*.json"))
    assert finished == ["small-0.json", "small-1.json"]
    assert not (out / "pi-points.json").exists()

    environment[pi.PAUSE] = "0"
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert Counter(started(log)) == {
        "small 0": 1,
        "small 1": 1,
        "small 2": 2,  # it was running when the process was killed
        "small 3": 1,
        "small 4": 1,
    }
    summary = Summary.from_json((out / "pi-points.json").read_text(encoding="utf-8"))
    whole = [pi.reproduce("small", seed, tmp_path).measurements["pi"] for seed in range(5)]
    assert summary.measurements["pi"].values == tuple(whole)


def test_source_edited_during_a_run(pi_experiment: Experiment, tmp_path: Path, log: Path) -> None:
    """What is stored belongs to the source that was run, not to the one that was saved since."""
    file = tmp_path / "pi.py"
    file.write_text("x = 1")

    def editing(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
        found = pi.reproduce(scale, seed, out_dir)
        file.write_text("x = 2")
        return found

    experiment = replace(pi_experiment, sources=(file,), reproduce=editing)
    run_experiments([experiment], scale="smoke", out_dir=tmp_path, picture=False)
    run_experiments([experiment], scale="smoke", out_dir=tmp_path, picture=False)
    assert len(started(log)) == 2


def test_sources_follow_the_symbols(with_pi: Path) -> None:
    """To the file where a symbol is written, though it is exported from the package."""
    (with_pi.parent / "_pi_points_experiment.py").write_text("x = 1\n")
    text = with_pi.read_text()
    with_pi.write_text(
        text.replace('("random.Random",),\n    rule', '("attending.merge",),\n    rule')
    )
    module = papers._module("pi-points")
    names = [source.name for source in Experiment.of_module(module).sources]
    assert sorted(names) == ["_pi_points_experiment.py", "pi_points.py", "state.py"]
