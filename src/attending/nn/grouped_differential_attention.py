"""A layer of (grouped) differential attention, to train a transformer with.

    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init              one number per layer
    out_h  = (1 - lambda_init) * RMSNorm(A_h v - lambda * A'_g v)       the norm over each head
    output = out_proj(concat_h out_h)

with the maps of `attending.nn.differential_attention`. With as many noise heads as signal heads it
is the attention of the Differential Transformer (2410.05258), under the parameter names and in the
layout of its official code, so that its weights load as they are (they need `interleaved=True`).
With fewer it is grouped differential attention (2510.06949), of which summaries say that 3 or 4
signal heads for a noise head do best.

lambda_init grows with the depth, 0.8 - 0.6 exp(-0.3 t). t is the index of the layer, counted from
0, in the Differential Transformer; Motif's code has the index minus 1, so that its first layer gets
-0.0099 [read in their code]. `lambda_index` says which is meant.

`lambda_mode="token"` is the later form of Motif 3, as notes of others describe it [not seen in a
paper or in official code]: lambda = sigmoid(W x) for each token and signal head, and neither the
norm nor the factor after the subtraction.
"""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.nn.differential_attention import (
    DifferentialOutputs,
    differential_outputs,
    join_values,
    split_values,
    subtract_noise,
)
from attending.nn.head_maps import DifferentialHeads
from attending.nn.rotary import rotate
from attending.nn.self_attention import KeyValueCache

LambdaIndex = Literal["zero_based", "motif"]
LambdaMode = Literal["scalar", "token"]


def lambda_schedule(layer_idx: int, lambda_index: LambdaIndex = "zero_based") -> float:
    """`0.8 - 0.6 exp(-0.3 t)`: what lambda is at the start of training, by the depth.

    Args:
        layer_idx: index of the layer, counted from 0.
        lambda_index: "zero_based": t is `layer_idx`, which gives 0.2 in the first layer; "motif":
            `layer_idx - 1`, which gives -0.0099 there and 0.2 in the second.

    Raises:
        ValueError: for a negative index or an unknown convention.
    """
    if layer_idx < 0:
        raise ValueError(f"layer_idx: expected at least 0, got {layer_idx}.")
    if lambda_index not in get_args(LambdaIndex):
        raise ValueError(
            f"lambda_index: expected one of {get_args(LambdaIndex)}, got {lambda_index!r}."
        )
    return 0.8 - 0.6 * math.exp(-0.3 * (layer_idx - (lambda_index == "motif")))


