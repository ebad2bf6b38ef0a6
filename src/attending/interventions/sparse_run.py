"""What the methods that leave out blocks of self-attention maps have in common.

def start(run: SparseRun) -> Handler:
    plans = {}                                    # of this block
    run.clock.on_restart(plans.clear)

    def attend(call: AttentionCall, proceed: Proceed) -> Tensor:
        if run.clock.now().step < 3:
            return run.dense(call, proceed, "the first steps are dense")
        return run.over(call, proceed, plans[call.name])

    return attend

return sparse_calls(model, start, name="Mine")
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import TypeVar

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from attending.interventions.edit import hiding, shown_by_both
from attending.interventions.intervention import Counted, Run, with_counters
from attending.taps import AttentionCall, Handler, Proceed
from attending.taps.denoising import DenoisingClock


@dataclass(eq=False, kw_only=True)
class SparseRun(Run):
    """What was left out within one `with` block.

    Attributes:
        clock: the step of the denoising loop.
        blocks_computed: blocks of maps, over batch and heads, that sparse calls looked at.
        blocks_of_dense: those that the same calls would have looked at without a plan.
        entries_computed, entries_of_dense: the same in pairs of query and key, over all calls of
            self-attention, dense ones too.
    """

    clock: DenoisingClock
    blocks_computed: int = 0
    blocks_of_dense: int = 0
    entries_computed: float = field(default=0.0, repr=False)
    entries_of_dense: float = field(default=0.0, repr=False)

    @property
    def density(self) -> float:
        """The share of all maps that was computed: 1 if nothing was left out."""
        return self.entries_computed / self.entries_of_dense if self.entries_of_dense else 1.0

    @property
    def stats(self) -> dict[str, int | float]:
        """The counts, as a plain dictionary."""
        return {
            "calls": self.calls,
            "sparse_calls": self.edited_calls,
            "dense_calls": self.calls - self.edited_calls,
            "blocks_computed": self.blocks_computed,
            "blocks_of_dense": self.blocks_of_dense,
            "density": self.density,
        }

    def sparse(self, call: AttentionCall, plan: BlockPlan) -> None:
        """Count a call that was computed over a plan."""
        if call.recomputed:
            return
        batch, heads = call.query.shape[:2]
        shared = batch * heads // (plan.block_mask.shape[0] * plan.block_mask.shape[1])
        kept, able = plan.counts
        self.edited(call, range(heads))
        self.blocks_computed += kept * shared
        self.blocks_of_dense += able * shared
        self._entries(call, kept / max(able, 1))

    def dense(self, call: AttentionCall, proceed: Proceed, reason: str) -> Tensor:
        """The output of a call that is left as it is, counted with the reason in a few words."""
        self.left(call, reason)
        if not call.recomputed:
            self._entries(call, 1.0)
        return proceed(call)

    def over(self, call: AttentionCall, proceed: Proceed, plan: BlockPlan) -> Tensor:
        """The output of a call over the blocks of a plan, counted.

        What the call itself hides stays hidden. If another handler comes after this one, it is
        handed a dense call whose mask shows the plan's blocks: the blocks compose, and nothing is
        saved by the outer one.

        Raises:
            ValueError: if the call drops attention weights, or the plan does not fit it.
        """
        plan = plan_of_call(call, plan)
        self.sparse(call, plan)
        if call.inner:
            shown = shown_by_both(hiding(call.attn_mask), plan.visible())
            return proceed(replace(call, attn_mask=shown, is_causal=False))
        return output_over(call, plan)

    def _entries(self, call: AttentionCall, density: float) -> None:
        entries = call.query.shape[:-1].numel() * call.key_length
        self.entries_computed += density * entries
        self.entries_of_dense += entries

    def __str__(self) -> str:
        """In one line."""
        line = (
            f"{self.name}: {self.edited_calls} of {self.calls} calls of self-attention were sparse "
            f"({self.blocks_computed} of {self.blocks_of_dense} blocks), {self.density:.1%} of all "
            "maps computed"
        )
        reasons = (f"{count} x {reason}" for reason, count in self.left_alone.most_common())
        return "; dense: ".join(filter(None, (line, ", ".join(reasons))))


def plan_of_call(call: AttentionCall, plan: BlockPlan) -> BlockPlan:
    """The plan, causal if the call is; refused where the call cannot be computed in blocks."""
    if call.dropout_p:
        raise ValueError(
            f"model: expected no dropout on attention weights, got {call.dropout_p} in {call!r}. "
            "Call model.eval() first."
        )
    if call.query.dim() != 4:
        raise ValueError(
            f"model: expected calls of attention of shape [batch, heads, queries, dim], got "
            f"{list(call.query.shape)} in {call!r}."
        )
    if call.is_causal and plan.causal_offset is None:
        return replace(plan, causal_offset=0)
    return plan


def output_over(call: AttentionCall, plan: BlockPlan) -> Tensor:
    """What a call gives over the blocks of a plan of `plan_of_call`, within its own mask."""
    return block_sparse_attention(
        call.query,
        call.key,
        call.value,
        plan,
        bias=hiding(call.attn_mask),
        scale=call.softmax_scale,
    ).output


RunT = TypeVar("RunT", bound=SparseRun, default=SparseRun)


def sparse_calls(
    model: nn.Module,
    start: Callable[[RunT], Handler],
    *,
    name: str,
    steps: int | None = None,
    new_run: Callable[..., RunT] = SparseRun,  # type: ignore[assignment]
    around: Callable[[RunT], AbstractContextManager[Any]] | None = None,
) -> Counted[RunT]:
    """The context manager of a method that leaves out blocks of self-attention.

    Args:
        model: a denoiser, or any model. Cross-attention passes by, uncounted.
        start: called on every entry with a fresh run, whose clock runs within the block; returns
            the handler of the calls of self-attention.
        name: of the method, for the report.
        steps: of one generation, see `DenoisingClock`.
        new_run: makes the run, from the name and `clock=`, for methods that count more.
        around: what else is open within the block.

    Raises:
        TypeError, ValueError, TapError: as `attending.tap`.

    Warns:
        InterventionWarning: on exit, if no call was sparse.
    """

    def begin(run: RunT) -> Handler:
        attend = start(run)

        def only_self(call: AttentionCall, proceed: Proceed) -> Tensor:
            return proceed(call) if call.is_cross else attend(call, proceed)

        return only_self

    @contextmanager
    def open_beside(run: RunT) -> Iterator[None]:
        with nullcontext() if around is None else around(run), run.clock:
            yield

    return with_counters(
        model,
        begin,
        name=name,
        new_run=lambda title: new_run(title, clock=DenoisingClock(model, steps)),
        around=open_beside,
    )
