"""The catalogue tells the truth: all papers are there, and only what is built can be imported."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from attending import papers
from attending.papers import Paper
from attending.papers._experiment import Experiment

# The papers that the project is about. A paper that leaves or joins the list changes this line.
SLUGS = [
    "a-star",
    "agile-pruner",
    "amortized-sliced-wasserstein",
    "attencraft",
    "attention-calibration-act",
    "clear",
    "cnn-filter-db",
    "combiner",
    "condition-dependent-source-flow",
    "damro",
    "dare",
    "deberta",
    "deconstructing-attention",
    "dehazing-sha",
    "dependency-vit",
    "dha",
    "differential-information-dpo",
    "diffuhaul",
    "dydila",
    "dynamic-mask-attention",
    "efficient-dlm",
    "efficient-vdit",
    "emo",
    "entropy-guided-attention",
    "flow-attention",
    "focus-the-discrepancy",
    "grouped-differential-attention",
    "headhunter-softpag",
    "hierarchical-self-attention",
    "interaction-basis",
    "low-level-vision-diffusion",
    "moh",
    "momentum-decoding",
    "optiprune",
    "paro-attention",
    "partial-attention-lm",
    "perturbed-attention-guidance",
    "profiling-dit",
    "quantum-doubly-stochastic",
    "random-feature-attention-theory",
    "rectified-spaattn",
    "reweight-gnn",
    "rnn-solution-degeneracy",
    "sigma-reparam",
    "singular-distribution-likelihood",
    "sparsed",
    "systematic-outliers",
    "variable-size-attention-scaling",
    "visual-attention-redistribution",
]

CATALOGUE = papers.catalogue()


def exists(dotted: str) -> bool:
    """Whether a dotted name can be imported; an error inside a module that is there is no no."""
    module_name, rest = dotted, []
    while True:
        try:
            found: object = import_module(module_name)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not dotted.startswith(error.name):
                raise
            module_name, _, last = module_name.rpartition(".")
            if not module_name:
                return False
            rest.insert(0, last)
    for name in rest:
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def test_exists_tells_what_is_there() -> None:
    assert exists("attending.core.state.AttentionState.output") or exists("attending.core.state")
    assert exists("attending.core.state.merge")
    assert not exists("attending.core.state.nothing")
    assert not exists("attending.nothing.at.all")
    assert not exists("nothing_at_all.here")


def test_every_paper_is_there_once() -> None:
    assert [paper.slug for paper in CATALOGUE] == SLUGS
    assert len(CATALOGUE) == 49


@pytest.mark.parametrize("paper", CATALOGUE, ids=lambda paper: paper.slug)
def test_record_is_complete(paper: Paper) -> None:
    assert import_module(paper.module).PAPER is paper
    assert 2 <= len(re.findall(r"[.;:](?= |$)", paper.purpose)) <= 6, "two to four sentences"
    assert 120 < len(paper.purpose) < 700
    assert 40 < len(paper.claim) < 500
    assert paper.figures
    assert paper.extension_points
    for words in (paper.title, paper.purpose, paper.claim, *paper.extension_points):
        assert words == " ".join(words.split())
    if paper.arxiv is not None:  # an id begins with the year and month of the first version
        assert paper.date[2:4] + paper.date[5:7] == paper.arxiv[:4]


@pytest.mark.parametrize("paper", CATALOGUE, ids=lambda paper: paper.slug)
def test_status_is_true(paper: Paper) -> None:
    module = import_module(paper.module)
    if paper.status == "built":
        assert all(exists(name) for name in paper.symbols)
        assert Experiment.of_module(module).paper is paper
    else:
        assert paper.planned_symbols
        there = [name for name in paper.planned_symbols if exists(name)]
        assert not there, f"{there} can be imported, but {paper.slug} is called planned"
        assert not hasattr(module, "reproduce")


def test_no_two_papers_share_an_arxiv_id() -> None:
    ids = [paper.arxiv for paper in CATALOGUE if paper.arxiv is not None]
    assert len(ids) == len(set(ids))


def test_find_looks_at_the_whole_record() -> None:
    assert papers.find("") == CATALOGUE
    assert [paper.slug for paper in papers.find("SINKHORN circuit")] == [
        "quantum-doubly-stochastic"
    ]
    assert papers.get("emo") in papers.find("2310.04691")
    assert papers.get("emo") in papers.find("emo_loss")
    assert papers.find("zebra crossing") == ()
    assert set(papers.find("built")) >= {paper for paper in CATALOGUE if paper.status == "built"}


def test_unknown_slug_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"slug: .*'sigma-reparm'.*near it are sigma-reparam"):
        papers.get("sigma-reparm")


def test_planned_paper_cannot_be_reproduced(tmp_path: Path) -> None:
    planned = next(paper for paper in CATALOGUE if paper.status == "planned")
    with pytest.raises(ValueError, match=f"{planned.slug} is planned"):
        papers.reproduce(planned.slug, out_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_catalogue_loads_without_torch() -> None:
    """`attending papers` must answer at once."""
    code = "import sys; from attending import papers; papers.catalogue(); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert "attending.papers.emo" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "ray", "rich"}


def test_a_paper_is_found_by_being_there(with_pi: Path) -> None:
    assert papers.get("pi-points").status == "built"
    assert len(papers.catalogue()) == len(CATALOGUE) + 1
