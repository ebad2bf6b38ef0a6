"""What the catalogue knows of a paper, and how to add one.

A paper is one module, `papers/<slug with underscores>.py`. It is found by being there; nothing has
to be registered. While the method is not built, the module holds the record and no more:

    from attending.papers._record import Figure, Paper

    PAPER = Paper(
        slug="sigma-reparam",
        title="Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        arxiv="2303.06296",
        date="2023-03",
        venue="ICML 2023",
        purpose="Two to four sentences for a user, in our own words.",
        claim="What the paper says, as something that numbers can confirm or refute.",
        figures=(Figure("ms per step, ASR, post-LN", "450 -> 510", "3rd"),),
        extension_points=("torch.nn.utils.parametrize.register_parametrization",),
        planned_symbols=("attending.nn.sigma_reparam.sigma_reparam",),
        status="planned",
    )

When it is built, five things change:

1. `status="built"`, and `planned_symbols` moves to `symbols`: dotted names that a test imports.
2. `rule=Rule(words, judge)`: what our numbers must be for the claim to have held, **written before
   the run**. `judge` gets every measurement as a list, one number per seed, in the order of seeds:

       def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
           gaps = [a - b for a, b in zip(ours["entropy_ours"], ours["entropy_plain"], strict=True)]
           if all(gap > 0.5 for gap in gaps):
               return "held"
           return "held in direction" if all(gap > 0 for gap in gaps) else "did not hold"

   Compare seed by seed where the seeds are paired, and say `all(...)` as above: a run that
   diverged measures `nan`, a comparison with `nan` is False, but `max` and `min` may lose it.
3. Each figure that we measure too names our number: `Figure(..., measurement="entropy_ours")`.
   Add figures of your own freely; what the paper did at another scale stays its own figure.
4. The module gets a function

       def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
           from attending.papers._sigma_reparam_experiment import run  # torch is loaded here

           settings_here = settings(scale)
           found = run(**settings_here, seed=seed)
           return Reproduction(
               slug=PAPER.slug,
               scale=scale,
               seed=seed,
               measurements={"entropy_ours": found.ours, "entropy_plain": found.plain},
               series=(Series("sigmaReparam", x=found.steps, y=found.entropy_by_step,
                              panel="minimum entropy", x_label="step", y_label="nats"),),
               settings=settings_here,
           )

   It makes every random number from `seed`, prints nothing, and leaves the global generator as it
   found it where it can. `out_dir` is a folder of this one run's own, for checkpoints; leave it
   empty if there is nothing to keep. Seconds and machine are filled in by the runner.
   Scales: `smoke` ends in seconds, on one core (it shows that everything runs; no verdict is drawn
   from it), `small` in minutes on two cores, `full` is what a GPU or a cluster would run.
5. Optional: `settings(scale) -> dict` says all that determines a run but its seed. With the source
   of the module it makes the fingerprint by which a stored run is recognised, so a rerun after a
   change computes anew and one after an interruption goes on. Optional, too:
   `plot(reproductions, figure)` draws on a `matplotlib.figure.Figure` (`figure.subplots(1, 2)`);
   without it the `series` are drawn, a panel each.

Only `attending.papers` and the standard library are imported at the top of a paper's module, so
that `attending papers` answers at once; what the experiment needs is imported in `reproduce`. An
experiment that fills a page lives in `papers/_<slug with underscores>_<word>.py`; its source counts
for the fingerprint too, and so do the files of `symbols`.

Then `attending reproduce SLUG --scale small --out docs/evidence/results` writes what the docs show,
and `make evidence` its page.
"""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

EvidenceTag = Literal["ran", "code", "paper", "3rd", "recall", "inferred"]
Scale = Literal["smoke", "small", "full"]
Status = Literal["built", "planned"]
Verdict = Literal["held", "held in direction", "did not hold", "out of reach here"]

EVIDENCE_TAGS: Mapping[str, str] = {
    "ran": "we ran the official code, or checked the number ourselves",
    "code": "read in the official code",
    "paper": "read in the paper or its abstract",
    "3rd": "reported by others about the paper",
    "recall": "from memory; digits may be off",
    "inferred": "our conclusion, stated nowhere",
}
SCALES: tuple[Scale, ...] = get_args(Scale)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


