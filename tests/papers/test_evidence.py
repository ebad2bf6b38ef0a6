"""The page of evidence says what the shipped results say, and these are of papers as they are."""

from pathlib import Path

import pytest

from attending import papers
from attending.papers import Summary
from attending.papers._experiment import Experiment
from attending.papers._run import run_experiments
from tools import write_evidence

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "evidence"
RESULTS = sorted((FOLDER / "results").glob("*.json"))


def test_page_is_up_to_date() -> None:
    _, current = write_evidence.up_to_date(FOLDER)
    assert current, "docs/evidence/index.md is stale: make evidence"


def test_every_built_paper_has_evidence_and_no_other() -> None:
    built = [paper.slug for paper in papers.catalogue() if paper.status == "built"]
    assert [path.stem for path in RESULTS] == built


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_shipped_results_are_of_the_paper_as_it_is(path: Path) -> None:
    summary = Summary.from_json(path.read_text(encoding="utf-8"))
    paper = papers.get(summary.slug)
    assert paper.rule is not None
    assert summary.rule == paper.rule.words, "the rule has changed since the run; run it again"
    assert summary.figures == paper.figures, "the figures have changed since; run it again"
    assert summary.claim == paper.claim
    assert summary.scale in ("small", "full")
    assert len(summary.seeds) >= 3
    values = {name: spread.values for name, spread in summary.measurements.items()}
    assert paper.rule.judge(values) == summary.verdict
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_page_shows_everything(pi_experiment: Experiment, tmp_path: Path) -> None:
    run_experiments([pi_experiment], scale="small", out_dir=tmp_path / "results")
    assert write_evidence.main([str(tmp_path)]) == 0
    page = (tmp_path / "index.md").read_text(encoding="utf-8")
    (summary,) = write_evidence.read_results(tmp_path)
    for words in (
        summary.title,
        summary.claim,
        summary.rule,
        summary.machines[0],
        summary.command,
        summary.finished[:10],
        summary.measurements["pi"].in_words(),
        "| pi | 3.14159 | recall |",
        "**held**",
        "(results/pi-points.png)",
    ):
        assert words in page
    assert write_evidence.main(["--check", str(tmp_path)]) == 0
    result = tmp_path / "results" / "pi-points.json"
    result.write_text(result.read_text(encoding="utf-8").replace('"held"', '"did not hold"'))
    assert write_evidence.main(["--check", str(tmp_path)]) == 1


def test_smoke_is_no_evidence(pi_experiment: Experiment, tmp_path: Path) -> None:
    run_experiments([pi_experiment], scale="smoke", out_dir=tmp_path / "results", picture=False)
    with pytest.raises(SystemExit, match="smoke, which is no evidence"):
        write_evidence.read_results(tmp_path)


def test_what_markdown_would_read_is_escaped() -> None:
    assert write_evidence._row("a | b", "<script>") == r"| a \| b | &lt;script> |"
