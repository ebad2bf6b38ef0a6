"""Dynamic differential linear attention (DyDiLA), for diffusion transformers.

For linear attention whose maps come out too smooth: every row nearly the same mean over the image.
Cao et al. (2601.13683) see three reasons and answer each with a part:

- **dynamic projection**: a second query and key of each token, from one of a bank of projections
  that a router picks: `q'_i = x_i W_Q[argmax(x_i R_Q)]`, `k'_i` likewise. They are to hold what is
  redundant in q and k;
- **dynamic measure kernel**: the focused kernel (`attending.nn.focused_attention`) with a power
  that a router picks for each token from a bank of learned numbers, for q, k, q' and k';
- **token differential operator**: `q_i - lambda_i q'_i` and `k_j - lambda_j k'_j` after the
  kernels, lambda picked likewise from the pair. That expands to four maps, two of them subtracted,
  and stays linear:

    output = (q - lambda q') ((k - lambda k')^T v)

**What this rests on.** The paper's text was not at hand: only its abstract, summaries of the
projection module, and one adaptation of the three modules to another task by others
(moeinheidari7829/P2Echo-new, `dyita.py`). There is no official code.

- From the abstract and summaries: the three modules, what each is for, routed projections.
- From the adaptation, which quotes formulas as the paper's: the kernel, the difference, hard top-1
  routing, the counts (3 projections, 9 powers, 9 lambdas) and starts (powers 3, lambdas 0.01), no
  biases, one bank of lambdas for queries and keys, straight-through gradients of the routers.
- Reconstructed here [inferred]: a router and a bank of powers for each of q, k, q', k', shared by
  the heads and applied to the vector of a head; powers held at 1 or above; the scale `1 / keys`
  (the adaptation has none of it; a divisor as in plain linear attention can change its sign); the
  3 x 3 depth-wise convolution of the values added to the output, as FLatten and LiT do.

The adaptation departs from its own formulas with a softplus for the ReLU, routers that send no
gradient to their inputs, softmax attention for 16 keys or fewer, and a batch norm. None of that is
here. Vectors in `tests/golden/dydila` are of the formulas above, without scale and convolution.

Attention weights may be negative, so entropies mean nothing here; smoothness is measured by
`attending.probes.oversmoothing`. Routing is by argmax: near a tie, another dtype or batch size can
pick another entry.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.core.check import check_arguments
from attending.nn._head_counts import check_head_counts
from attending.nn._key_padding import visible_keys
from attending.nn.focused_attention import focused_kernel
from attending.nn.hard_routing import RoutedProjection, RoutedScalar
from attending.nn.linear_attention import (
    LinearAttentionState,
    linear_attention,
    linear_state,
    read_state,
)

Normalize = Literal["none", "count", "sum"]


def token_differential_linear_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    other_query: Float[Tensor, "batch heads queries dim"],
    other_key: Float[Tensor, "batch heads keys dim"],
    query_weight: Float[Tensor, "*#batch queries"],
    key_weight: Float[Tensor, "*#batch keys"],
    *,
    attn_mask: Tensor | None = None,
    normalize: Normalize = "none",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """`(query - query_weight * other_query) @ ((key - key_weight * other_key)^T @ value)`.

    Args:
        query, key, other_query, other_key: features, after their kernels.
        value: what is averaged.
        query_weight, key_weight: lambda of each token; broadcasts to `[batch, heads, tokens]`.
            With both 0 this is plain linear attention, to the bit.
        attn_mask: boolean, `[batch, 1, 1, keys]`, True = visible.
        normalize: "none"; "count" divides by the number of visible keys; "sum" by the sum of the
            row's weights, which can be near 0 or negative where the weights are not 0.

    Returns:
        The output, in query's dtype.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize: expected one of {get_args(Normalize)}, got {normalize!r}.")
    check_arguments(query, key, value)
    for name, other, one in (("other_query", other_query, query), ("other_key", other_key, key)):
        if other.shape != one.shape or other.dtype != one.dtype:
            raise ValueError(
                f"{name}: expected {list(one.shape)} of {one.dtype}, got {list(other.shape)} of "
                f"{other.dtype}."
            )
    query = _difference(query, other_query, query_weight)
    key = _difference(key, other_key, key_weight)
    if normalize != "count":
        return linear_attention(
            query, key, value, attn_mask=attn_mask, normalize=normalize == "sum"
        )
    visible = visible_keys(attn_mask, key)
    count = key.new_tensor(key.shape[2]) if visible is None else visible.sum(-1)[..., None, None]
    state = linear_state(key, value, visible)
    mean = LinearAttentionState(state.key_value / count.clamp(min=1), state.key_sum)
    return read_state(mean, query, normalize=False)


