"""Differential attention and grouped differential attention: two maps, one subtracted.

Softmax attention spreads a little weight over keys that do not matter. Here each *signal* map has a
*noise* map subtracted from it, which learns what they have in common. For pair p, with queries and
keys of their own for both maps and one value of (usually) twice their width,

    out_h = softmax(q_h k1_p^T scale) v_p - w * softmax(q'_g k2_p^T scale) v_p

In the Differential Transformer (2410.05258) each signal head h has its own noise head g. Grouped
(2510.06949), a noise head serves `ratio` signal heads, so that most heads carry signal. The maps of
signal and noise are causal or masked alike. w is a learned number of the layer; weights of the
difference may be negative and its rows sum to 1 - w, so it is no probability: `differential_maps`
gives the two maps, not their difference.

The noise output is computed once per noise head and then shared, by linearity. That makes two fused
passes, each with the whole value, and no map is stored. (`scaled_dot_product_attention` has no
fused kernel on CPUs for a value wider than the key; transformers' DiffLlama calls it on two
halves of the value for that reason, and has the softmax twice. Here queries and keys are filled up
with zeros, which costs as many operations as the second score would.)

Sources: the layout is that of the official code of the Differential Transformer (microsoft/unilm,
Diff-Transformer) and of Motif's models (MotifTechnologies/vllm, both read); of 2510.06949 only the
abstract and summaries were at hand. With fewer kv heads this follows the official flash variants:
the plain file `multihead_diffattn.py` repeats the 2K keys as a flat list there, so that both maps
of a pair get the same key. A row without a visible key is 0 (the official code gives NaN).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core import reference
from attending.core.check import check_arguments, check_mask
from attending.core.state import attend
from attending.nn.head_maps import DifferentialHeads


class DifferentialOutputs(NamedTuple):
    """Attention with the signal maps and with the noise maps, before the subtraction."""

    signal: Float[Tensor, "batch signal_heads queries value_dim"]
    noise: Float[Tensor, "batch noise_heads queries value_dim"]


class DifferentialMaps(NamedTuple):
    """The maps, each a row of probabilities per query."""

    signal: Float[Tensor, "batch signal_heads queries keys"]
    noise: Float[Tensor, "batch noise_heads queries keys"]


def differential_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch pairs keys value_dim"],
    noise_weight: float | Tensor,
    *,
    ratio: int = 1,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch signal_heads queries value_dim"]:
    """Differential attention, grouped for `ratio` above 1; the module's docstring has the formula.

        query = torch.randn(1, 10, 16, 8)      # 2 groups of 4 signal heads and a noise head
        key = torch.randn(1, 4, 16, 8)         # 2 pairs of a signal key and a noise key
        value = torch.randn(1, 2, 16, 16)      # a value for each pair
        differential_attention(query, key, value, 0.5, ratio=4)        # [1, 8, 16, 16]

    The norm, the factor and the projection that follow in a layer are those of
    `attending.nn.grouped_differential_attention`.

    Args:
        query: groups of `ratio` signal heads and one noise head.
        key: pairs of heads, signal and noise.
        value: a head for each pair, of any width.
        noise_weight: w, a number, or a tensor that broadcasts to `[batch, signal_heads, queries]`.
        ratio: signal heads for each noise head.
        attn_mask: boolean (True = visible) or a float bias that broadcasts to `[batch, heads,
            queries, keys]`, in the layout of the query heads; not together with `is_causal`.
        is_causal: query i sees keys 0..i.
        scale: finite; `dim ** -0.5` by default.
        enable_gqa: let there be fewer pairs than noise heads.

    Returns:
        The output of each signal head, in query's dtype; 0 where no key is visible.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    outputs = differential_outputs(
        query,
        key,
        value,
        ratio=ratio,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return subtract_noise(outputs, noise_weight)


def subtract_noise(
    outputs: DifferentialOutputs, noise_weight: float | Tensor
) -> Float[Tensor, "batch signal_heads queries value_dim"]:
    """`signal_h - noise_weight * noise_g`, where g is the noise head of signal head h.

    Args:
        outputs: of `differential_outputs`.
        noise_weight: a number, or a tensor that broadcasts to `[batch, signal_heads, queries]`.

    Raises:
        ValueError: for a tensor of another shape.
    """
    signal, noise = outputs
    groups = signal.unflatten(1, (noise.shape[1], -1))
    weight: float | Tensor = noise_weight
    if isinstance(noise_weight, Tensor):
        try:
            weight = noise_weight.to(signal.dtype).expand(signal.shape[:3])
        except RuntimeError:
            raise ValueError(
                "noise_weight: expected a shape that broadcasts to [batch, signal_heads, queries] "
                f"= {list(signal.shape[:3])}, got {list(noise_weight.shape)}."
            ) from None
        weight = weight.unflatten(1, groups.shape[1:3])[..., None]
    difference: Tensor = groups - weight * noise[:, :, None]
    return difference.flatten(1, 2)


