"""Writes the page of evidence from the results that are shipped with the documentation.

    python tools/write_evidence.py [--check] [FOLDER]

FOLDER is `docs/evidence`; it holds `results/<slug>.json`, as `attending reproduce SLUG --scale
small --out docs/evidence/results` writes them, and gets `index.md`. Nothing on that page is written
by hand. With `--check` nothing is written, and the exit code is 1 if the page is not up to date.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from attending.papers import EVIDENCE_TAGS, Summary

INTRODUCTION = """\
<!-- Made by `make evidence` from results/*.json; do not edit. -->

# Evidence

What became of the claims of the papers when we reran them, at a scale that a machine with two cores
can bear. The rule of each verdict was written before the run. A claim that *did not hold* here, did
not hold at this scale; one that *held in direction* went the right way, but not as far as the rule
asked. `attending papers` lists the papers that are not built yet.
"""
NOTHING = "\nNothing has been measured yet.\n"


def read_results(folder: Path) -> list[Summary]:
    """The summaries in `folder/results`, by slug."""
    found = []
    for path in sorted((folder / "results").glob("*.json")):
        summary = Summary.from_json(path.read_text(encoding="utf-8"))
        if summary.scale == "smoke":
            raise SystemExit(f"{path} is of scale smoke, which is no evidence; run it at small")
        if path.stem != summary.slug:
            raise SystemExit(f"{path} holds the results of {summary.slug}; name it after them")
        found.append(summary)
    return found


def page(summaries: Sequence[Summary], pictures: Sequence[str]) -> str:
    """The page in Markdown; `pictures` are the slugs that have one."""
    parts = [INTRODUCTION]
    if not summaries:
        return INTRODUCTION + NOTHING
    parts.append(
        "| paper | verdict | scale | seeds | seconds | date |\n|---|---|---|---|---|---|\n"
    )
    parts[-1] += "".join(
        _row(f"[{one.slug}](#{one.slug})", f"**{one.verdict}**", one.scale, str(len(one.seeds)))
        + f" {one.seconds:.0f} | {one.finished[:10]} |\n"
        for one in summaries
    )
    parts += [_section(one, one.slug in pictures) for one in summaries]
    tags = {figure.evidence for one in summaries for figure in one.figures}
    parts.append("## How we know what a paper says { #tags }\n\n")
    parts[-1] += "".join(f"- *{t}*: {words}\n" for t, words in EVIDENCE_TAGS.items() if t in tags)
    return "\n".join(parts)


def _row(*cells: str) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _section(summary: Summary, has_picture: bool) -> str:
    title = _escaped(summary.title)
    lines = [f"## {summary.slug} {{ #{summary.slug} }}", ""]
    where = title if summary.arxiv is None else f"[{title}](https://arxiv.org/abs/{summary.arxiv})"
    lines += [where, "", f"**Claim.** {_escaped(summary.claim)}", ""]
    lines += ["| figure | the paper | [evidence](#tags) | here |", "|---|---|---|---|"]
    named = {figure.measurement for figure in summary.figures}
    for figure in summary.figures:
        name = figure.measurement
        ours = "" if name is None else summary.measurements[name].in_words()
        lines.append(_row(figure.name, figure.value, figure.evidence, ours))
    for name, spread in summary.measurements.items():
        if name not in named:
            lines.append(_row(f"`{name}`", "", "", spread.in_words()))
    lines += ["", "Ours are mean ± standard deviation [lowest, highest] over the seeds.", ""]
    lines += [f"**Rule.** {_escaped(summary.rule)}", ""]
    why = f" ({_escaped(summary.reason)})" if summary.reason else ""
    lines += [f"**Verdict.** {summary.verdict}{why}", ""]
    if has_picture:
        lines += [f"![Results of {summary.slug} by seed](results/{summary.slug}.png)", ""]
    machines = "; ".join(summary.machines)
    lines.append(
        f"{len(summary.seeds)} seeds, {summary.seconds:.0f} s in all, {summary.finished[:10]}, "
        f"attending {summary.version}, {_escaped(machines)}. "
        f"[All numbers](results/{summary.slug}.json)"
    )
    return "\n".join([*lines, "", "```sh", summary.command, "```", ""])


def up_to_date(folder: Path) -> tuple[str, bool]:
    """The page as it should be, and whether it is so."""
    pictures = [path.stem for path in (folder / "results").glob("*.png")]
    text = page(read_results(folder), pictures)
    target = folder / "index.md"
    return text, target.exists() and target.read_text(encoding="utf-8") == text


def main(arguments: Sequence[str]) -> int:
    """Write the page, or check it."""
    rest = [argument for argument in arguments if argument != "--check"]
    default = Path(__file__).resolve().parent.parent / "docs" / "evidence"
    folder = Path(rest[0]) if rest else default
    text, current = up_to_date(folder)
    if "--check" in arguments:
        print(f"{folder / 'index.md'} is {'up to date' if current else 'stale: make evidence'}")
        return 0 if current else 1
    (folder / "index.md").write_text(text, encoding="utf-8")
    print(f"wrote {folder / 'index.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
