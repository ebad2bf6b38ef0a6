"""Learned temperatures of attention, one for each head and position.

    a_ij = softmax_j( query_i . key_j / (t_i sqrt(dim)) )

Dividing the query by its temperature divides its scores, so this goes before any attention: SDPA,
flash, flex, a tap. `QueryTemperature` is the layer to train with, `QueryScale` what is left of it.

    temperature = QueryTemperature(num_heads=8, context=512)
    output = scaled_dot_product_attention(temperature(query), key, value, is_causal=True)

Source: Jha and Reagen, "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489), appendix A.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class QueryScale(nn.Module):
    """Multiplies each query by a fixed number for its head and absolute position.

    What a `QueryTemperature` becomes when training is over: one multiplication, no nonlinearity.

    Attributes:
        scale: `[heads, context]`, a buffer.
    """

    scale: Tensor

    def __init__(self, scale: Float[Tensor, "heads context"]) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(
        self,
        query: Float[Tensor, "batch heads queries dim"],
        positions: int | Int[Tensor, "#batch queries"] = 0,
    ) -> Float[Tensor, "batch heads queries dim"]:
        """See `QueryTemperature.forward`."""
        return _scale_query(query, self.scale, positions)


class QueryTemperature(nn.Module):
    """A learned temperature for each head and absolute position, `[heads, context]`.

    Dividing the query by its temperature is dividing its scores, so any attention kernel can
    follow. A temperature above 1 spreads the attention of that head and position, below 1 it
    sharpens it.

    The paper does not say how it keeps temperatures positive. Here the parameter is their log, so
    weight decay, if any, pulls them towards 1.

    Args:
        num_heads: heads of the query.
        context: number of positions. There is no temperature for a later one.
        initial: of every temperature. The paper starts at 0.01 or 0.1 in models without layer norm,
            which makes attention nearly one-hot at first; 1 changes nothing.
        device, dtype: of the parameter.
    """

    def __init__(
        self,
        num_heads: int,
        context: int,
        initial: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or context < 1:
            raise ValueError(
                f"num_heads, context: expected at least 1, got {num_heads} and {context}."
            )
        if not 0 < initial < float("inf"):
            raise ValueError(f"initial: expected a positive temperature, got {initial}.")
        start = torch.full((num_heads, context), float(initial), device=device, dtype=dtype)
        self.log_temperature = nn.Parameter(start.log())

    @property
    def temperature(self) -> Float[Tensor, "heads context"]:
        """The temperatures, with their gradient."""
        return self.log_temperature.exp()

    def forward(
        self,
        query: Float[Tensor, "batch heads queries dim"],
        positions: int | Int[Tensor, "#batch queries"] = 0,
    ) -> Float[Tensor, "batch heads queries dim"]:
        """Divide each query by its temperature.

        Args:
            query: `[batch, heads, queries, dim]`.
            positions: absolute position of the first query (the others follow), as when decoding
                with a cache of so many keys; or those of all, `[batch or 1, queries]`, as with
                padding on the left.

        Raises:
            ValueError: for a position that has no temperature: it does not extrapolate.
        """
        return _scale_query(query, (-self.log_temperature).exp(), positions)

    def fold(self) -> QueryScale:
        """The same with `1 / temperature` computed once and for all."""
        return QueryScale((-self.log_temperature.detach()).exp())

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"num_heads={len(self.log_temperature)}, context={self.log_temperature.shape[1]}"


def _scale_query(query: Tensor, scale: Tensor, positions: int | Tensor) -> Tensor:
    heads, context = scale.shape
    batch, query_heads, queries, _ = query.shape
    if query_heads != heads:
        raise ValueError(f"query: expected {heads} heads, got {list(query.shape)}.")
    if isinstance(positions, int):
        first, last = positions, positions + queries - 1
    else:
        if positions.shape[-1] != queries or positions.numel() not in (queries, batch * queries):
            raise ValueError(
                f"positions: expected a number or [batch or 1, queries] = {[batch, queries]}, got "
                f"{list(positions.shape)}."
            )
        first, last = (int(end) for end in positions.aminmax()) if queries else (0, -1)
    if first < 0 or last >= context:
        raise ValueError(
            f"positions: expected 0 to {context - 1}, as temperatures are learned for {context} "
            f"positions, got {first} to {last}. Shorten the input, or build and train the model "
            "with a larger context."
        )
    if isinstance(positions, int):
        chosen = scale[None, :, first : last + 1]
    else:
        chosen = scale[:, torch.atleast_2d(positions)].transpose(0, 1)
    return query * chosen[..., None].to(query.dtype)