def differential_outputs(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch pairs keys value_dim"],
    *,
    ratio: int = 1,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DifferentialOutputs:
    """The two passes of `differential_attention`, which see its arguments."""
    heads = _heads(query, key, ratio, enable_gqa)
    signal_key = key[:, 0::2]
    arguments = check_arguments(
        query[:, : heads.num_noise], signal_key, value, None, False, scale, True
    )
    biases = _masks(attn_mask, is_causal, query, key, heads)
    groups = query.unflatten(1, (heads.num_noise, ratio + 1))
    asked = groups[:, :, :ratio].flatten(1, 2), groups[:, :, ratio]
    signal, noise = (
        attend(one, other, value, bias=bias, is_causal=is_causal, scale=arguments.scale).output
        for one, other, bias in zip(asked, (signal_key, key[:, 1::2]), biases, strict=True)
    )
    return DifferentialOutputs(signal, noise)


def differential_maps(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    *,
    ratio: int = 1,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DifferentialMaps:
    """The two maps, dense and in float64, for looking at: memory grows with the square.

    Each is a map of probabilities, for everything in `attending.statistics` and
    `attending.probes` that expects one. The map that the layer acts by is `signal -
    noise_weight * noise`, which is none.

    Args:
        query, key, ratio, attn_mask, is_causal, scale, enable_gqa: as in
            `differential_attention`.

    Raises:
        ValueError: for arguments that do not fit together.
    """
    heads = _heads(query, key, ratio, enable_gqa)
    biases = _masks(attn_mask, is_causal, query, key, heads)
    signal, noise = (
        reference.attention_map(
            query[:, index], one, bias, is_causal, scale, enable_gqa=True
        ).probabilities
        for index, one, bias in zip(
            (list(heads.signal), list(heads.noise)),
            (key[:, 0::2], key[:, 1::2]),
            biases,
            strict=True,
        )
    )
    return DifferentialMaps(signal, noise)


def split_values(
    value: Float[Tensor, "batch pairs tokens value_dim"],
) -> Float[Tensor, "batch halves tokens half_dim"]:
    """Each value as two heads, its halves, beside each other.

    So there are as many heads of values as of keys, and of one width, which is what caches and
    attention implementations expect. The value's width has to be even.
    """
    halves: Tensor = value.unflatten(-1, (2, -1)).transpose(2, 3)
    return halves.flatten(1, 2)


def join_values(
    halves: Float[Tensor, "batch halves tokens half_dim"],
) -> Float[Tensor, "batch pairs tokens value_dim"]:
    """The way back from `split_values`."""
    value: Tensor = halves.unflatten(1, (-1, 2)).transpose(2, 3)
    return value.flatten(3)


def _heads(query: Tensor, key: Tensor, ratio: int, enable_gqa: bool) -> DifferentialHeads:
    """The layout, read off the shapes."""
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: expected [batch, heads, tokens, dim], got {shape}.")
    if ratio < 1:
        raise ValueError(f"ratio: expected at least 1 signal head for a noise head, got {ratio}.")
    if query.shape[1] == 0 or query.shape[1] % (ratio + 1):
        raise ValueError(
            f"query: expected groups of {ratio} signal heads and one noise head, so a multiple of "
            f"{ratio + 1} heads, got {list(query.shape)}."
        )
    if key.shape[1] == 0 or key.shape[1] % 2:
        raise ValueError(
            f"key: expected pairs of heads, a signal key and a noise key, got {list(key.shape)}."
        )
    noise, pairs = query.shape[1] // (ratio + 1), key.shape[1] // 2
    if noise % pairs or (noise != pairs and not enable_gqa):
        fewer = "or fewer that divide them" if enable_gqa else "(fewer with enable_gqa=True)"
        raise ValueError(
            f"key: expected a pair of heads for each of the {noise} noise heads, {fewer}, got "
            f"{list(key.shape)}."
        )
    return DifferentialHeads(noise * ratio, noise, pairs)


def _masks(
    attn_mask: Tensor | None,
    is_causal: bool,
    query: Tensor,
    key: Tensor,
    heads: DifferentialHeads,
) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the signal heads and that of the noise heads."""
    if attn_mask is None:
        return None, None
    if is_causal:
        raise ValueError(
            "attn_mask: expected None when is_causal=True, as in scaled_dot_product_attention, got "
            f"{list(attn_mask.shape)}. Put the causal mask into attn_mask."
        )
    bias, _ = check_mask(attn_mask, query, key)
    if bias.shape[1] == 1:
        return bias, bias
    index = torch.tensor(heads.signal), torch.tensor(heads.noise)
    signal, noise = (bias.index_select(1, one.to(bias.device)) for one in index)
    return signal, noise