@dataclass(frozen=True)
class Figure:
    """One number (or row of numbers) that a paper reports.

    Args:
        name: What was measured, on what, with the unit.
        value: As the paper gives it; text, because papers give ranges, arrows and bounds.
        evidence: How we know that the paper says so; `EVIDENCE_TAGS` has the meanings.
        measurement: The name of our measurement that stands beside it, None if we have none.
    """

    name: str
    value: str
    evidence: EvidenceTag
    measurement: str | None = None

    def __post_init__(self) -> None:
        if self.evidence not in EVIDENCE_TAGS:
            raise ValueError(
                f"evidence: expected one of {', '.join(EVIDENCE_TAGS)}, got {self.evidence!r}"
            )


@dataclass(frozen=True)
class Rule:
    """How a verdict follows from our numbers. Write it before the run.

    Args:
        words: The rule in full, as it is shown beside the verdict.
        judge: The same rule as a function of the measurements, each a list, one number per seed.
        scales: Where the rule can be applied. At other scales the verdict is `out of reach here`.
    """

    words: str
    judge: Callable[[Mapping[str, Sequence[float]]], Verdict]
    scales: tuple[Scale, ...] = ("small", "full")


@dataclass(frozen=True)
class Paper:
    """A paper of the catalogue; the module's docstring says how to write one.

    Args:
        slug: Its short name, lower case with hyphens. The module has the same with underscores.
        title: The paper's title.
        arxiv: Its arXiv id such as `2303.06296`, None if there is none or it is not known.
        date: When it appeared first, `YYYY-MM` or `YYYY-MM-DD`.
        venue: Where it was published, None if nowhere or not known.
        purpose: What the method is for, to a user; two to four sentences.
        claim: What the paper claims, as something that numbers can decide.
        figures: The paper's own figures.
        extension_points: Where the method takes hold of a model: functions, hooks, classes.
        status: `built`, or `planned` as long as there is nothing to import.
        symbols: Dotted names of what implements it; only if built.
        planned_symbols: The names that it will have; only if planned.
        rule: The rule of the verdict; only if built.

    Raises:
        ValueError: A field is malformed, or does not fit the status.
    """

    slug: str
    title: str
    arxiv: str | None
    date: str
    venue: str | None
    purpose: str
    claim: str
    figures: tuple[Figure, ...]
    extension_points: tuple[str, ...]
    status: Status
    symbols: tuple[str, ...] = ()
    planned_symbols: tuple[str, ...] = ()
    rule: Rule | None = None

    def __post_init__(self) -> None:
        if _SLUG.fullmatch(self.slug) is None:
            raise ValueError(f"slug: expected lower case words with hyphens, got {self.slug!r}")
        if self.arxiv is not None and _ARXIV.fullmatch(self.arxiv) is None:
            raise ValueError(f"arxiv: expected an id such as 2303.06296, got {self.arxiv!r}")
        month = self.date if len(self.date) > 7 else f"{self.date}-01"
        try:
            datetime.date.fromisoformat(month)
        except ValueError:
            raise ValueError(f"date: expected YYYY-MM or YYYY-MM-DD, got {self.date!r}") from None
        if not self.figures:
            raise ValueError(
                f"figures: expected at least one of the paper's figures for {self.slug}"
            )
        self._check_status()

    def _check_status(self) -> None:
        if self.status == "built":
            if not self.symbols or self.rule is None or self.planned_symbols:
                raise ValueError(
                    f"status: {self.slug} is built, but a built paper has symbols, a rule and no "
                    "planned_symbols. Complete it, or call it planned."
                )
        elif self.status == "planned":
            if self.symbols or self.rule is not None:
                raise ValueError(
                    f"status: a planned paper has no symbols and no rule, but {self.slug} has. "
                    "List them in planned_symbols, or call it built."
                )
        else:
            raise ValueError(f"status: expected built or planned, got {self.status!r}")

    @property
    def url(self) -> str | None:
        """The paper's page at arXiv."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def module(self) -> str:
        """The name of the module that holds this record."""
        return f"attending.papers.{self.slug.replace('-', '_')}"
