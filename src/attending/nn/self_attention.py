"""Self-attention with a choice of what it may do besides the softmax over the tokens.

The layer with which An et al. (2502.06415) ask which attention grows outliers: six variants that
differ in nothing else. The functions behind them are in `attending.nn.biased_attention` and
`attending.nn.context_scale`.
"""

from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.nn._head_counts import check_head_counts
from attending.nn.biased_attention import attention_with_bias, sigmoid_attention
from attending.nn.context_scale import ContextScale

Variant = Literal[
    "softmax", "fixed_bias", "additive_bias", "attention_bias", "context_scale", "sigmoid"
]


@runtime_checkable
class KeyValueCache(Protocol):
    """What keeps keys and values between calls; transformers' `DynamicCache` is one."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append the new keys and values of a layer; return all of them."""
        ...


class SelfAttention(nn.Module):
    """Multi-head self-attention, `[batch, tokens, embed_dim]` in and out.

    | variant | before the output projection | paper's letter |
    | --- | --- | --- |
    | `"softmax"` | `P V` | a |
    | `"fixed_bias"` | `P V + v'`, one vector, starts at 0 | b |
    | `"additive_bias"` | `P V + p0 v'`, k' and v' per head, start at normal(0, 0.02) | c |
    | `"attention_bias"` | `(1 - p0) P V + p0 v'`, likewise | d |
    | `"context_scale"` | `S(x) P V`, S per token and head, starts at 1 | e |
    | `"sigmoid"` | `sigmoid(s - log n) V` | f |

    The paper finds outliers in models of a, b and c and none in those of d, e and f. (b) is as the
    paper has it: the official module adds v' to the separate heads, which fails for more than one.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: heads of the query, each `embed_dim // num_heads` wide.
        variant: one of the above.
        bias: biases in the four projections.
        num_kv_heads: heads of key and value for grouped-query attention; `num_heads` by default.
        max_scale: of `"context_scale"`; see `ContextScale`.
        key_length: n of `"sigmoid"`; the number of keys of each call by default, which makes the
            function depend on the length, and decoding with a cache differ from one forward.
        layer_idx: under which number this layer keeps its keys in a cache.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not divide or an unknown variant.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        variant: Variant = "softmax",
        bias: bool = True,
        num_kv_heads: int | None = None,
        max_scale: float = 2.0,
        key_length: int | None = None,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = check_head_counts(embed_dim, num_heads, num_kv_heads)
        if variant not in get_args(Variant):
            raise ValueError(f"variant: expected one of {get_args(Variant)}, got {variant!r}.")
        if key_length is not None and variant != "sigmoid":
            raise ValueError(
                f'key_length: expected None, as only variant "sigmoid" has one, got {key_length} '
                f"for {variant!r}."
            )
        self.variant = variant
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.key_length = key_length
        self.layer_idx = layer_idx
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.scale: ContextScale | None = None
        if variant == "fixed_bias":
            self.value_bias = nn.Parameter(torch.zeros(embed_dim, **factory))  # type: ignore[arg-type]
        elif variant in ("additive_bias", "attention_bias"):
            shape = (num_heads, self.head_dim)
            self.key_bias = nn.Parameter(torch.empty(shape, **factory))  # type: ignore[arg-type]
            self.value_bias = nn.Parameter(torch.empty(shape, **factory))  # type: ignore[arg-type]
            nn.init.normal_(self.key_bias, std=0.02)
            nn.init.normal_(self.value_bias, std=0.02)
        elif variant == "context_scale":
            self.scale = ContextScale(embed_dim, num_heads, max_scale, device, dtype)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend.

        Args:
            hidden: the input, after the block's norm.
            attn_mask: as in `scaled_dot_product_attention` (True = visible), which is the opposite
                of `nn.MultiheadAttention`.
            is_causal: each token sees itself and those before it. With a cache the tokens are the
                last ones of the keys.
            cache: where the keys and values of the tokens before are, and those of these go.
        """
        query, key, value = self.project(hidden)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        past = key.shape[2] - query.shape[2]
        if is_causal and past and attn_mask is None:
            # PyTorch aligns `is_causal` to the first key, the tokens are the last ones.
            is_causal = False
            if query.shape[2] > 1:
                visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
                attn_mask = visible.tril(past).to(query.device)
        merged = self._attend(query, key, value, attn_mask, is_causal)
        if self.scale is not None:
            merged = merged * self.scale(hidden).transpose(1, 2)[..., None]
        merged = merged.transpose(1, 2).flatten(2)
        if self.variant == "fixed_bias":
            merged = merged + self.value_bias
        return self.out_proj(merged)  # type: ignore[no-any-return]

    def project(
        self, hidden: Float[Tensor, "batch tokens embed_dim"]
    ) -> tuple[
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch kv_heads tokens dim"],
        Float[Tensor, "batch kv_heads tokens dim"],
    ]:
        """Query, key and value of the tokens, for statistics of what the layer looks at.

        A tap sees the calls of `"softmax"`, `"fixed_bias"` and `"context_scale"`; the others need
        more than `scaled_dot_product_attention` and do not call it.
        """
        return (
            self._split(self.q_proj(hidden), self.num_heads),
            self._split(self.k_proj(hidden), self.num_kv_heads),
            self._split(self.v_proj(hidden), self.num_kv_heads),
        )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        grouped = self.num_kv_heads != self.num_heads
        if self.variant == "sigmoid":
            return sigmoid_attention(
                query,
                key,
                value,
                key_length=self.key_length,
                attn_mask=attn_mask,
                is_causal=is_causal,
                enable_gqa=grouped,
            )
        if self.variant in ("additive_bias", "attention_bias"):
            return attention_with_bias(
                query,
                key,
                value,
                self.key_bias,
                self.value_bias,
                mode="concat" if self.variant == "attention_bias" else "additive",
                attn_mask=attn_mask,
                is_causal=is_causal,
                enable_gqa=grouped,
            )
        output: Tensor = scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, enable_gqa=grouped
        )
        return output

    def _split(self, projected: Tensor, heads: int) -> Tensor:
        split: Tensor = projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
        return split

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, num_heads={self.num_heads}"
