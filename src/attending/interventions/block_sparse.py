"""Self-attention over the blocks that a planner chooses, in any running model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from attending.core.block_plan import BlockPlan
from attending.interventions.intervention import Counted
from attending.interventions.sparse_run import SparseRun, sparse_calls
from attending.taps import AttentionCall, Handler, Proceed
from attending.taps.denoising import Moment

Planner = Callable[[AttentionCall, Moment], BlockPlan | None]
"""The blocks to compute in a call of self-attention at a moment of the loop; None is all."""


@dataclass(frozen=True)
class BlockSparse:
    """Compute self-attention over chosen blocks only.

        plan = window_plan(1024, 1024, block_size=64, width=5)
        with BlockSparse(lambda call, moment: plan)(model) as run:
            pipeline(prompt)
        print(run)                     # how much of the maps was computed

    The planner is asked at every call of self-attention, with the call (its name, layer, query and
    key) and the moment (step of the denoising loop); it should keep what it can use again. Planners
    of papers are in `attending.sparse`, and those with a memory of their own are methods beside
    this one.

    Attributes:
        planner: `(call, moment) -> BlockPlan`, or None to leave the call dense.
        steps: of one generation, for models whose forward takes no `timestep`.
    """

    planner: Planner
    steps: int | None = None

    def __call__(self, model: nn.Module) -> Counted[SparseRun]:
        """The context manager within which attention is sparse; it yields the counts.

        Raises:
            ValueError: within the block, if a plan does not fit its call.

        Warns:
            InterventionWarning: on exit, if no call was sparse.
        """

        def start(run: SparseRun) -> Handler:
            def attend(call: AttentionCall, proceed: Proceed) -> Tensor:
                plan = self.planner(call, run.clock.now())
                if plan is None:
                    return run.dense(call, proceed, "the planner gave no plan")
                return run.over(call, proceed, plan)

            return attend

        return sparse_calls(model, start, name="BlockSparse", steps=self.steps)
