"""`attending papers` and `attending reproduce`, as a user types them."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from attending import papers
from attending.cli import main
from attending.papers import Summary
from tests.papers import pi


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return Result(int(exit_.value.code or 0), *capsys.readouterr())


def test_all_papers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "papers")
    assert result.code == 0
    for paper in papers.catalogue():
        assert paper.slug in result.out
    assert "49 papers" in result.out


def test_query_filters_and_one_paper_is_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    several = run(capsys, "papers", "ATTENTION", "video")
    assert "efficient-vdit" in several.out
    assert "emo" not in several.out.split()
    one = run(capsys, "papers", "momentum-decoding")
    paper = papers.get("momentum-decoding")
    flat = " ".join(one.out.split())
    for words in (paper.title, paper.purpose, paper.claim, "https://arxiv.org/abs/2212.02175"):
        assert words in flat
    for figure in paper.figures:
        assert figure.value in one.out
    assert (paper.symbols or paper.planned_symbols)[0] in one.out
    assert "ran: we ran the official code" in one.out


def test_json_is_the_records(capsys: pytest.CaptureFixture[str], with_pi: Path) -> None:
    records = json.loads(run(capsys, "papers", "--json").out)
    assert [record["slug"] for record in records] == [one.slug for one in papers.catalogue()]
    found = {record["slug"]: record for record in records}
    assert found["pi-points"]["rule"].startswith("held if every seed")
    assert found["moh"]["rule"] is None
    assert found["moh"]["figures"][0]["evidence"] == "code"
    assert json.loads(run(capsys, "papers", "--json", "nothing like this").out) == []


def test_reproduce_shows_figures_rule_and_verdict(
    capsys: pytest.CaptureFixture[str], with_pi: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    result = run(capsys, "reproduce", "pi-points", "--scale", "small", "--out", out)
    assert result.code == 0
    summary = Summary.from_json((out / "pi-points.json").read_text(encoding="utf-8"))
    assert (out / "pi-points.png").exists()
    row = next(line for line in result.out.splitlines() if "3.14159" in line)
    assert summary.measurements["pi"].in_words() in row
    assert summary.measurements["inside"].in_words() in result.out
    assert "held if every seed is within 0.1 of pi" in result.out
    assert "Verdict: held\n" in result.out
    assert "pi-points, seed 2: finished" in result.err
    again = run(capsys, "reproduce", "pi-points", "--scale", "small", "--out", out)
    assert again.out == result.out
    assert "pi-points, seed 2: stored" in again.err


def test_smoke_draws_no_verdict(
    capsys: pytest.CaptureFixture[str], with_pi: Path, tmp_path: Path
) -> None:
    result = run(capsys, "reproduce", "pi-points", "--out", tmp_path, "--no-picture")
    assert "Verdict: out of reach here (the rule is for scale small or full" in result.out
    assert [path.name for path in tmp_path.glob("pi-points*")] == ["pi-points.json"]


def test_bad_input_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], with_pi: Path, tmp_path: Path
) -> None:
    planned = next(paper.slug for paper in papers.catalogue() if paper.status == "planned")
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        (["papers", "zebra crossing"], "no paper of 50 has all of these words: zebra crossing"),
        (["reproduce"], "give either the SLUG of a paper or --all"),
        (["reproduce", "pi-points", "--all"], "give either the SLUG of a paper or --all"),
        (["reproduce", "pi-pints"], "near it are pi-points"),
        (["reproduce", planned], f"SLUG {planned} is planned and cannot be run; built are:"),
        (["reproduce", "pi-points", "--scale", "small", "--seeds", 2], "at least 3 at scale small"),
        (["reproduce", "pi-points", "--out", file], f"--out {file} is a file"),
        (["reproduce", "pi-points", "--ray-address", "auto"], "needs --ray"),
    ):
        result = run(capsys, *arguments)
        assert (result.code, result.out) == (2, ""), arguments
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert message in result.err


def test_a_failed_run_is_told_and_exits_1(
    capsys: pytest.CaptureFixture[str], with_pi: Path, tmp_path: Path
) -> None:
    broken = with_pi.read_text().replace("    points = settings(scale)", "    points = nowhere")
    with_pi.write_text(broken)
    result = run(capsys, "reproduce", "pi-points", "--out", tmp_path, "--no-picture")
    assert result.code == 1
    assert "pi-points, seed 0: NameError" in result.err
    assert "1 failure" in result.err
    assert not (tmp_path / "pi-points.json").exists()


@pytest.mark.slow
def test_all_at_smoke_runs_every_built_paper(
    capsys: pytest.CaptureFixture[str], with_pi: Path, tmp_path: Path
) -> None:
    """Seconds for each paper, as CI runs it; and what was run is not run again."""
    built = [paper.slug for paper in papers.catalogue() if paper.status == "built"]
    assert pi.PAPER.slug in built
    result = run(capsys, "reproduce", "--all", "--out", tmp_path)
    assert result.code == 0, result.err
    for slug in built:
        summary = Summary.from_json((tmp_path / f"{slug}.json").read_text(encoding="utf-8"))
        assert summary.seconds < 30, f"the smoke scale of {slug} is for CI; make it smaller"
        assert (tmp_path / f"{slug}.png").exists()
    again = run(capsys, "reproduce", "--all", "--out", tmp_path)
    assert again.err.count("stored") == len(built)