def _difference(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == one.dtype:
        return torch.addcmul(one, weight[..., None], other, value=-1.0)
    return one - (weight[..., None] * other).to(one.dtype)


class DyDiLA(nn.Module):
    """Multi-head self-attention by DyDiLA, `[batch, tokens, embed_dim]` in and out.

        attention = DyDiLA(embed_dim=64, num_heads=4)
        hidden = attention(hidden)                     # 64 tokens: an image of 8 x 8
        hidden = attention(hidden, grid=(4, 16))

    See the module's docstring for what is the paper's and what is reconstructed. It has
    `2 * num_projections * embed_dim^2` parameters more than plain attention, and costs that many
    multiplications per token more; the rest is linear in the tokens.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: heads, each `embed_dim // num_heads` wide.
        num_projections: projections in each of the two banks.
        num_kernels: powers in each of the four banks.
        num_differences: lambdas in the bank that queries and keys share.
        power_init: where the powers start; they count as 1 where they fall below 1.
        difference_init: where the lambdas start. All start equal, and their routers tell them
            apart only as training moves them.
        normalize: as in `token_differential_linear_attention`.
        convolution: size of the depth-wise convolution of the values, odd; None for none, which
            makes the layer blind to the order of the tokens.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not fit, or an unknown `normalize`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_projections: int = 3,
        num_kernels: int = 9,
        num_differences: int = 9,
        power_init: float = 3.0,
        difference_init: float = 0.01,
        normalize: Normalize = "count",
        convolution: int | None = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_head_counts(embed_dim, num_heads)
        counts = {
            "num_projections": num_projections,
            "num_kernels": num_kernels,
            "num_differences": num_differences,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}.")
        if power_init < 1:
            raise ValueError(f"power_init: expected at least 1, got {power_init}.")
        if normalize not in get_args(Normalize):
            raise ValueError(
                f"normalize: expected one of {get_args(Normalize)}, got {normalize!r}."
            )
        if convolution is not None and (convolution < 1 or convolution % 2 == 0):
            raise ValueError(f"convolution: expected an odd size or None, got {convolution}.")
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.normalize: Normalize = normalize
        factory = {"device": device, "dtype": dtype}

        def linear() -> nn.Linear:
            made = nn.Linear(embed_dim, embed_dim, bias=False, **factory)
            nn.init.xavier_uniform_(made.weight)
            return made

        def bank(count: int, start: float) -> nn.Parameter:
            return nn.Parameter(torch.full((count,), start, **factory))  # type: ignore[arg-type]

        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear() for _ in range(4))
        self.other_query = RoutedProjection(embed_dim, num_projections, device, dtype)
        self.other_key = RoutedProjection(embed_dim, num_projections, device, dtype)
        self.powers = nn.ModuleDict(
            {
                name: RoutedScalar(self.head_dim, bank(num_kernels, power_init))
                for name in ("query", "key", "other_query", "other_key")
            }
        )
        differences = bank(num_differences, difference_init)
        self.query_difference = RoutedScalar(2 * self.head_dim, differences)
        self.key_difference = RoutedScalar(2 * self.head_dim, differences)
        self.convolution: nn.Conv2d | None = None
        if convolution is not None:
            self.convolution = nn.Conv2d(
                embed_dim,
                embed_dim,
                convolution,
                padding="same",
                groups=embed_dim,
                device=device,
                dtype=dtype,
            )

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        grid: tuple[int, int] | None = None,
        attn_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend.

        Args:
            hidden: the tokens of an image, row by row.
            grid: its height and width in tokens, for the convolution; a square by default.
            attn_mask: boolean, `[batch, 1, 1, tokens]`, True = visible.

        Raises:
            ValueError: where the convolution does not know the shape of the image.
        """
        value = self.v_proj(hidden)
        output = self._heads(hidden, value, attn_mask).transpose(1, 2).flatten(2)
        if self.convolution is not None:
            image = value.transpose(1, 2).unflatten(2, image_grid(hidden.shape[1], grid))
            output = output + self.convolution(image).flatten(2).transpose(1, 2)
        return self.out_proj(output)  # type: ignore[no-any-return]

    def features(
        self, hidden: Float[Tensor, "batch tokens embed_dim"]
    ) -> tuple[
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch heads tokens"],
        Float[Tensor, "batch heads tokens"],
    ]:
        """q, k, q' and k' after their kernels, and the lambdas of queries and keys."""
        projected = {
            "query": self.q_proj(hidden),
            "key": self.k_proj(hidden),
            "other_query": self.other_query(hidden),
            "other_key": self.other_key(hidden),
        }
        query, key, other_query, other_key = (
            self._kernel(name, self._split(tensor)) for name, tensor in projected.items()
        )
        query_weight = self.query_difference(torch.cat([query, other_query], -1))
        key_weight = self.key_difference(torch.cat([key, other_key], -1))
        return query, key, other_query, other_key, query_weight, key_weight

    def attend(
        self, hidden: Float[Tensor, "batch tokens embed_dim"], attn_mask: Tensor | None = None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """The output of the heads, before the convolution and the output projection."""
        return self._heads(hidden, self.v_proj(hidden), attn_mask)

    def _heads(self, hidden: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        query, key, other_query, other_key, query_weight, key_weight = self.features(hidden)
        return token_differential_linear_attention(
            query,
            key,
            self._split(value),
            other_query,
            other_key,
            query_weight,
            key_weight,
            attn_mask=attn_mask,
            normalize=self.normalize,
        )

    def _kernel(self, name: str, tensor: Tensor) -> Tensor:
        return focused_kernel(tensor, self.powers[name](tensor).clamp(min=1.0))

    def _split(self, projected: Tensor) -> Tensor:
        split: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return split

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, normalize={self.normalize!r}"


def image_grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of an image of so many tokens: as given, or those of a square."""
    if grid is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(
                f"grid: expected (height, width), since {tokens} tokens are no square, got None."
            )
        return side, side
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid: expected a height and width of {tokens} tokens, got {grid}.")
    return grid
