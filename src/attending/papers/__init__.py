"""The catalogue of papers: what each is for, what it claims, and whether the claim held here.

>>> from attending import papers
>>> papers.get("sigma-reparam").arxiv
'2303.06296'
>>> [paper.slug for paper in papers.find("entropy") if paper.status == "built"]  # doctest: +SKIP
['sigma-reparam', 'entropy-guided-attention']

Every paper is one module of this package, with a record `PAPER`; a built one has `reproduce`, too.
`attending.papers._record` explains how to add one. A planned paper has a record, and nothing that
could be imported.
"""

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from attending.papers._experiment import Experiment
from attending.papers._record import (
    EVIDENCE_TAGS,
    SCALES,
    VERDICTS,
    EvidenceTag,
    Figure,
    Paper,
    Rule,
    Scale,
    Status,
    Verdict,
)
from attending.papers._reproduction import Reproduction, Series
from attending.papers._run import Execute, Failure, Sweep, Watch, run_experiments
from attending.papers._summary import Spread, Summary

__all__ = [
    "EVIDENCE_TAGS",
    "SCALES",
    "VERDICTS",
    "EvidenceTag",
    "Failure",
    "Figure",
    "Paper",
    "Reproduction",
    "Rule",
    "Scale",
    "Series",
    "Spread",
    "Status",
    "Summary",
    "Sweep",
    "Verdict",
    "catalogue",
    "find",
    "get",
    "reproduce",
    "reproduce_many",
]


def catalogue() -> tuple[Paper, ...]:
    """All papers, in the order of their slugs."""
    papers = (module.PAPER for module in _modules())
    return tuple(sorted(papers, key=lambda paper: paper.slug))


def find(query: str = "") -> tuple[Paper, ...]:
    """The papers in whose record every word of the query occurs, upper or lower case.

    The whole text of the record is looked at: slug, title, venue, date, purpose, claim, figures,
    symbols and extension points. An empty query finds all.
    """
    words = query.casefold().split()
    return tuple(paper for paper in catalogue() if all(word in _full_text(paper) for word in words))


def get(slug: str) -> Paper:
    """The record of one paper.

    Raises:
        ValueError: No paper has that slug.
    """
    return _record(_module(slug))


def reproduce(
    slug: str,
    *,
    scale: Scale = "smoke",
    seeds: int | None = None,
    out_dir: str | Path = "results",
    picture: bool = True,
    fresh: bool = False,
    watch: Watch | None = None,
) -> Summary:
    """Rerun the claim of one paper; writes `<slug>.json` and `<slug>.png` into `out_dir`.

    Each finished run is stored under `out_dir/runs`, and not made again unless the experiment has
    changed.

    Args:
        slug: A built paper.
        scale: `smoke` (seconds), `small` (minutes) or `full`.
        seeds: How many; None takes the fewest that the scale allows: 1, 3 and 3.
        out_dir: The folder for the results.
        picture: Whether to draw the picture, which needs matplotlib (extra `prove`).
        fresh: Whether to make stored runs again.
        watch: Called with `"stored"`, `"finished"` or `"failed"`, the slug and the seed.

    Returns:
        Mean, spread, the paper's own figures and the verdict.

    Raises:
        ValueError: No such paper, a paper that is not built, a bad scale, or too few seeds.
        ImportError: matplotlib is missing.
        Exception: Whatever the first failed run raised.
    """
    sweep = run_experiments(
        [Experiment.of_module(_module(slug))],
        scale=scale,
        seeds=seeds,
        out_dir=Path(out_dir),
        picture=picture,
        fresh=fresh,
        watch=watch,
    )
    if sweep.failures:
        raise sweep.failures[0].error
    return sweep.summaries[0]


def reproduce_many(
    slugs: Sequence[str] | None = None,
    *,
    scale: Scale = "smoke",
    seeds: int | None = None,
    out_dir: str | Path = "results",
    execute: Execute | None = None,
    picture: bool = True,
    fresh: bool = False,
    watch: Watch | None = None,
) -> Sweep:
    """Rerun the claims of several papers; one that fails does not stop the others.

    Args:
        slugs: Built papers; None takes all that are built.
        scale: As in `reproduce`.
        seeds: As in `reproduce`.
        out_dir: As in `reproduce`.
        execute: Where the runs are made; None makes them here, `attending.papers._ray.on_ray(...)`
            spreads them over a Ray cluster.
        picture: As in `reproduce`.
        fresh: As in `reproduce`.
        watch: As in `reproduce`.

    Raises:
        ValueError: As in `reproduce`.
        ImportError: As in `reproduce`.
    """
    chosen = slugs
    if chosen is None:
        chosen = [paper.slug for paper in catalogue() if paper.status == "built"]
    return run_experiments(
        [Experiment.of_module(_module(slug)) for slug in chosen],
        scale=scale,
        seeds=seeds,
        out_dir=Path(out_dir),
        execute=execute,
        picture=picture,
        fresh=fresh,
        watch=watch,
    )


def _modules() -> list[ModuleType]:
    names = [found.name for found in pkgutil.iter_modules(__path__)]
    return [import_module(f"{__name__}.{name}") for name in names if not name.startswith("_")]


def _module(slug: str) -> ModuleType:
    for module in _modules():
        if _record(module).slug == slug:
            return module
    import difflib

    slugs = [paper.slug for paper in catalogue()]
    near = difflib.get_close_matches(slug, slugs, n=3, cutoff=0.4)
    hint = f"; near it are {', '.join(near)}" if near else ""
    raise ValueError(
        f"slug: expected the slug of a paper, got {slug!r}{hint}. `attending papers` lists all."
    )


def _record(module: ModuleType) -> Paper:
    paper: Paper = module.PAPER
    return paper


def _full_text(paper: Paper) -> str:
    parts = [paper.slug, paper.title, paper.arxiv or "", paper.date, paper.venue or ""]
    parts += [paper.status, paper.purpose, paper.claim]
    parts += [f"{figure.name} {figure.value}" for figure in paper.figures]
    parts += [*paper.symbols, *paper.planned_symbols, *paper.extension_points]
    return " ".join(parts).casefold()
