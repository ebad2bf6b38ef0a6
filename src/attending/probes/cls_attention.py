"""Which patches a vision tower looks at: the attention of its class token, layer by layer.

The class token (CLS) of a ViT sums up the image, and in pretrained towers it puts most of its
attention on a few patches. These are not always the object: many are background patches of large
norm, the "outliers" in which the tower keeps global information. DAMRO decodes against them;
FasterVLM, VisionZip, PruMerge, VisPruner and AgilePruner decide by this attention which image
tokens a language model gets to see.

    attention = cls_attention(call.query, call.key)   # [images, patches], of a tapped call
    outlier_tokens(attention, k=10)                   # [images, k], most attended first

`attending.probes.patch_watch` gets these calls from a model. Query and key are all it takes, one
row of the map for each head, so the model keeps its fused attention: no
`attn_implementation="eager"`, no `output_attentions`.

Two statistics, never to be mixed up:

- `"cls"`: `softmax(scale q_cls K^T)`, the columns of the patches. The softmax is over all keys, the
  class token's own included, and what the patches get is not renormalised: it sums to less than 1.
- `"received"`: the attention that a patch receives, averaged over the queries of all patches. It is
  what there is for a tower without a class token (SigLIP, Qwen2-VL). It ranks patches otherwise,
  and methods that were published for `"cls"` are other methods with it.

Heads are reduced by `"mean"`, `"sum"`, `"max"`, or kept by `"none"`. `"merged"` is no reduction of
per-head maps: query and key are not split into heads at all, `softmax(q k^T / sqrt(width))`. The
official code of DAMRO (for LLaVA) and of PruMerge does that. It ranks patches differently from the
mean over heads.

Where the tower's output is regrouped before the language model gets it (pixel shuffle of InternVL),
a patch is not an image token, and indices have to be mapped.

Sources: DAMRO (Gong et al., arXiv 2410.04514), official code read at commit 03008ac; AgilePruner
(arXiv 2603.01236) for the mean over heads at layer -2.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.precision import full_precision
from attending.core.statistics import column_mass

Reduction = Literal["mean", "sum", "max", "merged", "none"]
Statistic = Literal["cls", "received"]

Query = Float[Tensor, "batch heads queries dim"]
Key = Float[Tensor, "batch kv_heads keys dim"]
Patches = Float[Tensor, "batch *heads patches"]


@full_precision
def cls_attention(
    query: Query,
    key: Key,
    *,
    reduce: Reduction = "mean",
    prefix: int = 1,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Patches:
    """The attention of the first token over the patches, `softmax(scale q_0 K^T)[prefix:]`.

    Args:
        query: of one layer; only its first token is used.
        key: of the same layer, class token first.
        reduce: how heads are reduced; see the module.
        prefix: tokens before the patches: the class token, and registers if there are any.
        attn_mask: as in `scaled_dot_product_attention`.
        scale: of a head's scores, `dim ** -0.5` by default. With `"merged"` it is divided by
            `sqrt(heads)`, which makes the default `width ** -0.5`.
        enable_gqa: as in `scaled_dot_product_attention`.

    Returns:
        `[batch, patches]`, or `[batch, heads, patches]` with `"none"`; float64 for float64, else
        float32. The patches of a head sum to less than 1, as the prefix keeps its share.

    Raises:
        ValueError: for shapes that do not fit, an unknown reduction, or no patches.
    """
    query, key, scale = _prepared(query, key, reduce, prefix, attn_mask, scale, enable_gqa)
    scores = scale * (query[..., :1, :] @ key.transpose(-1, -2))
    if attn_mask is not None:
        bias = check_arguments(query, key, None, attn_mask, scale=scale).bias
        assert bias is not None
        scores = scores + bias[..., :1, :]
    return _reduced(scores.softmax(-1)[..., 0, prefix:], reduce)


@full_precision
def received_attention(
    query: Query,
    key: Key,
    *,
    reduce: Reduction = "mean",
    prefix: int = 0,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Patches:
    """The attention that each patch receives from a patch, on average.

    For towers without a class token; a different statistic from `cls_attention`. The map is not
    built (`statistics.column_mass`). Arguments, shapes and errors are those of `cls_attention`;
    the queries of the prefix do not count.
    """
    query, key, scale = _prepared(query, key, reduce, prefix, attn_mask, scale, enable_gqa)
    weights = query.new_zeros(query.shape[-2])
    weights[prefix:] = 1.0 / max(1, query.shape[-2] - prefix)
    mass = column_mass(query, key, weights, attn_mask=attn_mask, scale=scale)
    return _reduced(mass[..., prefix:], reduce)


def outlier_tokens(
    attention: Float[Tensor, "*batch patches"], k: int = 10
) -> Int[Tensor, "*batch k"]:
    """The `k` patches with the most attention, most attended first, for each sample on its own.

    Of equal ones the earlier patch comes first, so the result is the same on every device. DAMRO
    takes 10 for LLaVA-1.5 and LLaVA-NeXT (576 patches), 4 for InstructBLIP.

    Raises:
        ValueError: if k is not from 1 to the number of patches.
    """
    patches = attention.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= patches:
        raise ValueError(
            f"k: expected a whole number from 1 to {patches}, the number of patches, got {k!r}."
        )
    return attention.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def top_share(
    attention: Float[Tensor, "*batch tokens"], index: Int[Tensor, "*batch k"]
) -> Float[Tensor, "*batch"]:
    """The share of the attention that falls on the tokens at `index`; in [0, 1].

    DAMRO's diagnostic F takes the attention of the language model over the image tokens, and for
    `index` the tower's three largest outliers; it reports higher values where a named object is
    not in the image. [3rd]
    """
    return attention.gather(-1, index).sum(-1) / attention.sum(-1)


def topk_overlap(
    first: Float[Tensor, "*batch tokens"], second: Float[Tensor, "*batch tokens"], k: int
) -> Float[Tensor, "*batch"]:
    """The share of the `k` largest of one that are among the `k` largest of the other; in [0, 1].

    DAMRO's diagnostic H compares the tower's attention with the language model's. [3rd]
    """
    one, other = outlier_tokens(first, k), outlier_tokens(second, k)
    return (one[..., :, None] == other[..., None, :]).any(-1).float().mean(-1)


def check_reduction(reduce: str) -> None:
    """Raise ValueError for the name of a reduction that there is not."""
    if reduce not in get_args(Reduction):
        raise ValueError(
            f"reduce: expected one of {', '.join(get_args(Reduction))}; got {reduce!r}."
        )


def _prepared(
    query: Tensor,
    key: Tensor,
    reduce: Reduction,
    prefix: int,
    attn_mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, float]:
    """Checked, in float32 or better, a key head for each query head, merged if asked for."""
    check_reduction(reduce)
    scale = check_arguments(query, key, None, attn_mask, False, scale, enable_gqa).scale
    if not 0 <= prefix < key.shape[-2]:
        raise ValueError(
            f"prefix: expected from 0 to {key.shape[-2] - 1}, so that patches remain of the "
            f"{key.shape[-2]} keys, got {prefix}."
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if reduce == "merged":
        scale = scale * query.shape[1] ** -0.5
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
    return query, key, scale


def _reduced(attention: Tensor, reduce: Reduction) -> Tensor:
    if reduce == "none":
        return attention
    if reduce == "max":
        return attention.amax(1)
    return attention.sum(1) if reduce == "sum" else attention.mean(1)
