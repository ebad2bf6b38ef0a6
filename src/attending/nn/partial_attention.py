"""Partial attention: a second path of attention that has only the source as its keys.

In a decoder-only model a target token sees the S tokens of the source and the i tokens generated so
far, in one softmax. If no logit leads, the source has the mass `S / (S + i)`: it fades as the
output grows, and with it the influence of the source (`attending.probes.source_attention` measures
both). The partial path has a softmax of its own over the source, so its mass there is 1 whatever
is generated:

    P   = F_p(source)                                    the source as THIS layer sees it
    out = W_o softmax((W_q hidden) (W_k P)^T / sqrt(dim)) (W_v P)

for every token, source or target, without a causal mask: no key depends on the target. Its keys and
values are computed once per source and kept while decoding, so a token costs one attention over S
keys more.

    partial = PartialAttention(embed_dim=64, num_heads=4, init="zero")
    hidden = hidden + partial(norm(hidden), hidden[:, :S], source_mask)        # pre-norm
    hidden = norm(hidden + partial(hidden, hidden[:, :S], source_mask))        # post-norm

between the self-attention and the feed-forward part of a block. The layer itself has neither norm
nor residual connection.

Source: PALM of Fu et al., "Decoder-Only or Encoder-Decoder? Interpreting Language Model as a
Regularized Encoder-Decoder" (2304.04052). **A reconstruction**: the paper's body was not at hand.
The formula, the place in the block and F_p are as in third-party code [3rd]
(christianThardy/Partial-Attention-Language-Model at 208c1d3); which activation F_p has in the paper
and where its norms are is not known. Ours alone: `source_map="residual"`, `init`, and the mask for
each sample, without which shorter sources of a batch let target tokens in.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from attending.nn._head_counts import check_head_counts
from attending.nn.rotary import rotate

SourceMap = Literal["silu_residual", "tanh", "residual", "identity"]
Init = Literal["random", "zero", "gate"]
Rotary = tuple[Tensor, Tensor]  # cosine and sine, [batch or 1, tokens, dim]


class SourceMemory(NamedTuple):
    """What partial attention keeps of a source: everything that decoding needs.

    Attributes:
        key, value: of the source tokens.
        visible: which of them are no padding; None if all are.
    """

    key: Float[Tensor, "batch kv_heads source dim"]
    value: Float[Tensor, "batch kv_heads source dim"]
    visible: Bool[Tensor, "batch source"] | None


class PartialAttention(nn.Module):
    """Attention of all tokens to a re-encoding of the same layer's source tokens.

    Args:
        embed_dim: width of the hidden states.
        num_heads: heads of the query.
        num_kv_heads: heads of key and value, for grouped-query attention; `num_heads` by default.
        head_dim: `embed_dim // num_heads` by default.
        source_map: F_p, two linear layers of width `embed_dim` with biases W_1 and W_2:
            "silu_residual" `p + W_2 p` with `p = silu(W_1 s)`, as the third-party code has it now;
            "tanh" `W_2 tanh(W_1 s)`, as it had in 2024; "residual" `s + W_2 silu(W_1 s)`, which is
            the identity where W_2 is 0; "identity", no layers.
        init: "random", to train from scratch; "zero", the output projection is 0, and "gate", the
            output is multiplied by `tanh(gate)` with a learned scalar at 0: both make the layer
            return exactly 0 at first, so that a model that gets it computes what it did.
        bias: in the four projections.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not divide, or an unknown `source_map` or `init`.
    """

    is_cross_attention = True  # for taps: its keys are another sequence than its queries

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        source_map: SourceMap = "silu_residual",
        init: Init = "random",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = embed_dim if head_dim is None else num_heads * head_dim
        kv_heads = check_head_counts(width, num_heads, num_kv_heads)
        for name, value, known in (
            ("source_map", source_map, get_args(SourceMap)),
            ("init", init, get_args(Init)),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}.")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = width // num_heads
        self.source_map, self.init = source_map, init
        factory = {"device": device, "dtype": dtype}
        self.source_in: nn.Linear | None = None
        self.source_out: nn.Linear | None = None
        if source_map != "identity":
            self.source_in = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
            self.source_out = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.q_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        self.gate: nn.Parameter | None = None
        if init == "zero":
            nn.init.zeros_(self.out_proj.weight)
            if bias:
                nn.init.zeros_(self.out_proj.bias)
        elif init == "gate":
            self.gate = nn.Parameter(torch.zeros((), **factory))  # type: ignore[arg-type]
        if source_map == "residual":
            assert self.source_out is not None
            nn.init.zeros_(self.source_out.weight)
            nn.init.zeros_(self.source_out.bias)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        source: Float[Tensor, "batch source embed_dim"] | SourceMemory,
        source_mask: Bool[Tensor, "batch source"] | None = None,
        *,
        query_rotary: Rotary | None = None,
        source_rotary: Rotary | None = None,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend: a whole sequence, or the token that is decoded, to the source.

        Args:
            hidden: the states that ask, after the block's norm if it is pre-norm.
            source: the states of the source tokens in the same layer; or what `encode` made of
                them, which goes without `source_mask` and `source_rotary`.
            source_mask: True for source tokens, False for padding and what belongs to the target.
            query_rotary, source_rotary: cosine and sine of the positions, to turn queries and keys;
                no positions by default. The target's start at 0 again in the third-party code.

        Returns:
            What is added to the hidden states; 0 for a sample without source.

        Raises:
            ValueError: for a mask of another shape, or one beside a `SourceMemory`.
        """
        if isinstance(source, Tensor):
            return self._attend(
                hidden, self.encode(source, source_mask, source_rotary), query_rotary
            )
        if source_mask is not None or source_rotary is not None:
            raise ValueError(
                "source_mask, source_rotary: expected None beside a SourceMemory, which has them "
                "in it already; pass them to encode."
            )
        return self._attend(hidden, source, query_rotary)

    def encode(
        self,
        source: Float[Tensor, "batch source embed_dim"],
        source_mask: Bool[Tensor, "batch source"] | None = None,
        rotary: Rotary | None = None,
    ) -> SourceMemory:
        """Key and value of a source, once for all the tokens that will ask.

        Raises:
            ValueError: for a mask of another shape.
        """
        if source_mask is not None and source_mask.shape != source.shape[:2]:
            raise ValueError(
                f"source_mask: expected [batch, source] = {list(source.shape[:2])}, got "
                f"{list(source_mask.shape)}."
            )
        mapped = self._map(source)
        key = self._split(self.k_proj(mapped), self.num_kv_heads)
        if rotary is not None:
            key = rotate(key, *rotary)
        return SourceMemory(key, self._split(self.v_proj(mapped), self.num_kv_heads), source_mask)

    def _attend(self, hidden: Tensor, memory: SourceMemory, rotary: Rotary | None) -> Tensor:
        if not memory.key.shape[2]:
            return torch.zeros_like(hidden)
        query = self._split(self.q_proj(hidden), self.num_heads)
        if rotary is not None:
            query = rotate(query, *rotary)
        mask = empty = None
        if memory.visible is not None:
            empty = ~memory.visible.any(1)
            mask = (memory.visible | empty[:, None])[:, None, None, :]
        output = scaled_dot_product_attention(
            query,
            memory.key,
            memory.value,
            attn_mask=mask,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        merged: Tensor = self.out_proj(output.transpose(1, 2).flatten(2))
        if empty is not None:
            merged = merged.masked_fill(empty[:, None, None], 0.0)
        return merged if self.gate is None else merged * torch.tanh(self.gate)

    def _map(self, source: Tensor) -> Tensor:
        if self.source_in is None or self.source_out is None:
            return source
        inner: Tensor = self.source_in(source)
        if self.source_map == "tanh":
            return self.source_out(torch.tanh(inner))  # type: ignore[no-any-return]
        inner = silu(inner)
        outer: Tensor = self.source_out(inner)
        return outer + (source if self.source_map == "residual" else inner)

    def _split(self, projected: Tensor, heads: int) -> Tensor:
        split: Tensor = projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
        return split

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, source_map={self.source_map!r}, init={self.init!r}"


def crop_source(
    hidden: Float[Tensor, "batch tokens dim"], source_mask: Bool[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch source dim"], Bool[Tensor, "batch source"]]:
    """The columns up to the last source token of any sample, and which of them are source.

    Args:
        hidden: states of whole sequences, whose first tokens are the source.
        source_mask: which tokens are source, as `source_target_layout` says.
    """
    columns = source_mask.any(0).nonzero()
    length = int(columns[-1]) + 1 if len(columns) else 0
    return hidden[:, :length], source_mask[:, :length]
