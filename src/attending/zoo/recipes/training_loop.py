"""The loop that recipes share: rates, steps, measurements, checkpoints, going on after a halt."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import MofNCompleteColumn, Progress
from torch import nn

from attending.zoo.recipes.checkpoint import (
    Resumable,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from attending.zoo.recipes.machine import describe_machine
from attending.zoo.recipes.two_optimizers import TwoOptimizers

CHECKPOINT = "checkpoint.safetensors"


class Stepping(Resumable, Protocol):
    """An optimizer whose rate is set before each step."""

    def set_rate(self, share: float) -> None:
        """Set the learning rate to a share of the full one."""
        ...

    def step(self) -> None:
        """Change the parameters that have gradients."""
        ...

    def zero_grad(self) -> None:
        """Drop the gradients."""
        ...


class OneOptimizer:
    """An optimizer of PyTorch, its rates set as shares of those that it was made with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.full = [group["lr"] for group in optimizer.param_groups]

    def set_rate(self, share: float) -> None:
        """Set the learning rates to a share of the full ones."""
        for group, full in zip(self.optimizer.param_groups, self.full, strict=True):
            group["lr"] = share * full

    def step(self) -> None:
        """Change the parameters that have gradients."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.optimizer.load_state_dict(state_dict)


def check_same(part: str, expected: object, got: object, checkpoint: Path) -> None:
    """Refuse to mix a stored run with another recipe or other data."""
    if expected != got:
        raise ValueError(
            f"expected the {part} of the run in {checkpoint}, {expected}, got {got}; choose "
            "another out_dir, or train afresh with resume=False"
        )


def run_steps(
    out: Path,
    trainee: nn.Module,
    recipe: Any,
    backward: Callable[[int], float],
    measure: Callable[[int], Mapping[str, float]],
    *,
    optimizer: Stepping | None = None,
    resume: bool = True,
    facts: Mapping[str, Any] | None = None,
    publish: Callable[[dict[str, Any]], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train step by step, measuring and saving every ``recipe.evaluate_every`` steps.

    What a step does must be a function of its number alone; then a halted run that is started
    again ends as if it had never halted.

    Args:
        out: The folder of the checkpoint; made if it is not there.
        trainee: Everything that is trained.
        recipe: A dataclass with ``steps``, ``evaluate_every``, ``clip``, ``rate_at(step)`` and, for
            the default optimizer, the settings of :class:`TwoOptimizers`.
        backward: From the number of a step to its loss; gradients land in the trainee.
        measure: From the number of finished steps to what the curve tells beside the loss.
        optimizer: Of the trainee's parameters; Muon and AdamW by default.
        resume: Go on from the checkpoint if there is one.
        facts: What a run must share with its checkpoint besides the recipe, for JSON.
        publish: Called with the state after each measurement.
        after_step: Called with the number of each finished step, before it is measured or saved.
        on_step: Called with the number of finished steps and the loss of the last one.

    Returns:
        ``losses`` (one per step), ``step``, ``recipe``, the facts, ``machine``, ``seconds`` and
        ``curve``.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / CHECKPOINT
    optimizer = TwoOptimizers.of(trainee, recipe) if optimizer is None else optimizer
    fixed = {"recipe": asdict(recipe), **(facts or {})}
    state: dict[str, Any] = {
        "step": 0,
        **fixed,
        "machine": describe_machine(),
        "seconds": 0.0,
        "curve": [],
    }
    losses: list[float] = []
    if resume and checkpoint.exists():
        stored = read_state(checkpoint)
        for part, value in fixed.items():
            check_same(part, stored[part], value, checkpoint)
        state, losses = stored, load_checkpoint(checkpoint, trainee, optimizer)

    trainee.train()
    began = time.perf_counter() - state["seconds"]
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        bar = progress.add_task("", total=recipe.steps, completed=state["step"])
        for step in range(state["step"], recipe.steps):
            optimizer.set_rate(recipe.rate_at(step))
            losses.append(backward(step))
            nn.utils.clip_grad_norm_(trainee.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            finished = step + 1
            if after_step is not None:
                after_step(finished)
            progress.update(bar, completed=finished, description=f"loss {losses[-1]:.3f}")
            if finished % recipe.evaluate_every == 0 or finished == recipe.steps:
                recent = losses[state["step"] :]
                point = {
                    "step": finished,
                    "training_loss": sum(recent) / len(recent),
                    **measure(finished),
                }
                curve, seconds = [*state["curve"], point], time.perf_counter() - began
                state = {**state, "step": finished, "seconds": seconds, "curve": curve}
                save_checkpoint(checkpoint, trainee, optimizer, losses, state)
                progress.console.print(f"{seconds:.0f} s, step {finished}: {point}")
                if publish is not None:
                    publish(state)
            if on_step is not None:
                on_step(finished, losses[-1])
    return {**state, "losses": losses}
