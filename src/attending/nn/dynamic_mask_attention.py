"""A layer of dynamic mask attention (2508.02124), to train a decoder with long context.

Each head of key and value ranks all tokens by a learned score of their values; a query attends to
the `keep_window` best of the tokens it sees, with the score added. The functions behind it, with
the formulas, are in `attending.nn.dynamic_mask`.

A token that falls out of the window never comes back, since scores do not depend on the query. The
`DynamicMaskCache` of `attending.nn.dynamic_mask_cache` drops it: decoding takes the time and memory
of `keep_window` tokens, however long the text is, and computes what a cache of everything would.

Where it differs from the official code: the causal mask comes before the choice, ties go to the
most recent tokens, the score is computed in float32 with its exponent held at 10, a row that sees
nothing is 0, and A does not start at 0. There (as in transformers' Doge) all tokens score alike, so
that the choice is an accident of sorting and W gets no gradient in the first step [ran].
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.nn._head_counts import check_head_counts
from attending.nn.dynamic_mask import (
    Score,
    dynamic_mask,
    dynamic_mask_attention,
    value_scores,
)
from attending.nn.dynamic_mask_cache import ScoreCache, new_tokens
from attending.nn.key_selection import check_window
from attending.nn.rotary import rotate
from attending.nn.self_attention import KeyValueCache

__all__ = ["DynamicMaskAttention", "dynamic_mask"]


class DynamicMaskAttention(nn.Module):
    """Self-attention to the tokens that score best, `[batch, tokens, embed_dim]` in and out.

        layer = DynamicMaskAttention(512, 8, 2, keep_window=1024)
        hidden = layer(hidden, is_causal=True)

    Args:
        embed_dim: width of the input and of the output.
        num_heads: heads of the query.
        num_kv_heads: heads of key and value, a divisor of it; as many by default. Each chooses for
            its group of query heads.
        keep_window: how many tokens a query attends to. Sequences up to it are attended to in
            full, with the score added.
        score: "exp", as published, or "linear"; see `value_scores`.
        bias: biases in the projections, that of the score included; published models have none.
        head_dim: width of a head; `embed_dim // num_heads` by default.
        gate_init: what A starts as; normal(0, 0.02) by default, as in examples of the official
            kernels. 0 is refused where it would be learned from: see the module's docstring.
        qk_norm: a norm over each head of query and key before the rotation, as Doge and Qwen3
            have it.
        eps: of these norms.
        layer_idx: under which number this layer keeps its tokens in a cache.
        interleaved: the layout of the rotary embedding.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not divide, a window below 1, or an A of 0.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        keep_window: int = 2048,
        score: Score = "exp",
        bias: bool = False,
        head_dim: int | None = None,
        gate_init: float | None = None,
        qk_norm: bool = False,
        eps: float = 1e-6,
        layer_idx: int = 0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = embed_dim if head_dim is None else num_heads * head_dim
        kv_heads = check_head_counts(width, num_heads, num_kv_heads)
        check_window(keep_window, "keep_window")
        if gate_init is not None and (gate_init == 0 or not math.isfinite(gate_init)):
            raise ValueError(
                "gate_init: expected a finite number other than 0, at which all tokens score "
                f"alike and the score's weights get no gradient, got {gate_init}."
            )
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim, self.keep_window = width // num_heads, keep_window
        self.score: Score = score
        self.eps, self.layer_idx, self.interleaved = eps, layer_idx, interleaved
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_width = kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.out_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        self.score_proj = nn.Linear(kv_width, kv_heads, bias=bias, **factory)
        self.gate = nn.Parameter(torch.empty(kv_heads, **factory))
        if gate_init is None:
            nn.init.normal_(self.gate, std=0.02)
        else:
            nn.init.constant_(self.gate, gate_init)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=eps, **factory)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=eps, **factory)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | ScoreCache | None = None,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend.

        Args:
            hidden: the input, after the block's norm.
            attn_mask: what is visible, as in `scaled_dot_product_attention` (True = visible).
                Padding, `[batch, 1, 1, keys]`, goes together with `is_causal`. With a
                `DynamicMaskCache` it is for the new tokens, or for all with the new ones last.
            is_causal: each token sees itself and those before it. With a cache the tokens are the
                last ones of the keys.
            position_embeddings: cosine and sine of the rotary embedding, `[batch or 1, tokens,
                head_dim]`, as transformers' models make them.
            cache: where the tokens before are, and these go: a `DynamicMaskCache`, or any with
                `update(key, value, layer_idx)`, for which the scores are computed anew from all
                values.
        """
        query, key, value = self.project(hidden, position_embeddings)
        if isinstance(cache, ScoreCache):
            merged = self.attend_cached(query, key, value, cache, attn_mask, is_causal)
        else:
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            merged = dynamic_mask_attention(
                query,
                key,
                value,
                self.scores(value),
                self.keep_window,
                attn_mask=attn_mask,
                is_causal=is_causal,
                query_offset=key.shape[2] - query.shape[2] if is_causal else 0,
            )
        return self.combine(merged)

    def project(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch kv_heads tokens dim"],
        Float[Tensor, "batch kv_heads tokens dim"],
    ]:
        """Query, key and value of the tokens; queries and keys normed and rotated."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        if position_embeddings is not None:
            query, key = (
                rotate(one, *position_embeddings, self.interleaved).to(one.dtype)
                for one in (query, key)
            )
        return query, key, value.transpose(1, 2)

    def scores(
        self, value: Float[Tensor, "batch kv_heads keys dim"]
    ) -> Float[Tensor, "batch kv_heads keys"]:
        """delta of the tokens, in float32 at least."""
        projection = self.score_proj
        return value_scores(value, projection.weight, self.gate, projection.bias, self.score)

    def attend_cached(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: ScoreCache,
        attn_mask: Tensor | None = None,
        is_causal: bool = True,
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Attend through a cache that keeps scores; `forward` has the arguments.

        Raises:
            ValueError: for a mask that is more than padding, or a layer that is not causal.
        """
        if not is_causal:
            raise ValueError(
                "is_causal: expected True with a cache that forgets tokens, got False."
            )
        tokens, delta = query.shape[2], self.scores(value)
        if attn_mask is not None:
            visible = new_tokens(attn_mask, query.shape[0], tokens)
            delta = delta.masked_fill(~visible[:, None], -math.inf)
        key, value, delta = cache.update(key, value, self.layer_idx, delta=delta)
        return dynamic_mask_attention(
            query,
            key,
            value,
            delta,
            self.keep_window,
            is_causal=True,
            query_offset=key.shape[2] - tokens,
        )

    def combine(
        self, output: Float[Tensor, "batch heads tokens dim"]
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """The heads side by side, and projected."""
        merged: Tensor = self.out_proj(output.transpose(1, 2).flatten(2))
        return merged

    def options(self) -> dict[str, Any]:
        """The arguments that make another layer like this one, as JSON can hold them."""
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "keep_window": self.keep_window,
            "score": self.score,
            "bias": self.q_proj.bias is not None,
            "head_dim": self.head_dim,
            "qk_norm": isinstance(self.q_norm, nn.RMSNorm),
            "eps": self.eps,
            "layer_idx": self.layer_idx,
            "interleaved": self.interleaved,
        }

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"keep_window={self.keep_window}, score={self.score!r}"
        )
