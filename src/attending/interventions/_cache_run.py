"""What a feature cache counts."""

import warnings
from dataclasses import dataclass, field

from attending.interventions.intervention import InterventionWarning, Run

Branch = str | int


@dataclass(eq=False)
class CacheRun(Run):
    """What a feature cache saved within one `with` block.

    Attributes:
        unit: what is counted in `computed` and `total`.
        computed: how many were computed.
        total: how many there would have been without the cache.
        history: for each call of the model its branch, its step in that branch, and whether all
            was computed.
        generations: how many were begun.
    """

    unit: str = "calls of blocks"
    computed: int = 0
    total: int = 0
    history: list[tuple[Branch, int, bool]] = field(default_factory=list, repr=False)
    generations: int = 0

    @property
    def density(self) -> float:
        """The share that was computed: 1 if nothing was saved."""
        return self.computed / self.total if self.total else 1.0

    @property
    def stats(self) -> dict[str, int | float]:
        """The counts, as a plain dictionary."""
        return {
            "calls": self.calls,
            "reused_calls": self.edited_calls,
            "computed": self.computed,
            "total": self.total,
            "density": self.density,
            "generations": self.generations,
        }

    def called(self, branch: Branch, step: int, reused: bool) -> None:
        """Count a call of the model."""
        self.history.append((branch, step, not reused))
        if reused:
            self.edited()
        else:
            self.left(None, "all was computed")

    def warn_if_nothing_changed(self, stacklevel: int = 2) -> None:
        """Never an empty success.

        Warns:
            InterventionWarning: if nothing was reused.
        """
        if self.edited_calls:
            return
        why = (
            "the model was not called"
            if not self.calls
            else f"{self.generations} of them began a generation; if that is too many, the sampler "
            "is not one long loop of falling (or rising) timesteps"
            if self.generations > 1
            else "the schedule has all of them computed"
        )
        warnings.warn(
            f"{self.name} reused nothing in {self.calls} calls of the model: {why}.",
            InterventionWarning,
            stacklevel=stacklevel + 1,
        )

    def __str__(self) -> str:
        """In one line."""
        return (
            f"{self.name}: reused in {self.edited_calls} of {self.calls} calls of the model; "
            f"computed {self.computed} of {self.total} {self.unit} ({self.density:.1%})"
        )
