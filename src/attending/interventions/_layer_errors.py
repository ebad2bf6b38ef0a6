"""The errors that plans make in single layers of a running model, for the search of layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attending.core.block_plan import BlockPlan
from attending.interventions.block_sparse import Planner
from attending.interventions.sparse_run import output_over, plan_of_call
from attending.taps import AttentionCall, Proceed, tap
from attending.taps.blocks import blocks_of
from attending.taps.denoising import DenoisingClock, Moment
from attending.taps.running import first_tensor

Metric = Literal["mse", "relative_mse"]
Probe = Literal["attention", "block", "output"]


@dataclass
class LayerError:
    """A squared error and what it is relative to, summed."""

    squared: float = 0.0
    dense: float = 0.0
    count: int = 0

    def add(self, sparse: Tensor, dense: Tensor) -> None:
        dtype = torch.promote_types(dense.dtype, torch.float32)
        self.squared += float(
            (sparse.to(dtype) - dense.to(dtype)).square().sum(dtype=torch.float64)
        )
        self.dense += float(dense.to(dtype).square().sum(dtype=torch.float64))
        self.count += dense.numel()

    def value(self, metric: Metric) -> float:
        if metric == "mse":
            return self.squared / max(self.count, 1)
        return self.squared / self.dense if self.dense else 0.0 if not self.squared else torch.inf


class _Shares:
    """The mean density of a candidate over the calls of a layer."""

    def __init__(self) -> None:
        self.kept, self.whole = 0.0, 0.0

    def add(self, call: AttentionCall, density: float) -> None:
        entries = call.query.shape[:-1].numel() * call.key_length
        self.kept += density * entries
        self.whole += entries


Found = dict[str, tuple[dict[str, LayerError], dict[str, float]]]  # by layer: errors, densities


class Measure:
    """Runs the model with one layer sparse at a time; see `search_layer_masks`."""

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[], object],
        candidates: Mapping[str, Planner],
        steps: int | None,
    ) -> None:
        self.model, self.run, self.candidates, self.steps = model, run, candidates, steps

    def at_attention(self) -> Found:
        """All layers and candidates in one run, as nothing but the dense output goes on."""
        errors: dict[str, dict[str, LayerError]] = {}
        shares: dict[str, dict[str, _Shares]] = {}

        def compare(call: AttentionCall, proceed: Proceed, moment: Moment) -> Tensor:
            dense = proceed(call)
            mine = errors.setdefault(call.name, {name: LayerError() for name in self.candidates})
            share = shares.setdefault(call.name, {name: _Shares() for name in self.candidates})
            for name, planner in self.candidates.items():
                sparse, density = _sparse(call, planner(call, moment))
                mine[name].add(dense if sparse is None else sparse, dense)
                share[name].add(call, density)
            return dense

        with self._handled(compare):
            self.run()
        return {
            layer: (found, {name: one.kept / one.whole for name, one in shares[layer].items()})
            for layer, found in errors.items()
        }

    def elsewhere(
        self, layer: str, probe: Probe, densities: dict[str, float]
    ) -> tuple[dict[str, LayerError], dict[str, float]]:
        """One layer, at the output of its block or of the model."""
        watched = None if probe == "output" else _block_around(self.model, layer)
        wanted = self._outputs(layer, None, watched)
        errors = {name: LayerError() for name in self.candidates}
        for name, planner in self.candidates.items():
            found = self._outputs(layer, planner, watched)
            if len(found) != len(wanted):
                raise ValueError(
                    f"run: expected the same calls of the model each time, got {len(wanted)} and "
                    f"then {len(found)} outputs of {layer or 'the model'}."
                )
            for one, other in zip(found, wanted, strict=True):
                errors[name].add(one, other)
        return errors, densities

    def _outputs(
        self, layer: str, planner: Planner | None, watched: nn.Module | None
    ) -> Sequence[Tensor]:
        kept: list[Tensor] = []

        def attend(call: AttentionCall, proceed: Proceed, moment: Moment) -> Tensor:
            plan = None if planner is None or call.name != layer else planner(call, moment)
            sparse, _ = _sparse(call, plan)
            return proceed(call) if sparse is None else sparse

        def keep(module: nn.Module, args: object, output: object) -> None:
            kept.append(_tensor_in(output, "model"))

        with self._handled(attend):
            if watched is None:
                return [_tensor_in(self.run(), "run")]
            handle = watched.register_forward_hook(keep)
            try:
                self.run()
            finally:
                handle.remove()
        return kept

    @contextmanager
    def _handled(
        self, handler: Callable[[AttentionCall, Proceed, Moment], Tensor]
    ) -> Iterator[None]:
        def only_self(call: AttentionCall, proceed: Proceed) -> Tensor:
            return proceed(call) if call.is_cross else handler(call, proceed, clock.now())

        with DenoisingClock(self.model, self.steps) as clock, tap(self.model, only_self):
            yield


def _sparse(call: AttentionCall, plan: BlockPlan | None) -> tuple[Tensor | None, float]:
    """The output over a plan, and its density; None where there is no plan."""
    if plan is None:
        return None, 1.0
    plan = plan_of_call(call, plan)
    return output_over(call, plan), plan.density


def _block_around(model: nn.Module, layer: str) -> nn.Module:
    """The innermost block that a layer lies in."""
    around = {
        name: block for name, block in blocks_of(model).items() if layer.startswith(f"{name}.")
    }
    if not around:
        raise ValueError(
            f'probe: expected "attention" or "output", got "block": {layer or "the model"!r} is in '
            "no block, an entry of an nn.ModuleList."
        )
    return around[max(around, key=len)]


def _tensor_in(value: object, name: str) -> Tensor:
    found = first_tensor(value)
    if found is None:
        raise ValueError(
            f"{name}: expected to get a tensor, or something with one in it, got "
            f"{type(value).__name__}. Let `run` return what the model returned."
        )
    return found
