"""A decoder block whose only nonlinearity is the softmax of its attention.

Under two-party encrypted inference everything linear is cheap, and layer norms and activations are
most of the traffic. This block has neither. Three things take their place, all of them linear once
the model is trained: a learned temperature per head and position, a feed-forward part that is
scaled by two learned numbers per layer, and, as alternatives, weights that are normalised by
themselves.

    x_sa  = x + Attention(x),    a_ij = softmax_j( q_i . k_j / (t_i sqrt(head_dim)) )
    x_out = beta x_sa + FFN(x_sa) / alpha

Source: Jha and Reagen, "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489), equation 8
and appendix A: the models SM, SM + ScFuFFN and SM(t) + ScFuFFN. The authors' repository holds no
model, so what the paper leaves open is decided here and said where it is. `private_inference_cost`
says what it saves; `reduce_nonlinearities` makes such a model of a GPT-2.
"""

import copy
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from attending.nn._head_counts import check_head_counts
from attending.nn.query_temperature import QueryScale, QueryTemperature
from attending.nn.self_attention import KeyValueCache

WeightNorm = Literal["weight", "spectral"]


class ScaledFeedForward(nn.Module):
    """A feed-forward part without activation, residual included: `beta x + FFN(x) / alpha`.

    Without an activation between them two matrices are one, so by default there is only one,
    `[embed_dim, embed_dim]`: an eighth of the work ("fused"). Two of them train differently, and
    `fold` makes them one afterwards.

    Args:
        embed_dim: width of the input and of the output.
        hidden_dim: width between two matrices; None for the fused one.
        scaled: learn alpha and beta, one number each; they start at 1, which the paper does not
            say. Without them this is an ordinary residual, `x + FFN(x)`.
        norm: None; or the matrices are normalised by themselves: `"weight"` gives each row a
            learned length, `"spectral"` divides by the largest singular value (plainly, without
            the learned factor of sigma-reparam; estimated by power iteration, one step per forward
            in training mode). The paper finds both to be worse than scaling.
        bias: biases in the matrices.
        dropout: of `FFN(x)`, in training mode.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        scaled: bool = True,
        norm: WeightNorm | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or (hidden_dim is not None and hidden_dim < 1):
            raise ValueError(
                f"embed_dim, hidden_dim: expected at least 1, got {embed_dim}, {hidden_dim}."
            )
        if norm is not None and norm not in get_args(WeightNorm):
            raise ValueError(f"norm: expected None or one of {get_args(WeightNorm)}, got {norm!r}.")
        widths = [embed_dim, *([] if hidden_dim is None else [hidden_dim]), embed_dim]
        self.linears = nn.ModuleList(
            nn.Linear(one, next_one, bias=bias, device=device, dtype=dtype)
            for one, next_one in pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = norm
        if norm is not None:
            normalise = weight_norm if norm == "weight" else spectral_norm
            for linear in self.linears:
                normalise(linear)
        self.alpha: nn.Parameter | None = None
        self.beta: nn.Parameter | None = None
        if scaled:
            self.alpha = nn.Parameter(torch.ones((), device=device, dtype=dtype))
            self.beta = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    def branch(
        self, hidden: Float[Tensor, "*batch embed_dim"]
    ) -> Float[Tensor, "*batch embed_dim"]:
        """What `forward` adds to its input, for code that has its own residual connection."""
        changed = hidden
        for linear in self.linears:
            changed = linear(changed)
        changed = cast(Tensor, self.dropout(changed))
        if self.alpha is None or self.beta is None:
            return changed
        return (self.beta - 1) * hidden + changed / self.alpha

    def forward(
        self, hidden: Float[Tensor, "*batch embed_dim"]
    ) -> Float[Tensor, "*batch embed_dim"]:
        """`beta hidden + FFN(hidden) / alpha`."""
        return hidden + self.branch(hidden)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """One linear layer that is all of this, residual and scales included.

            W = beta I + W_out W_in / alpha,    b = (W_out b_in + b_out) / alpha

        Raises:
            ValueError: if alpha is 0.
        """
        alpha = 1.0 if self.alpha is None else float(self.alpha)
        beta = 1.0 if self.beta is None else float(self.beta)
        if alpha == 0:
            raise ValueError("alpha: expected a number other than 0 to divide by, got 0.")
        frozen = copy.deepcopy(self).eval()  # in training mode a look at a spectral norm changes it
        weights = [cast(nn.Linear, linear).weight for linear in frozen.linears]
        biases = [cast(nn.Linear, linear).bias for linear in frozen.linears]
        identity = torch.eye(weights[0].shape[1]).to(weights[0])
        weight, bias = identity, torch.zeros_like(weights[0][0])
        for next_weight, next_bias in zip(weights, biases, strict=True):
            weight = next_weight @ weight
            bias = next_weight @ bias + (0.0 if next_bias is None else next_bias)
        has_bias = biases[0] is not None
        folded = nn.Linear(len(weight), len(weight), bias=has_bias).to(weight)
        folded.weight.copy_(beta * identity + weight / alpha)
        if has_bias:
            folded.bias.copy_(bias / alpha)
        return folded


class SoftmaxOnlyAttention(nn.Module):
    """Causal self-attention, `[batch, tokens, embed_dim]` in and out, with learned temperatures.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: a divisor of `embed_dim`; heads are neighbouring columns.
        context: the longest sequence, in tokens.
        temperature: `"per_head_position"` (see `QueryTemperature`), or None for none.
        initial_temperature: where temperatures start.
        bias: biases in the four projections.
        layer_idx: under which number this layer keeps its keys in a cache.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        context: int,
        *,
        temperature: Literal["per_head_position"] | None = "per_head_position",
        initial_temperature: float = 1.0,
        bias: bool = False,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_head_counts(embed_dim, num_heads)
        if temperature not in (None, "per_head_position"):
            raise ValueError(
                f'temperature: expected None or "per_head_position", got {temperature!r}.'
            )
        self.num_heads, self.layer_idx = num_heads, layer_idx
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype) for _ in range(4)
        )
        self.temperature: QueryTemperature | QueryScale | None = None
        if temperature is not None:
            self.temperature = QueryTemperature(
                num_heads, context, initial_temperature, device, dtype
            )

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend to this token and those before it.

        Args:
            hidden: the tokens; with a cache, the last ones.
            cache: where the keys and values of the tokens before are, and those of these go.

        Raises:
            ValueError: for tokens beyond the context.
        """
        query, key, value = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        queries, keys = query.shape[2], key.shape[2]
        if self.temperature is not None:
            query = self.temperature(query, keys - queries)
        mask = None
        if 1 < queries < keys:  # PyTorch aligns `is_causal` to the first key
            visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = visible.tril(keys - queries)
        merged = scaled_dot_product_attention(query, key, value, mask, is_causal=queries == keys)
        return self.out_proj(merged.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fold(self) -> "SoftmaxOnlyAttention":
        """A copy without temperatures to compute.

        They depend on the position and the query matrix does not, so they go into that matrix only
        where a head has one temperature for all positions. Else a table of `1 / temperature`
        remains, `[heads, context]`: a multiplication by known numbers.
        """
        folded = copy.deepcopy(self)
        if not isinstance(self.temperature, QueryTemperature):
            return folded
        table = self.temperature.fold()
        folded.temperature = table
        first = table.scale[:, :1]
        if bool((table.scale == first).all()):
            factor = first.repeat_interleave(self.q_proj.out_features // self.num_heads, 0)
            folded.q_proj.weight.mul_(factor)
            if folded.q_proj.bias is not None:
                folded.q_proj.bias.mul_(factor[:, 0])
            folded.temperature = None
        return folded


class SoftmaxOnlyBlock(nn.Module):
    """A whole decoder block without layer norm and activation: SM(t) + ScFuFFN by default.

    Args:
        embed_dim: width of the residual stream.
        num_heads: a divisor of it.
        context: the longest sequence, in tokens.
        hidden_dim: width of the feed-forward part; None for the fused one (see
            `ScaledFeedForward`).
        temperature, initial_temperature: see `SoftmaxOnlyAttention`.
        scaled, norm: see `ScaledFeedForward`. Without either the paper's deep models end in NaN.
        bias: biases in all matrices.
        layer_idx: under which number this layer keeps its keys in a cache.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        context: int,
        *,
        hidden_dim: int | None = None,
        temperature: Literal["per_head_position"] | None = "per_head_position",
        initial_temperature: float = 1.0,
        scaled: bool = True,
        norm: WeightNorm | None = None,
        bias: bool = False,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = SoftmaxOnlyAttention(
            embed_dim,
            num_heads,
            context,
            temperature=temperature,
            initial_temperature=initial_temperature,
            bias=bias,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.feed_forward: ScaledFeedForward | nn.Linear = ScaledFeedForward(
            embed_dim, hidden_dim, scaled=scaled, norm=norm, bias=bias, device=device, dtype=dtype
        )

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """One block; see `SoftmaxOnlyAttention.forward` for the cache."""
        hidden = hidden + self.attention(hidden, cache)
        return self.feed_forward(hidden)  # type: ignore[no-any-return]

    def fold(self) -> "SoftmaxOnlyBlock":
        """A copy for inference: the same function with one matrix in place of the feed-forward part
        and its scales, and no temperature to compute (see `SoftmaxOnlyAttention.fold`)."""
        folded = copy.deepcopy(self)
        folded.attention = self.attention.fold()
        if isinstance(self.feed_forward, ScaledFeedForward):
            folded.feed_forward = self.feed_forward.fold()
        return folded.eval()
