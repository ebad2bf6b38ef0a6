"""The operators that `operators.py` measures: add a row.

A contender is `"module:function"`, called as `function(query, key, value, is_causal)` with tensors
`[batch, heads, tokens, dim]`, in float32. Write ours as a wrapper if it is called otherwise. The
straightforward formulation is what the operator's own paper (or official code) writes down, in a
file of its own in `_operators/`; peers are other libraries, imported when they are measured, and
left out with the reason where they are not installed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Goal:
    """A number that was set before the measurement.

    Attributes:
        words: what is compared.
        path: where the number is in the row's figures.
        at_least, at_most: its bounds.
    """

    words: str
    path: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Row:
    """One operator.

    Attributes:
        ours: our function.
        straightforward: that of the paper.
        causal: the forms that there are.
        same: whether ours and the straightforward one compute the same numbers, which is checked.
        peers: by name.
        longest: more tokens than this are not asked of the straightforward formulation and of
            peers in their causal form, for their memory.
        most: more tokens than this are not measured at all, for the time of a quadratic operator
            or the memory of its straightforward formulation.
        goals: bounds on figures of this row.
    """

    ours: str
    straightforward: str
    causal: tuple[bool, ...] = (False, True)
    same: bool = True
    peers: Mapping[str, str] = field(default_factory=dict)
    longest: int = 16384
    most: int = 65536
    goals: tuple[Goal, ...] = ()


OURS, STRAIGHTFORWARD, SDPA = "ours", "straightforward", "SDPA"


def never_slower(causal: tuple[bool, ...] = (False, True), factor: float = 1.0) -> tuple[Goal, ...]:
    """The goal of every operator: at 4096 tokens, in time."""
    forms = [("causal" if one else "bidirectional") for one in causal]
    return tuple(
        Goal(
            f"straightforward / ours, time, {form}, {work}, 4096 tokens",
            (form, work, "4096", STRAIGHTFORWARD, "time over ours"),
            at_least=factor,
        )
        for form in forms
        for work in ("forward", "forward and backward")
    )


def small_memory(factor: float, form: str = "causal") -> tuple[Goal, ...]:
    """Peak memory of ours over that of the straightforward formulation, at 4096 tokens."""
    return tuple(
        Goal(
            f"ours / straightforward, peak memory, {form}, {work}, 4096 tokens",
            (form, work, "4096", STRAIGHTFORWARD, "memory of ours over it"),
            at_most=factor,
        )
        for work in ("forward", "forward and backward")
    )


def linear_growth(*forms: str) -> tuple[Goal, ...]:
    """The exponent of the time of the forward pass, over 1024 to 65536 tokens."""
    return tuple(
        Goal(f"growth exponent, {form}", (form, "growth exponent"), at_most=1.05) for form in forms
    )


ROWS: Mapping[str, Row] = {
    "linear": Row(
        ours="_operators.linear:ours",
        straightforward="_operators.linear:straightforward",
        peers={"flash-linear-attention, plain PyTorch": "_operators.linear:fla_naive"},
        goals=(*never_slower(), *linear_growth("bidirectional", "causal")),
    ),
    "softmax with a sink": Row(
        ours="_operators.sink_and_sigmoid:sink",
        straightforward="_operators.sink_and_sigmoid:straightforward_sink",
        peers={"x-transformers": "_operators.sink_and_sigmoid:sink_of_x_transformers"},
        most=4096,
        goals=(*never_slower(), *small_memory(0.1), *small_memory(0.1, "bidirectional")),
    ),
    "sigmoid": Row(
        ours="_operators.sink_and_sigmoid:sigmoid",
        straightforward="_operators.sink_and_sigmoid:straightforward_sigmoid",
        peers={"x-transformers": "_operators.sink_and_sigmoid:sigmoid_of_x_transformers"},
        most=4096,
        goals=never_slower(),
    ),
    "flow": Row(
        ours="_operators.flow:ours",
        straightforward="_operators.flow:straightforward",
        goals=(
            *never_slower((False,)),
            *never_slower((True,), factor=3.0),
            *small_memory(0.1),
            *linear_growth("bidirectional", "causal"),
        ),
    ),
    "taylor": Row(
        ours="_operators.deconstructing:taylor",
        straightforward="_operators.deconstructing:straightforward_taylor",
        most=4096,
        goals=never_slower(),
    ),
    "nonapprox": Row(
        ours="_operators.deconstructing:nonapprox",
        straightforward="_operators.deconstructing:straightforward_nonapprox",
        most=4096,
        goals=(*never_slower(), *linear_growth("bidirectional", "causal")),
    ),
    "dydila": Row(
        ours="_operators.dydila:ours",
        straightforward="_operators.dydila:straightforward",
        causal=(False,),
        goals=(*never_slower((False,)), *linear_growth("bidirectional")),
    ),
    "combiner, fixed": Row(
        ours="_operators.combiner:fixed",
        straightforward="_operators.combiner:straightforward_fixed",
        most=16384,
        goals=never_slower(),
    ),
    "combiner, logsparse": Row(
        ours="_operators.combiner:logsparse",
        straightforward="_operators.combiner:straightforward_logsparse",
        causal=(True,),
        most=16384,
        goals=never_slower((True,)),
    ),
    "combiner, rowmajor": Row(
        ours="_operators.combiner:rowmajor",
        straightforward="_operators.combiner:straightforward_rowmajor",
        most=16384,
        goals=never_slower(),
    ),
    "hierarchical": Row(
        ours="_operators.hierarchical:ours",
        straightforward="_operators.hierarchical:straightforward",
        causal=(False,),
        most=4096,
        goals=(*never_slower((False,)), *linear_growth("bidirectional")),
    ),
    "reversed": Row(
        ours="_operators.reversed:ours",
        straightforward="_operators.reversed:straightforward",
        causal=(False,),
        most=4096,
        goals=(*never_slower((False,)), *small_memory(0.1, "bidirectional")),
    ),
    "sinkhorn": Row(
        ours="_operators.doubly_stochastic:sinkhorn",
        straightforward="_operators.doubly_stochastic:straightforward_sinkhorn",
        causal=(False,),
        most=4096,
        goals=(*never_slower((False,)), *small_memory(0.1, "bidirectional")),
    ),
    "norm-softmax": Row(
        ours="_operators.doubly_stochastic:norm_softmax",
        straightforward="_operators.doubly_stochastic:straightforward_norm_softmax",
        most=4096,
        goals=(*never_slower(), *small_memory(0.1, "bidirectional")),
    ),
    "dynamic mask": Row(
        ours="_operators.dynamic_mask:ours",
        straightforward="_operators.dynamic_mask:straightforward",
        causal=(True,),
        peers={"kept blocks, by a BlockPlan": "_operators.dynamic_mask:kept_blocks"},
        longest=4096,
        goals=(
            *never_slower((True,)),
            *small_memory(0.1),
            *linear_growth("causal"),
            *(
                Goal(
                    f"SDPA / ours, time, causal, {work}, 16384 tokens",
                    ("causal", work, "16384", SDPA, "time over ours"),
                    at_least=2.0,
                )
                for work in ("forward", "forward and backward")
            ),
        ),
    ),
    "differential": Row(
        ours="_operators.differential:one_to_one",
        straightforward="_operators.differential:straightforward_one_to_one",
        peers={"transformers' DiffLlama": "_operators.differential:diffllama"},
        most=4096,
        goals=(*never_slower(), *small_memory(0.1), *small_memory(0.1, "bidirectional")),
    ),
    "differential-3to1": Row(
        ours="_operators.differential:three_to_one",
        straightforward="_operators.differential:straightforward_three_to_one",
        most=4096,
        goals=(*never_slower(), *small_memory(0.1), *small_memory(0.1, "bidirectional")),
    ),
}


def load(contender: str) -> Attention:
    """The function of a contender."""
    if contender == SDPA:
        return sdpa
    module, _, name = contender.partition(":")
    function: Attention = getattr(import_module(module), name)
    return function


def sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """What all are compared with."""
    output: Tensor = scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    return output
