"""Plans of Combiner: which keys a query sees itself, and which through a summary of their region.

A plan divides the keys that a query may see into *direct* keys and *regions*, without overlap and
without a rest. Places are counted from 0; with a width of m columns, token i is in row i // m and
column i % m. "Earlier" means that the whole region is before the query.

| plan | direct | regions of a causal model | regions of a bidirectional model |
| --- | --- | --- | --- |
| `FixedPlan` | own segment | each earlier segment | each other segment |
| `LogsparsePlan` | itself | blocks of 1, 2, 4, ... before it | both sides [inferred] |
| `AxialPlan` vertical | row, column | each other column, above | above, and below |
| `AxialPlan` horizontal | row, column | each earlier row, left, and right | each other row |
| `AxialPlan` mixture | row, column | both of the above | both of the above |
| `AxialPlan` rowmajor | row | each earlier row, by column | each other row [inferred] |
| `RoutingPlan` | own cluster | each other cluster, up to here | each other cluster |

For L tokens the dot products are L (s + 2 L / s) for segments of s, of the order of L log L for
doubling blocks, L (n + m) for n rows of m columns, and L^1.5 for sqrt(L) clusters of even size.

Source: Ren et al. 2107.05768, section 3 and equations 10 to 12. The appendices, with the plans for
masked language models, were not available to us: what is marked [inferred] is ours, and the
bidirectional axial plans follow the region families of the official TF code.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kind = Literal["vertical", "horizontal", "mixture", "rowmajor"]
RowKey = Literal["none", "wsum", "proj", "wsum_proj"]
Mixture = Literal["joint", "average"]


@dataclass(frozen=True)
class FixedPlan:
    """Segments of one length.

    Attributes:
        segment_length: tokens of a segment; the square root of twice the sequence costs least. At 1
            or from the sequence's length on, the result is softmax attention.
    """

    segment_length: int

    def __post_init__(self) -> None:
        _at_least_one("segment_length", self.segment_length)


@dataclass(frozen=True)
class LogsparsePlan:
    """Blocks that double: a query at place i sees one block for each bit that is set in i.

    The official JAX code has one level too few at lengths 2^k + 1, where its last token sees only
    itself, and fails at length 2. Here each length is right.
    """


@dataclass(frozen=True)
class AxialPlan:
    """Rows and columns, for images, or for any sequence cut into rows.

    Attributes:
        columns: tokens of a row. The last row may be shorter.
        kind: which regions; see the table above.
        split: regions of "horizontal" are the parts of a row left and right of the query's column,
            as in the official code. False takes the row without that column as one, as in the
            paper.
        mixture: of "mixture". "joint" puts vertical and horizontal regions into one softmax, as
            the official code does, although they cover some keys twice. "average" is the paper's
            mean of two attentions.
        row_key: of "rowmajor", the key of row t as seen from column c, where P is the softmax of
            query (t, c) over its row: "none", the key at (t, c); "wsum", the mean of the keys under
            P; "proj" and "wsum_proj", a learned projection of the mean of values or keys, as in
            the official models; only in `CombinerAttention`, which has the parameters.
    """

    columns: int
    kind: Kind = "rowmajor"
    split: bool = True
    mixture: Mixture = "joint"
    row_key: RowKey = "none"

    def __post_init__(self) -> None:
        _at_least_one("columns", self.columns)
        for name, given, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("mixture", self.mixture, get_args(Mixture)),
            ("row_key", self.row_key, get_args(RowKey)),
        ):
            if given not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {given!r}.")


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Clusters of tokens: a query sees its own cluster, and a summary of each other.

    Attributes:
        assign: the cluster of each token, from 0, of a shape that broadcasts to `[batch, heads,
            tokens]`. In a causal model a token's cluster must not depend on later tokens: centroids
            that were learned before are fine (`nearest`), clustering the sequence at hand is not.
    """

    assign: Int[Tensor, "*#batch_heads tokens"]

    def __post_init__(self) -> None:
        assign = self.assign
        integer = isinstance(assign, Tensor) and not (
            assign.is_floating_point() or assign.is_complex() or assign.dtype == torch.bool
        )
        if not integer or not 1 <= assign.dim() <= 3 or bool((assign < 0).any()):
            got = f"{assign.dtype} {list(assign.shape)}" if isinstance(assign, Tensor) else assign
            raise ValueError(
                "assign: expected whole numbers from 0 that broadcast to [batch, heads, tokens], "
                f"got {got}."
            )

    @classmethod
    def nearest(
        cls,
        features: Float[Tensor, "batch heads tokens dim"],
        centroids: Float[Tensor, "*#heads clusters dim"],
    ) -> "RoutingPlan":
        """Each token in the cluster whose centroid it has the smallest angle to.

        As in the Routing Transformer, whose centroids are moving averages of their members. Each
        token is judged alone, so that nothing leaks from later ones.
        """
        return cls(
            (features.detach() @ centroids.detach().mT)
            .div(centroids.detach().norm(dim=-1).unsqueeze(-2))
            .argmax(-1)
        )


Plan: TypeAlias = FixedPlan | LogsparsePlan | AxialPlan | RoutingPlan


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}.")
