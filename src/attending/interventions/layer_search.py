"""Which plan each layer can afford: the search of Efficient-vDiT, for planners of any kind.

    candidates = {str(k): frame_planner(frame_reference_mask(8, k), 64) for k in (1, 2, 3, 4)}
    search = search_layer_masks(model, run, candidates, threshold=0.05, metric="relative_mse")
    print(search)                                      # errors of every layer under every plan
    with BlockSparse(search.planner())(model): ...     # each layer with what it can afford
    search.choose(threshold=0.1)                       # another budget, without another run

Each layer is tried by itself while all others are dense, so how errors add up is not seen.

Source: Ding et al. 2025 (arXiv 2502.06155), Algorithm 1. Whether the paper measures the error at
the output of attention, of the block, or of the model is not known [recall]: `probe` has all three.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, get_args

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from attending.core.block_plan import BlockPlan
from attending.interventions._layer_errors import Measure, Metric, Probe
from attending.interventions.block_sparse import Planner
from attending.sparse.frame_masks import expand_frame_mask
from attending.taps import AttentionCall
from attending.taps.denoising import Moment
from attending.taps.running import evaluating

Entry = TypeVar("Entry")


def frame_planner(
    mask: Bool[Tensor, "frames frames"],
    tokens_per_frame: int,
    *,
    block_size: int | None = None,
    text_tokens: int = 0,
    text_first: bool = True,
) -> Planner:
    """A planner that gives every call the plan of a mask of frames; see `expand_frame_mask`."""
    plan = expand_frame_mask(
        mask,
        tokens_per_frame,
        block_size=block_size,
        text_tokens=text_tokens,
        text_first=text_first,
    )
    return lambda call, moment: plan


@dataclass(frozen=True, eq=False)
class LayerSearch:
    """What a search measured, and what follows from it.

    Attributes:
        mse, relative_mse: both errors, by layer (the name of the attention module), then by
            candidate. Of the first the paper gives thresholds, the second does not depend on the
            scale of a layer.
        densities: the share of the map that each candidate computed, in the same way.
        candidates: the planners.
        threshold: the budget of the search.
        metric: which of the errors it is a budget of; `replace(search, metric="mse")` for the other
            one.
        probe: where they were measured.
    """

    mse: Mapping[str, Mapping[str, float]]
    relative_mse: Mapping[str, Mapping[str, float]]
    densities: Mapping[str, Mapping[str, float]]
    candidates: Mapping[str, Planner] = field(repr=False)
    threshold: float
    metric: Metric
    probe: Probe

    @property
    def errors(self) -> Mapping[str, Mapping[str, float]]:
        """Those that the budget is for."""
        return self.mse if self.metric == "mse" else self.relative_mse

    def choose(self, threshold: float | None = None) -> dict[str, str | None]:
        """For each layer the sparsest candidate whose error is at most the threshold; None = dense.

        Of equally sparse ones it is the first.

        Args:
            threshold: another than that of the search.
        """
        limit = self.threshold if threshold is None else threshold
        chosen: dict[str, str | None] = {}
        for layer, errors in self.errors.items():
            within = [name for name in errors if errors[name] <= limit]
            chosen[layer] = min(within, key=self.densities[layer].__getitem__, default=None)
        return chosen

    def density(self, threshold: float | None = None) -> float:
        """The share of all maps that the choice computes, every layer counted alike."""
        chosen = self.choose(threshold)
        parts = [
            1.0 if name is None else self.densities[layer][name] for layer, name in chosen.items()
        ]
        return sum(parts) / len(parts)

    def threshold_for(self, density: float) -> float:
        """The smallest threshold whose choice computes at most this share of the maps.

        Raises:
            ValueError: if even the sparsest candidates compute more.
        """
        levels = sorted({error for errors in self.errors.values() for error in errors.values()})
        for level in levels:  # the density falls as the threshold rises
            if self.density(level) <= density + 1e-9:
                return level
        raise ValueError(
            f"density: expected at least {self.density(torch.inf):.4f}, that of the sparsest "
            f"candidates, got {density}. Give the search sparser candidates."
        )

    def planner(self, threshold: float | None = None) -> Planner:
        """A planner for `BlockSparse` that follows the choice; other layers stay dense."""
        chosen = self.choose(threshold)

        def plan(call: AttentionCall, moment: Moment) -> BlockPlan | None:
            name = chosen.get(call.name)
            return None if name is None else self.candidates[name](call, moment)

        return plan

    def entries(
        self, of: Mapping[str, Entry], threshold: float | None = None
    ) -> dict[int | str, Entry]:
        """What belongs to the chosen candidates, by layer, without those that stay dense.

        `FrameReferenceAttention(search.entries(masks), tokens_per_frame=64)`

        Args:
            of: something for each candidate, by its name.
            threshold: another than that of the search.
        """
        chosen = self.choose(threshold)
        return {layer: of[name] for layer, name in chosen.items() if name is not None}

    def __str__(self) -> str:
        """A table: a line for each layer, a column for each candidate, the choice marked by *."""
        names = list(self.candidates)
        chosen = self.choose()
        wide = max(len("layer"), *(len(layer) for layer in self.errors))
        lines = [
            f"{self.metric} at the {self.probe}, at most {self.threshold:g}; computed: "
            f"{self.density():.1%}",
            "  ".join(["layer".ljust(wide), *(f"{name:>10}" for name in names)]),
        ]
        for layer, errors in self.errors.items():
            cells = [f"{errors[name]:.3g}{'*' * (chosen[layer] == name)}" for name in names]
            lines.append("  ".join([layer.ljust(wide), *(f"{cell:>10}" for cell in cells)]))
        return "\n".join(lines)


def search_layer_masks(
    model: nn.Module,
    run: Callable[[], object],
    candidates: Mapping[str, Planner],
    threshold: float,
    *,
    metric: Metric = "mse",
    probe: Probe = "attention",
    steps: int | None = None,
) -> LayerSearch:
    """For each layer of self-attention the sparsest plan whose error stays within a budget.

        mse          = mean (sparse - dense)^2
        relative_mse = mse / mean dense^2

    over everything that `run` computes. The layer under test is sparse, all others are dense.

    Args:
        model: a denoiser, or any model; it runs in evaluation mode and without gradients.
        run: calls the model on what to calibrate with, always the same: a few prompts, a few
            timesteps. With `probe="output"` it returns what the model returned, a tensor or
            something with one in it.
        candidates: planners by name, as for `BlockSparse`; `frame_planner` makes those of the
            paper. A layer for which a planner gives no plan counts as dense, without error.
        threshold: the budget. The paper's are 0.025 to 0.4, of `"mse"`, which depends on the scale
            of the model's activations.
        metric: of which error; `"relative_mse"` does not depend on that scale.
        probe: where the error is measured: `"attention"` (the output of the function, before its
            projection; one run for all layers and candidates together), `"block"` (the output of
            the transformer block around it) or `"output"` (what `run` returns). The last two take
            `layers * (candidates + 1)` runs.
        steps: of one generation, for models whose forward takes no `timestep`.

    Raises:
        ValueError: for no candidates, an unknown metric or probe, a layer in no block, or a `run`
            that does not call the same layers each time.
        TapError: if `run` calls no attention of the model.
    """
    if not candidates:
        raise ValueError("candidates: expected planners by name, got none.")
    if metric not in get_args(Metric) or probe not in get_args(Probe):
        raise ValueError(
            f"metric, probe: expected one of {get_args(Metric)} and one of {get_args(Probe)}, got "
            f"{metric!r} and {probe!r}."
        )
    measure = Measure(model, run, candidates, steps)
    with torch.no_grad(), evaluating(model):
        sums = measure.at_attention()
        if probe != "attention":
            sums = {
                layer: measure.elsewhere(layer, probe, densities)
                for layer, (_, densities) in sums.items()
            }
    if not sums:
        raise ValueError(
            "run: expected a run that calls self-attention of the model, got cross-attention only."
        )
    absolute, relative = (
        {
            layer: {name: error.value(kind) for name, error in found.items()}
            for layer, (found, _) in sums.items()
        }
        for kind in get_args(Metric)
    )
    densities = {layer: found for layer, (_, found) in sums.items()}
    return LayerSearch(
        absolute, relative, densities, dict(candidates), float(threshold), metric, probe
    )
