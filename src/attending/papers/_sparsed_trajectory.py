"""SparseD and what it has to beat, while a masked language model fills gaps in known texts.

Dense attention decides in which order the gaps are uncovered (the surest first), and what is
uncovered is what really stands there. In every step that is sparse each method reads the very
canvas that dense attention read, so that its distributions at the masked places can be compared
with dense ones, and with the truth. All methods keep as many blocks, or a few more than SparseD.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core.block_plan import BlockPlan
from attending.interventions.block_sparse import BlockSparse
from attending.interventions.sparsed import SparseD
from attending.sparse.window import window_plan

VARIANTS = ("sparsed", "isolated", "first_step", "joint")
WINDOWS = {"window": 0, "window_and_sink": 1}  # and how many blocks at the start all see


@dataclass(frozen=True)
class Setup:
    """What does not differ between methods."""

    prompt: int
    answer: int
    gaps: int
    steps: int
    skip: float
    select: float
    block_size: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.answer

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return math.ceil(self.length / self.block_size)

    @property
    def late(self) -> range:
        """The steps that are sparse."""
        return range(SparseD(skip=self.skip).last_dense_step(self.steps) + 1, self.steps)

    def sparsed(self, **changes: Any) -> SparseD:
        """The method with these settings, but for some."""
        ways: dict[str, Any] = {
            "skip": self.skip,
            "select": self.select,
            "block_size": self.block_size,
            "new_tokens": self.answer,
        }
        return SparseD(**{**ways, **changes})

    def variant(self, name: str, kept: int) -> SparseD:
        """SparseD, or something like it, by name.

        Args:
            name: one of `VARIANTS`.
            kept: how many blocks a row of `joint` keeps.
        """
        if name == "joint":  # one ranking of all blocks, prompt and answer alike
            return self.sparsed(select=(kept - 0.5) / self.blocks, new_tokens=self.length)
        if name == "first_step":
            return self.sparsed(plan_step=0)
        return self.sparsed(isolated=name == "isolated")

    def window(self, kept: int, sinks: int = 0) -> BlockPlan:
        """A sliding window of so many blocks, and blocks at the start besides."""
        return window_plan(
            self.length, self.length, block_size=self.block_size, width=kept, sinks=sinks
        )


@dataclass(frozen=True)
class Step:
    """What SparseD is told of a step."""

    index: int
    steps: int
    new_tokens: int


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The canvases of all steps, and what is made of their masked places."""

    canvases: list[Int[Tensor, "rows tokens"]]
    log_p: list[Float[Tensor, "masked vocabulary"]]
    truth: list[Int[Tensor, " masked"]]


@torch.no_grad()
def compare(
    model: Any,
    text: Int[Tensor, "rows tokens"],
    masked: Bool[Tensor, "rows tokens"],
    setup: Setup,
    mask: int,
) -> tuple[dict[str, float], int]:
    """Numbers of all methods, by name, and how many blocks a row of SparseD keeps, rounded up.

    - `nats_*`: of the real token at a masked place, mean over the sparse steps.
    - `right_*`: share of these places whose likeliest token is the real one.
    - `kl_*`: KL divergence from dense attention's distribution to the method's, in nats.
    - `density_*`: share of the maps that sparse calls compute.
    """
    dense = trajectory(model, text, masked, setup, mask)
    numbers = _quality("dense", dense, [dense.log_p[step] for step in setup.late], setup)
    kept = 0
    for name in (*VARIANTS, *WINDOWS):
        follow = _follow_window if name in WINDOWS else _follow
        log_p, density = follow(model, name, kept, dense, setup, mask)
        numbers |= _quality(name, dense, log_p, setup)
        numbers[f"density_{name}"] = density
        kept = kept or math.ceil(density * setup.blocks - 1e-9)
    return numbers, kept


def trajectory(model: Any, text: Tensor, masked: Tensor, setup: Setup, mask: int) -> Trajectory:
    """Uncover the real text in the order of dense attention's confidence."""
    canvas = text.masked_fill(masked, mask)
    found = Trajectory([], [], [])
    for step in range(setup.steps):
        hidden = canvas == mask
        log_p = _masked_log_p(model, canvas, mask)
        found.canvases.append(canvas)
        found.log_p.append(log_p)
        found.truth.append(text[hidden])
        confidence = torch.full(canvas.shape, -math.inf, dtype=torch.float64)
        confidence[hidden] = log_p.amax(-1)
        share = setup.gaps // setup.steps + (step < setup.gaps % setup.steps)
        surest = confidence.topk(share, dim=-1).indices
        canvas = canvas.scatter(1, surest, text.gather(1, surest))
    return found


def _masked_log_p(model: Any, canvas: Tensor, mask: int) -> Float[Tensor, "masked vocabulary"]:
    logits = model(input_ids=canvas).logits[canvas == mask].double()
    logits[:, mask] = -math.inf
    log_p: Tensor = logits.log_softmax(-1)
    return log_p


def _follow(
    model: Any, name: str, kept: int, dense: Trajectory, setup: Setup, mask: int
) -> tuple[list[Tensor], float]:
    """What a variant of SparseD makes of the late canvases, and its density there."""
    method, found = setup.variant(name, kept), []
    planning = setup.late[0] - 1 if method.plan_step is None else method.plan_step
    with method(model) as run:
        for step in (planning, *setup.late):  # the dense steps between change nothing
            run.on_step(Step(step, setup.steps, setup.answer))
            found.append(_masked_log_p(model, dense.canvases[step], mask))
    return found[1:], run.blocks_computed / run.blocks_of_dense


def _follow_window(
    model: Any, name: str, kept: int, dense: Trajectory, setup: Setup, mask: int
) -> tuple[list[Tensor], float]:
    plan = setup.window(kept, WINDOWS[name])
    with BlockSparse(lambda call, moment: plan)(model):
        return [_masked_log_p(model, dense.canvases[step], mask) for step in setup.late], (
            plan.density
        )


def _quality(name: str, dense: Trajectory, log_p: list[Tensor], setup: Setup) -> dict[str, float]:
    ours = torch.cat(log_p)
    theirs = torch.cat([dense.log_p[step] for step in setup.late])
    truth = torch.cat([dense.truth[step] for step in setup.late])
    difference = torch.where(theirs.isfinite(), theirs.exp() * (theirs - ours), 0.0)
    return {
        f"nats_{name}": float(-ours.gather(1, truth[:, None]).mean()),
        f"right_{name}": float((ours.argmax(-1) == truth).double().mean()),
        f"kl_{name}": float(difference.sum(-1).mean()),
    }
