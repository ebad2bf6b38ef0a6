"""`attending papers` and `attending reproduce`: the catalogue, and the reruns of its claims."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attending.cli.console import complain, note, say
from attending.cli.errors import CommandError
from attending.cli.outputs import check_folder
from attending.report.text import plural, printable

if TYPE_CHECKING:
    from rich.table import Table

    from attending.papers import Paper, Summary

_VERDICT_STYLES = {
    "held": "green",
    "held in direction": "yellow",
    "did not hold": "red",
    "out of reach here": "dim",
}


class ScaleName(StrEnum):
    """How large a reproduction is."""

    smoke = "smoke"
    small = "small"
    full = "full"


def list_papers(
    query: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUERY]", help="A slug, or words that the record must contain."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """List the papers of the catalogue: what each is for, and whether it is built.

    One paper is shown in full. QUERY looks at the whole record, the words built and planned too.
    """
    from attending import papers

    words = " ".join(query or [])
    slugs = {paper.slug for paper in papers.catalogue()}
    found = (papers.get(words),) if words in slugs else papers.find(words)
    if json:
        sys.stdout.write(_as_json(found))
    elif not found:
        raise CommandError(
            f"no paper of {len(slugs)} has all of these words: {words}; "
            "attending papers without a query lists all"
        )
    elif len(found) == 1:
        _show_paper(found[0])
    else:
        _show_papers(found)


def reproduce(
    slug: Annotated[
        str | None, typer.Argument(metavar="SLUG", help="A paper that is built.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every paper that is built.")] = False,
    scale: Annotated[
        ScaleName,
        typer.Option(help="smoke: seconds, no verdict; small: minutes; full: a GPU or a cluster."),
    ] = ScaleName.smoke,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many seeds; else 1 at smoke, 3 elsewhere."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Gets SLUG.json, SLUG.png and runs/.")
    ] = Path("results"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Make runs again that are stored in DIR.")
    ] = False,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Draw SLUG.png; needs matplotlib.")
    ] = True,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the runs over a Ray cluster (extra sweep).")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A running cluster; else one starts here."),
    ] = None,
) -> None:
    """Rerun the claim of SLUG: the paper's figures beside ours, and a verdict by a rule.

    A run that is stored in DIR is not made again, so an interrupted command goes on where it was.
    """
    if (slug is None) != all_:
        raise CommandError("give either the SLUG of a paper or --all; attending papers lists them")
    if ray_address is not None and not ray:
        raise CommandError(f"--ray-address {ray_address} needs --ray; add it")
    from attending import papers

    built = [paper.slug for paper in papers.catalogue() if paper.status == "built"]
    if slug is not None and papers.get(slug).status != "built":
        those = ", ".join(built) if built else "none yet"
        raise CommandError(f"SLUG {slug} is planned and cannot be run; built are: {those}")
    check_folder(out, "--out")
    execute = None
    if ray:
        from attending.papers._ray import on_ray

        execute = on_ray(address=ray_address)
    sweep = papers.reproduce_many(
        built if slug is None else [slug],
        scale=scale.value,
        seeds=seeds,
        out_dir=out,
        execute=execute,
        picture=picture,
        fresh=fresh,
        watch=lambda event, which, seed: note(f"{which}, seed {seed}: {event}"),
    )
    for summary in sweep.summaries:
        _show_summary(summary)
        endings = ("json", "png") if picture else ("json",)
        say("wrote " + " and ".join(str(out / f"{summary.slug}.{end}") for end in endings))
    if all_:
        _show_verdicts(sweep.summaries)
    for failure in sweep.failures:
        where = "its summary" if failure.seed is None else f"seed {failure.seed}"
        complain(f"{failure.slug}, {where}: {type(failure.error).__name__}: {failure.error}")
    if sweep.failures:
        count = plural(len(sweep.failures), "failure")
        raise RuntimeError(f"{count}; what finished is stored") from sweep.failures[0].error


def _as_json(found: "Sequence[Paper]") -> str:
    import dataclasses
    import json

    records = []
    for paper in found:
        record = {field.name: getattr(paper, field.name) for field in dataclasses.fields(paper)}
        record["figures"] = [dataclasses.asdict(figure) for figure in paper.figures]
        record["rule"] = None if paper.rule is None else paper.rule.words
        records.append(record)
    return json.dumps(records, indent=1, ensure_ascii=False) + "\n"


def _show_papers(found: "Sequence[Paper]") -> None:
    table = _table("slug", "date", "status", "title")
    for paper in found:
        style = "green" if paper.status == "built" else "dim"
        _add(table, paper.slug, paper.date, (paper.status, style), paper.title)
    _print(table)
    built = sum(paper.status == "built" for paper in found)
    say(f"{plural(len(found), 'paper')}, {built} built. attending papers SLUG shows one in full.")


def _show_paper(paper: "Paper") -> None:
    from attending.papers import EVIDENCE_TAGS

    say(paper.title, "bold")
    facts = [paper.slug, paper.url, paper.date, paper.venue, paper.status]
    say(", ".join(fact for fact in facts if fact is not None), "dim")
    _paragraph("What it is for", paper.purpose)
    _paragraph("It claims", paper.claim)
    table = _table("the paper's figures", "value", "evidence")
    for figure in paper.figures:
        _add(table, figure.name, figure.value, figure.evidence)
    _print(table)
    tags = {figure.evidence for figure in paper.figures}
    for tag, meaning in EVIDENCE_TAGS.items():
        if tag in tags:
            say(f"{tag}: {meaning}", "dim")
    if paper.rule is not None:
        _paragraph("The claim has held if", paper.rule.words)
    _paragraph("Where it lives" if paper.symbols else "Where it will live", "")
    for name in paper.symbols or paper.planned_symbols:
        say(f"  {name}")
    _paragraph("Where it takes hold", "")
    for point in paper.extension_points:
        say(f"  {point}")
    if paper.status == "built":
        say(f"attending reproduce {paper.slug} --scale small reruns the claim", "dim")


def _show_summary(summary: "Summary") -> None:
    seeds = plural(len(summary.seeds), "seed")
    say(summary.title, "bold")
    say(f"{summary.slug}, scale {summary.scale}, {seeds}, {summary.seconds:.1f} s", "dim")
    _paragraph("It claims", summary.claim)
    table = _table("figure", "the paper", "evidence", "here")
    named = set()
    for figure in summary.figures:
        ours = (
            ""
            if figure.measurement is None
            else summary.measurements[figure.measurement].in_words()
        )
        named.add(figure.measurement)
        _add(table, figure.name, figure.value, figure.evidence, ours)
    for name, spread in summary.measurements.items():
        if name not in named:
            _add(table, name, "", "", spread.in_words())
    _print(table)
    _paragraph("The rule", summary.rule)
    why = f" ({summary.reason})" if summary.reason else ""
    say(f"Verdict: {summary.verdict}{why}", _VERDICT_STYLES[summary.verdict])


def _show_verdicts(summaries: "Sequence[Summary]") -> None:
    if not summaries:
        say("no paper was reproduced")
        return
    table = _table("slug", "scale", "seeds", "seconds", "verdict")
    for summary in summaries:
        style = _VERDICT_STYLES[summary.verdict]
        seeds, seconds = str(len(summary.seeds)), f"{summary.seconds:.1f}"
        _add(table, summary.slug, summary.scale, seeds, seconds, (summary.verdict, style))
    _print(table)


def _paragraph(heading: str, text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    ending = f": {printable(text)}" if text else ":"
    Console().print(Text.assemble((heading, "bold"), ending))


def _table(*headings: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=heading in ("slug", "date", "status"))
    return table


def _add(table: "Table", *cells: str | tuple[str, str]) -> None:
    from rich.text import Text

    pairs = [(cell, "") if isinstance(cell, str) else cell for cell in cells]
    table.add_row(*(Text(printable(text), style) for text, style in pairs))


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)
