"""PAROAttention in a running denoiser: orders and blocks from one sampling, then no prediction.

    def sample():
        pipeline("a cat on a skateboard", num_inference_steps=50)

    paro = PAROAttention.calibrate(
        transformer, sample, grid=(13, 30, 45), steps=50, text_tokens=226, density=0.3
    )
    paro.save("paro.json")
    with paro(transformer) as run:
        pipeline("anything else", num_inference_steps=50)
    print(run)

The grid is in tokens, as attention sees them: 13 latent frames of 30 x 45 patches. Layers in which
the tokens are others (cross-attention, other resolutions) stay dense, and the run says how many.
Each head has the tokens in the order that makes its map blockiest, and looks at a fixed set of
blocks of it; see `attending.sparse.paro`, `paro_calibration` and `quantised_attention`.

Source: PAROAttention (Zhao et al., arXiv 2506.16054). The authors' processors are for CogVideoX and
Wan; this works with any model whose self-attention reaches `scaled_dot_product_attention` after its
rotary embedding.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attending.interventions.edit import hiding, shown_by_both
from attending.interventions.intervention import Counted
from attending.interventions.settings import load_settings, save_settings
from attending.interventions.sparse_run import SparseRun, plan_of_call, sparse_calls
from attending.sparse.paro import PAROPlan, Quant, paro_attention
from attending.sparse.paro_calibration import Criterion, PAROCalibration
from attending.sparse.quantised_attention import MapGroups
from attending.taps import AttentionCall, Handler, Proceed, tap
from attending.taps.denoising import DenoisingClock
from attending.taps.running import evaluating


@dataclass(frozen=True, eq=False)
class PAROAttention:
    """Self-attention over fixed blocks, with the tokens in an order of each head's own.

    Attributes:
        plan: orders and blocks; made by `calibrate`.
        steps: of the sampling, if not as many as when it was calibrated.
        quant: also simulate "int8" or "int4" in both products; slow. With `plan.dense()` it is
            quantisation alone.
        groups: entries of the map that share a scale, with `quant`: "block", "row" or "fixed".
        quant_block: along each side of a block of them. A block of 64 x 64 is smaller than a row
            only where there are more than 4096 keys.
        renormalize: see `attending.sparse.paro.paro_attention`. False costs dense attention.
    """

    plan: PAROPlan
    steps: int | None = None
    quant: Quant | None = None
    groups: MapGroups = "block"
    quant_block: int = 64
    renormalize: bool = True

    def __call__(self, model: nn.Module) -> Counted[SparseRun]:
        """The context manager within which attention is sparse; it yields the counts.

        Raises:
            ValueError: within the block, if the model drops attention weights, has other heads than
                the plan, or a method inside this one would have to see what cannot be shown.

        Warns:
            InterventionWarning: on exit, if no call fitted the plan.
        """

        def start(run: SparseRun) -> Handler:
            def attend(call: AttentionCall, proceed: Proceed) -> Tensor:
                reason = self._misfit(call)
                if reason is not None:
                    return run.dense(call, proceed, reason)
                return self._attend(run, call, proceed)

            return attend

        steps = self.plan.steps if self.steps is None else self.steps
        steps_of_clock = None if _takes_timestep(model) else steps
        return sparse_calls(model, start, name="PAROAttention", steps=steps_of_clock)

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        run: Callable[[], object] | Mapping[str, Any],
        grid: Sequence[int],
        *,
        steps: int | None = None,
        density: float = 0.3,
        block_size: int = 64,
        eps: float = 1e-3,
        sigma: float = 0.9,
        alpha: float = 0.5,
        criterion: Criterion = "corrected",
        timestep_bins: int = 10,
        shared_from: float = 0.5,
        candidates: Sequence[str] | None = None,
        keep_last: bool = True,
        text_tokens: int = 0,
        text_first: bool = True,
    ) -> "PAROAttention":
        """Choose orders and blocks by running the model twice.

        Args:
            model: a denoiser, in evaluation mode.
            run: samples one or a few videos, the same ones each time: a function without arguments
                that calls the model `steps` times a sampling. Or keyword arguments of the model for
                a single call, where there is no sampling to be had.
            grid: tokens along each axis, as (frames, height, width) or (height, width).
            steps: of the sampling; 1 for keyword arguments.
            density: kept blocks over all blocks of a map.
            block_size, eps, sigma, alpha, criterion: see `PAROCalibration`.
            timestep_bins, shared_from, candidates, keep_last, text_tokens, text_first: see there.

        Raises:
            ValueError: for arguments out of their range, or if the run had other steps, or no
                self-attention over these tokens.
        """
        if steps is None and not isinstance(run, Mapping):
            raise ValueError("steps: expected the number of steps of the sampling, got None.")
        calibration = PAROCalibration(
            grid,
            steps=1 if steps is None else steps,
            block_size=block_size,
            eps=eps,
            sigma=sigma,
            alpha=alpha,
            criterion=criterion,
            density=density,
            timestep_bins=timestep_bins,
            shared_from=shared_from,
            candidates=candidates,
            keep_last=keep_last,
            text_tokens=text_tokens,
            text_first=text_first,
        )
        watch(model, run, calibration)
        return cls(calibration.plan())

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, and a safetensors file of the same name beside it."""
        return save_settings(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "PAROAttention":
        """Read what `save` wrote."""
        return load_settings(cls, path)

    def _misfit(self, call: AttentionCall) -> str | None:
        """Why the plan is not for this call, in a few words."""
        if call.name not in self.plan.layers:
            return "the plan has no such layer"
        if call.query.dim() != 4 or not call.query_length == call.key_length == self.plan.tokens:
            return f"the plan is for {self.plan.tokens} tokens"
        if call.is_causal or _differs_by_query(call.attn_mask):
            return "its mask is not one of keys"
        return None

    def _attend(self, run: SparseRun, call: AttentionCall, proceed: Proceed) -> Tensor:
        plan, step = self.plan, run.clock.now().step
        blocks = plan_of_call(call, plan.block_plan(call.name, step, self.steps, call.query.device))
        mask = hiding(call.attn_mask)
        run.sparse(call, blocks)
        if call.inner:
            if self.quant is not None or not self.renormalize:
                raise ValueError(
                    "quant, renormalize: expected plain PAROAttention where another method is open "
                    "inside its block, as that gets a mask to work with. Open this one inside the "
                    "other."
                )
            return proceed(replace(call, attn_mask=self._shown(call, blocks.visible(), mask)))
        return paro_attention(
            call.query,
            call.key,
            call.value,
            plan,
            call.name,
            step,
            steps=self.steps,
            quant=self.quant,
            groups=self.groups,
            quant_block=self.quant_block,
            renormalize=self.renormalize,
            bias=mask,
            scale=call.softmax_scale,
        ).output

    def _shown(self, call: AttentionCall, shown: Tensor, mask: Tensor | None) -> Tensor:
        """The plan as a mask in the order of the model."""
        index = self.plan.index(call.name, call.query.device)
        if index is not None:
            back = index[1][:, :, None].expand(-1, -1, shown.shape[-1])
            shown = shown.gather(2, back[None]).gather(3, back.mT[None].expand_as(shown))
        return shown_by_both(mask, shown)


def watch(
    model: nn.Module, run: Callable[[], object] | Mapping[str, Any], *calibrations: PAROCalibration
) -> None:
    """Show calibrations two runs of a model: for plans of several kinds from the same runs.

        calibration = PAROCalibration(grid, steps=50)
        watch(transformer, sample, calibration)
        sparse, sparser = (PAROAttention(calibration.plan(density)) for density in (0.5, 0.2))

    Args:
        model: a denoiser.
        run: as in `PAROAttention.calibrate`.
        calibrations: fresh ones, which are ready for `plan` afterwards.

    Raises:
        ValueError: if the run had other steps, or no self-attention over these tokens.
    """
    for time in range(2):
        seen = [_Watching(calibration) for calibration in calibrations]
        steps = None if _takes_timestep(model) else calibrations[0].steps
        with ExitStack() as opened:
            opened.enter_context(evaluating(model))
            opened.enter_context(torch.no_grad())
            clock = opened.enter_context(DenoisingClock(model, steps))
            opened.enter_context(tap(model, _looking(seen, clock)))
            _ = model(**run) if isinstance(run, Mapping) else run()
        for one in seen:
            one.check()
            if time == 0:
                one.calibration.choose_orders()


def _looking(seen: Sequence["_Watching"], clock: DenoisingClock) -> Handler:
    def look(call: AttentionCall, proceed: Proceed) -> Tensor:
        for one in seen:
            one.look(call, clock.now().step)
        return proceed(call)

    return look


class _Watching:
    """What one calibration saw of one run."""

    def __init__(self, calibration: PAROCalibration) -> None:
        self.calibration = calibration
        self.steps = 0
        self.lengths: set[int] = set()
        self.fitting = 0

    def look(self, call: AttentionCall, step: int) -> None:
        self.steps = max(self.steps, step + 1)
        if call.is_cross or call.is_causal or _differs_by_query(call.attn_mask):
            return  # stays dense later, too
        self.lengths.add(call.query_length)
        if call.query_length == call.key_length == self.calibration.tokens:
            self.fitting += 1
            bias, scale = hiding(call.attn_mask), call.softmax_scale
            self.calibration.see(call.name, step, call.query, call.key, bias=bias, scale=scale)

    def check(self) -> None:
        if not self.fitting:
            raise ValueError(
                f"grid: expected one that with text_tokens has the tokens of a self-attention, got "
                f"{self.calibration.tokens}, where the model has {sorted(self.lengths)}."
            )
        if self.steps != self.calibration.steps:
            raise ValueError(
                f"steps: expected {self.steps}, as many as the run had, got "
                f"{self.calibration.steps}."
            )


def _takes_timestep(model: nn.Module) -> bool:
    """Whether a clock needs no steps. Told them, it would not notice that there are more."""
    return "timestep" in inspect.signature(model.forward).parameters


def _differs_by_query(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() >= 2 and mask.shape[-2] > 1
