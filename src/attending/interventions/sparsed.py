"""SparseD: each head's blocks are chosen once, early in the denoising loop, and used to its end.

From "SparseD: Sparse Attention for Diffusion Language Models" (Wang, Fang, Ma, Yang, Wang, 2025,
arXiv 2509.24014). Masked diffusion language models attend over prompt and answer in every step.
Which blocks a head looks at differs between heads and hardly between steps, and the first steps
matter most; so those stay dense, the last of them chooses, and the others are sparse.

    with SparseD()(model) as run:
        sample_masked_text(model, prompt, new_tokens=64, mask_token=mask, on_step=run.on_step)
    print(run)                              # how much of the maps was computed
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from attending.core.block_plan import BlockPlan
from attending.interventions.edit import hiding
from attending.interventions.intervention import Counted
from attending.interventions.sparse_run import SparseRun, sparse_calls
from attending.sparse.sparsed import check_select, sparsed_plan
from attending.taps import AttentionCall, Handler, Proceed
from attending.taps.denoising import DenoisingClock


@runtime_checkable
class SamplerStep(Protocol):
    """What a sampler says of the step that it is about to make; `UnmaskingStep` is one."""

    @property
    def index(self) -> int:
        """Number of the step, from 0."""
        ...

    @property
    def steps(self) -> int:
        """How many there will be."""
        ...

    @property
    def new_tokens(self) -> int:
        """How many tokens of the end are the answer."""
        ...


@dataclass(eq=False, kw_only=True)
class SparseDRun(SparseRun):
    """What SparseD left out within one `with` block.

    Attributes:
        steps, new_tokens: of the generation that runs; from the settings, or as the sampler says.
        plans: the blocks that were chosen in it, by the name of the attention and the branch.
    """

    steps: int | None
    new_tokens: int | None
    plans: dict[tuple[str, int], BlockPlan]
    _new_tokens_given: bool
    _told: int | None = None  # the step, where the sampler says it
    _first: int | None = None  # the forward with which that step began

    def on_step(self, step: SamplerStep) -> None:
        """Hear from the sampler which step comes next, of how many, and how long the answer is.

        Pass it to `sample_masked_text`, or call it before each step of a loop of your own: once the
        sampler has told a step, it has to tell them all.
        """
        if step.index == 0:
            self.plans.clear()
        if not self._new_tokens_given:
            self.new_tokens = step.new_tokens or None  # gaps are filled: there is no answer apart
        self.steps, self._told, self._first = step.steps, step.index, None

    def restart(self) -> None:
        """The clock says that a generation begins; a sampler that tells steps knows better."""
        if self._told is None:
            self.plans.clear()

    def place(self, call: AttentionCall) -> tuple[int, int]:
        """Step and branch, as the sampler says, else by the clock."""
        if self._told is None:
            moment = self.clock.now()
            return moment.step, moment.branch
        if self._first is None:
            self._first = call.forward
        return self._told, call.forward - self._first


@dataclass(frozen=True)
class SparseD:
    """Attention over blocks that are chosen once in a denoising loop.

    With `S` steps and `e = int(S * skip) + 1`, the steps 0 to e are dense; in step e each head's
    blocks are chosen from its queries and keys (`attending.sparse.sparsed`); from step e + 1 on
    only those are computed. That is the official code; it has one or two dense steps more than the
    share `skip`. Attention then costs about `(e + 2 + (S - e - 1) * density) / S` of dense.

    How it learns the steps:

    - A sampler that tells, such as `sample_masked_text(..., on_step=run.on_step)`: exactly, and
      also where the answer begins. Nothing else has to be given.
    - `steps` and `new_tokens`: every call of the model is a step, and after `steps` calls the next
      generation begins; for denoisers with a `timestep` the timestep tells (see `DenoisingClock`),
      and several calls at one timestep have blocks of their own. Where a loop without a timestep
      may stop early, call `run.clock.reset()` before each generation.

    It works where a model attends to the whole sequence at once: masked diffusion language models,
    video and image denoisers. Cross-attention passes by; causal attention and attention to a KV
    cache stay dense. For inference only: it forgets its blocks when a generation begins.

    Differences from the official code: it understands padding (its keys are hidden, and not
    counted in the choice; the official code ignores masks), guidance by several calls, lengths that
    are no multiple of the block, `select=1`; scores are scaled as the model scales them (the
    official code for LLaDA does not, by mistake); another batch or length is noticed.

    Attributes:
        skip: share of the steps that stay dense. The paper's: 0.2. From 1 on all of them do.
        select: share of the blocks to keep. The paper's: 0.3 for long contexts, 0.5 for short.
        block_size: tokens in a block. The paper's: 128 for long contexts, 32 for short.
        steps: of one generation; None if the sampler tells.
        new_tokens: how many tokens of the end are the answer; None if the sampler tells, or if
            there is no prompt, as in a video or where gaps of a text are filled. A number given
            here goes before what the sampler tells.
        isolated: rank the prompt's blocks among themselves, see `sparsed_mask`.
        count_real: rank a short last block by the tokens that it has, see `sparsed_mask`.
        plan_step: the step that chooses the blocks, up to e; None is e. Earlier ones are for
            comparison: the answer is then nothing but masks.

    Raises:
        ValueError: for settings out of range; within the block, if neither `steps` nor the sampler
            says how many there are, or if the sequence changes within a generation.
    """

    skip: float = 0.2
    select: float = 0.3
    block_size: int = 32
    steps: int | None = None
    new_tokens: int | None = None
    isolated: bool = False
    count_real: bool = False
    plan_step: int | None = None

    def __post_init__(self) -> None:
        if not self.skip >= 0:
            raise ValueError(
                f"skip: expected the share of the steps to leave dense, at least 0, got {self.skip}"
            )
        check_select(self.select)
        least = {"block_size": 1, "steps": 1, "new_tokens": 0, "plan_step": 0}
        for name, least_value in least.items():
            value = getattr(self, name)
            if value is not None and value < least_value:
                raise ValueError(f"{name}: expected at least {least_value}, got {value}.")

    def last_dense_step(self, steps: int) -> int:
        """The last step that is dense, counted from 0: `int(steps * skip) + 1`."""
        return int(steps * self.skip) + 1

    def __call__(self, model: nn.Module) -> Counted[SparseDRun]:
        """The context manager within which attention is sparse; it yields the counts.

        Args:
            model: what the sampler calls.

        Warns:
            InterventionWarning: on exit, if no call was sparse.
        """

        def start(run: SparseDRun) -> Handler:
            run.clock.on_restart(run.restart)

            def attend(call: AttentionCall, proceed: Proceed) -> Tensor:
                return self._attend(run, call, proceed)

            return attend

        def new_run(name: str, clock: DenoisingClock) -> SparseDRun:
            return SparseDRun(
                name,
                clock=clock,
                steps=self.steps,
                new_tokens=self.new_tokens,
                plans={},
                _new_tokens_given=self.new_tokens is not None,
            )

        return sparse_calls(model, start, name="SparseD", steps=self.steps, new_run=new_run)

    def _attend(self, run: SparseDRun, call: AttentionCall, proceed: Proceed) -> Tensor:
        if call.is_causal:
            return run.dense(call, proceed, "it is causal")
        if call.query_length != call.key_length:
            return run.dense(call, proceed, "its keys are not those of its queries")
        if run.steps is None:
            raise ValueError(
                "steps: expected the number of steps of a generation, got None. Pass "
                "on_step=run.on_step to sample_masked_text, or give SparseD(steps=...)."
            )
        step, branch = run.place(call)
        last = self.last_dense_step(run.steps)
        planning = last if self.plan_step is None else min(self.plan_step, last)
        plan = run.plans.get((call.name, branch))
        if plan is not None:
            _check_same(plan, call)
            if step > last:
                return run.over(call, proceed, plan)
        elif step >= planning:
            # A branch that begins late (guidance within an interval) chooses when it begins.
            run.plans[call.name, branch] = sparsed_plan(
                call.query,
                call.key,
                run.new_tokens,
                select=self.select,
                block_size=self.block_size,
                isolated=self.isolated,
                count_real=self.count_real,
                attn_mask=hiding(call.attn_mask),
                scale=call.scale,
            )
        return run.dense(call, proceed, "the first steps are dense")


def _check_same(plan: BlockPlan, call: AttentionCall) -> None:
    chosen = (*plan.block_mask.shape[:2], plan.query_length)
    if chosen != call.query.shape[:3]:
        raise ValueError(
            f"model: expected the [batch, heads, tokens] = {list(chosen)} of the step that chose "
            f"the blocks, got {list(call.query.shape[:3])} in {call!r}. If this is another "
            "generation: pass on_step=run.on_step to the sampler, give the right steps, or call "
            "run.clock.reset() before each generation."
        )
