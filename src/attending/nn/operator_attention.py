"""A multi-head attention layer around any operator of `attending.nn`, in plain PyTorch.

Operators are functions of query, key and value. To train with one outside of transformers they need
projections and heads around them: those of `nn.MultiheadAttention`, with the operator in place of
the softmax.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.nn._head_counts import check_head_counts


class OperatorAttention(nn.Module):
    """`out_proj(operator(q_proj(query), k_proj(key), v_proj(value)))`, over heads.

        layer = OperatorAttention(64, 4, flow_attention)
        hidden = layer(hidden, is_causal=True)             # self-attention
        hidden = layer(hidden, memory)                     # cross-attention
        layer = OperatorAttention(64, 4, functools.partial(flow_attention, clamp=5.0))

    Args:
        embed_dim: width of queries and of the output.
        num_heads: heads of the query, each `embed_dim // num_heads` wide.
        operator: called as `operator(query, key, value, is_causal=, ...)` in the layout of
            `scaled_dot_product_attention`; `attn_mask` and `enable_gqa` are passed where they are
            needed.
        bias: biases in the four projections.
        num_kv_heads: heads of key and value for grouped-query attention; `num_heads` by default.
        kdim, vdim: widths of key and value where they come from elsewhere; `embed_dim` by default.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        operator: Callable[..., Tensor],
        bias: bool = True,
        num_kv_heads: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = check_head_counts(embed_dim, num_heads, num_kv_heads)
        self.operator = operator
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        width = kv_heads * self.head_dim
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(kdim or embed_dim, width, bias=bias, **factory)
        self.v_proj = nn.Linear(vdim or embed_dim, width, bias=bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)

    def forward(
        self,
        query: Float[Tensor, "batch queries embed_dim"],
        key: Float[Tensor, "batch keys key_dim"] | None = None,
        value: Float[Tensor, "batch keys value_dim"] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch queries embed_dim"]:
        """Attend.

        Args:
            query: the hidden states that ask.
            key: those that answer; `query` by default.
            value: what they answer with; `key` by default.
            attn_mask: as the operator takes it, True = visible (the opposite of
                `nn.MultiheadAttention`).
            is_causal: as the operator takes it.
        """
        heads = self.project(query, key, value)
        others: dict[str, object] = {} if attn_mask is None else {"attn_mask": attn_mask}
        if self.num_kv_heads != self.num_heads:
            others["enable_gqa"] = True
        output = self.operator(*heads, is_causal=is_causal, **others)
        return self.out_proj(output.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def project(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[
        Float[Tensor, "batch heads queries dim"],
        Float[Tensor, "batch kv_heads keys dim"],
        Float[Tensor, "batch kv_heads keys dim"],
    ]:
        """Query, key and value in heads, as the operator gets them."""
        key = query if key is None else key
        value = key if value is None else value
        return (
            self._split(self.q_proj(query), self.num_heads),
            self._split(self.k_proj(key), self.num_kv_heads),
            self._split(self.v_proj(value), self.num_kv_heads),
        )

    def _split(self, projected: Tensor, heads: int) -> Tensor:
        split: Tensor = projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
        return split

    def extra_repr(self) -> str:
        name = getattr(self.operator, "__name__", repr(self.operator))
        return f"num_heads={self.num_heads}, operator={name}"