class GroupedDifferentialAttention(nn.Module):
    """Multi-head differential attention, `[batch, tokens, embed_dim]` in and out.

        layer = GroupedDifferentialAttention(64, 8, 2, head_dim=8)      # 4:1
        hidden = layer(hidden, is_causal=True)
        layer = GroupedDifferentialAttention(64, 4, layer_idx=3)        # 1:1, the original

    `embed_dim`, `bias`, `kdim`, `vdim`, `device` and `dtype` are those of `nn.MultiheadAttention`.
    There is no dropout on the maps: the papers do not say what it would mean.

    Args:
        embed_dim: width of queries and of the output.
        num_signal_heads: heads of the output, each `2 * head_dim` wide.
        num_noise_heads: a divisor of it; as many by default.
        bias: biases in the four projections; the official models have none.
        num_kv_pairs: pairs of keys with a value each, a divisor of `num_noise_heads`, which is the
            default.
        head_dim: width of queries and keys; `embed_dim // (2 * num_signal_heads)` by default.
        layer_idx: of `lambda_schedule`, and the layer's number in a cache.
        lambda_index: see `lambda_schedule`.
        lambda_mode: see the module's docstring.
        lambda_init: in place of the schedule's.
        eps: of the norm.
        interleaved: the layout of the rotary embedding; True in the official code.
        kdim, vdim: widths of key and value where they come from elsewhere.
        device, dtype: of the parameters. The four lambda vectors are at least float32.

    Raises:
        ValueError: for sizes that do not divide, or an unknown mode.
    """

    lambda_q1: nn.Parameter
    lambda_k1: nn.Parameter
    lambda_q2: nn.Parameter
    lambda_k2: nn.Parameter

    def __init__(
        self,
        embed_dim: int,
        num_signal_heads: int,
        num_noise_heads: int | None = None,
        bias: bool = True,
        num_kv_pairs: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        lambda_index: LambdaIndex = "zero_based",
        lambda_mode: LambdaMode = "scalar",
        lambda_init: float | None = None,
        eps: float = 1e-5,
        interleaved: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        noise = num_signal_heads if num_noise_heads is None else num_noise_heads
        self.heads = DifferentialHeads(
            num_signal_heads, noise, noise if num_kv_pairs is None else num_kv_pairs
        )
        if head_dim is None:
            if embed_dim < 1 or embed_dim % (2 * num_signal_heads):
                raise ValueError(
                    "head_dim: expected a number where embed_dim is no multiple of 2 * "
                    f"num_signal_heads = {2 * num_signal_heads}, got None and {embed_dim}."
                )
            head_dim = embed_dim // (2 * num_signal_heads)
        if head_dim < 1 or embed_dim < 1:
            raise ValueError(
                f"embed_dim, head_dim: expected at least 1, got {embed_dim} and {head_dim}."
            )
        if lambda_mode not in get_args(LambdaMode):
            raise ValueError(
                f"lambda_mode: expected one of {get_args(LambdaMode)}, got {lambda_mode!r}."
            )
        self.embed_dim, self.head_dim, self.layer_idx = embed_dim, head_dim, layer_idx
        self.lambda_mode: LambdaMode = lambda_mode
        scheduled = lambda_schedule(layer_idx, lambda_index)
        self.lambda_init = scheduled if lambda_init is None else float(lambda_init)
        self.eps, self.interleaved = eps, interleaved
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        factory = {"device": device, "dtype": dtype}
        pairs, width = self.heads.num_pairs, 2 * head_dim
        self.q_proj = nn.Linear(embed_dim, self.heads.num_query * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(self.kdim, pairs * width, bias=bias, **factory)
        self.v_proj = nn.Linear(self.vdim, pairs * width, bias=bias, **factory)
        self.out_proj = nn.Linear(num_signal_heads * width, embed_dim, bias=bias, **factory)
        if lambda_mode == "token":
            self.lambda_proj = nn.Linear(embed_dim, num_signal_heads, bias=bias, **factory)
            return
        self.subln = nn.RMSNorm(width, eps=eps, device=device, dtype=dtype)
        exact = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            vector = torch.empty(head_dim, device=device, dtype=exact)
            self.register_parameter(name, nn.Parameter(nn.init.normal_(vector, std=0.1)))

    def forward(
        self,
        query: Float[Tensor, "batch queries embed_dim"],
        key: Float[Tensor, "batch keys key_dim"] | None = None,
        value: Float[Tensor, "batch keys value_dim"] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch queries embed_dim"]:
        """Attend.

        Args:
            query: the hidden states that ask.
            key: those that answer; `query` by default.
            value: what they answer with; `key` by default.
            attn_mask: as in `scaled_dot_product_attention`, True = visible (the opposite of
                `nn.MultiheadAttention`).
            is_causal: each token sees itself and those before it. With a cache the tokens are the
                last ones of the keys.
            position_embeddings: cosine and sine of the rotary embedding, `[batch or 1, tokens,
                head_dim]`, as transformers' models make them; for self-attention.
            cache: where keys and values of the tokens before are, and those of these go:
                `2 * num_kv_pairs` heads of both, `head_dim` wide (see `split_values`).
        """
        heads = self.project(query, key, value, position_embeddings)
        asked, keys, values = heads
        if cache is not None:
            keys, halves = cache.update(keys, split_values(values), self.layer_idx)
            values = join_values(halves)
        past = keys.shape[2] - asked.shape[2]
        if is_causal and past and attn_mask is None:
            # `is_causal` is aligned to the first key, the tokens are the last ones.
            is_causal = False
            if asked.shape[2] > 1:
                visible = torch.ones(asked.shape[2], keys.shape[2], dtype=torch.bool)
                attn_mask = visible.tril(past).to(asked.device)
        outputs = differential_outputs(
            asked,
            keys,
            values,
            ratio=self.heads.ratio,
            attn_mask=attn_mask,
            is_causal=is_causal,
            enable_gqa=True,
        )
        return self.combine(outputs, query)

    def project(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[
        Float[Tensor, "batch heads queries dim"],
        Float[Tensor, "batch key_heads keys dim"],
        Float[Tensor, "batch pairs keys value_dim"],
    ]:
        """Query, key and value as `differential_attention` takes them, queries and keys rotated."""
        key = query if key is None else key
        value = key if value is None else value
        asked = self.q_proj(query).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        keys = self.k_proj(key).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        values = self.v_proj(value).unflatten(-1, (-1, 2 * self.head_dim)).transpose(1, 2)
        if position_embeddings is not None:
            asked, keys = (
                rotate(one, *position_embeddings, self.interleaved).to(one.dtype)
                for one in (asked, keys)
            )
        return asked, keys, values

    def combine(
        self,
        outputs: DifferentialOutputs,
        hidden: Float[Tensor, "batch queries embed_dim"],
    ) -> Float[Tensor, "batch queries embed_dim"]:
        """What comes after the two passes: subtraction, norm, factor, projection.

        Args:
            outputs: of `differential_outputs`.
            hidden: the hidden states that asked, from which `lambda_mode="token"` takes lambda.
        """
        difference = subtract_noise(outputs, self.noise_weight(hidden))
        if self.lambda_mode == "scalar":
            # In one dtype, so that the fused norm is used under autocast, too.
            normed = self.subln(difference.to(self.subln.weight.dtype)).to(difference.dtype)
            difference = (1.0 - self.lambda_init) * normed
        merged: Tensor = self.out_proj(difference.transpose(1, 2).flatten(2))
        return merged

    def noise_weight(self, hidden: Float[Tensor, "batch queries embed_dim"]) -> Tensor:
        """lambda: one number, or `[batch, signal_heads, queries]` of `lambda_mode="token"`."""
        if self.lambda_mode == "token":
            gates: Tensor = torch.sigmoid(self.lambda_proj(hidden)).transpose(1, 2)
            return gates
        exact = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        first = (self.lambda_q1.to(exact) * self.lambda_k1.to(exact)).sum().exp()
        second = (self.lambda_q2.to(exact) * self.lambda_k2.to(exact)).sum().exp()
        return first - second + self.lambda_init

    def options(self) -> dict[str, Any]:
        """The arguments that make another layer like this one, as JSON can hold them."""
        return {
            "embed_dim": self.embed_dim,
            "num_signal_heads": self.heads.num_signal,
            "num_noise_heads": self.heads.num_noise,
            "bias": self.q_proj.bias is not None,
            "num_kv_pairs": self.heads.num_pairs,
            "head_dim": self.head_dim,
            "layer_idx": self.layer_idx,
            "lambda_mode": self.lambda_mode,
            "lambda_init": self.lambda_init,
            "eps": self.eps,
            "interleaved": self.interleaved,
            "kdim": self.kdim,
            "vdim": self.vdim,
        }

    def extra_repr(self) -> str:
        heads = self.heads
        return (
            f"signal_heads={heads.num_signal}, noise_heads={heads.num_noise}, "
            f"kv_pairs={heads.num_pairs}, head_dim={self.head_dim}, "
            f"lambda_init={self.lambda_init:.4f}"
        )
