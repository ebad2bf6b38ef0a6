"""Scaling of attention's logits where the number of keys is not that of training.

Softmax spreads over its keys: at a fixed scale a row's entropy grows with the log of their number.
So a model run on more tokens than it was trained on attends too evenly, on fewer too sharply. One
factor on the logits, or one bias per key, answers to that:

| `kind` | what it does to the logits | keeps |
| --- | --- | --- |
| `"normalized"` | times `sqrt(ln N / ln T)` | `entropy / ln N`, where logits are Gaussian |
| `"log"` | times `ln N / ln T` | the mass of a logit that leads all others by `ln T` |
| `"constant"` | times `sqrt(1 + 2 ln(N / T) / v)` | the entropy itself, where logits are Gaussian |
| proportional attention | plus `ln size_j` | what the tokens said before they were merged |

with N keys now, T in training and v the variance of a row's logits in training. The names are
confused in the literature: diffusers calls the first "proportional attention", as its pipelines do
with the flag `proportional_attn`; token merging (ToMe, 2210.09461) means the last by that.

- `"normalized"`: Jin et al., "Training-free Diffusion Model Adaptation for Variable-Sized
  Text-to-Image Synthesis" (2306.08645). As code: the Lumina processors of diffusers. That it
  preserves the ratio `entropy / ln N`, and not the entropy, is the project's derivation: for
  Gaussian logits of variance v, `entropy = ln N - v / 2`, and v grows with the square of the
  factor, so as `ln N`.
- `"log"`: scaling by `log_T N` as in the "LogN" of Qwen and of YaRN-like context extension.
  A logit that leads all others by m has the mass `exp(m) / (exp(m) + N - 1)`: about a half for
  `m = ln N`. It is the square of the first, so what becomes of that when it is applied twice.
- `"constant"`: derived for the project's card [inferred], from the same formula. It depends on the
  data through v and is much stronger. With so few keys that no factor reaches the entropy of
  training (it would be above `ln N`), the factor is 0: an even look. The formula fails where v
  times the square of the factor nears `2 ln N` and few keys hold the mass: with v = 1.5 at 256
  keys, the entropy at 16384 keys is off by 0.5 nats (by 4.2 without scaling).

`attending.interventions.logit_scaling.LogitScaling` applies the factors to any model.
"""

import math
from typing import Literal, get_args, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.core.state import biased_attention_state

Kind = Literal["normalized", "log", "constant"]
Count = Int[Tensor, "*shape"] | Float[Tensor, "*shape"]


@overload
def logit_scale(
    n: float, n_train: float, kind: Kind = "normalized", variance: float | None = None
) -> float: ...


@overload
def logit_scale(
    n: Count,
    n_train: float | Tensor,
    kind: Kind = "normalized",
    variance: float | Tensor | None = None,
) -> Float[Tensor, "*shape"]: ...


def logit_scale(
    n: float | Count,
    n_train: float | Tensor,
    kind: Kind = "normalized",
    variance: float | Tensor | None = None,
) -> float | Tensor:
    """The factor of the logits for n keys, in a model trained with n_train.

        scale = logit_scale(9216, 4096) * dim ** -0.5
        scaled_dot_product_attention(query, key, value, scale=scale)

    Above 1 (sharper) for more keys than in training, below 1 (flatter) for fewer, exactly 1 for as
    many. A factor depends on logs only: twice the keys at 4096 is 4 % under `"normalized"`.

    Count keys, not queries, and those that are visible: without padding, within the window. A model
    with several resolutions has an n_train for each of its layers.

    Args:
        n: keys now; a number, or a tensor of counts (per sample, per row).
        n_train: keys in training, of this layer. Numbers below 2 count as 2, here and in `n`: one
            key has no entropy to keep, and the log of 1 would be divided by.
        kind: "normalized", "log" or "constant"; see the module's docstring.
        variance: v, for "constant" only: the variance over the keys of the logits of a row in
            training, the softmax scale included, as a mean over rows.
            `statistics.centred_logit_norm(...) ** 2 / n_train` is that of each row.

    Returns:
        A float for numbers; for tensors a tensor of at least float32, of the shape that they
        broadcast to.

    Raises:
        ValueError: for counts below 0 or not finite, an unknown kind, or a variance that is
            missing, superfluous or not positive.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}.")
    if (kind == "constant") != (variance is not None):
        what = 'a number, as kind is "constant"' if kind == "constant" else f"None for {kind!r}"
        raise ValueError(f"variance: expected {what}, got {variance!r}.")
    for name, count in (("n", n), ("n_train", n_train)):
        _check("at least 0", name, count, strict=False)
    if variance is not None:
        _check("above 0", "variance", variance, strict=True)
    if not any(isinstance(value, Tensor) for value in (n, n_train, variance)):
        now, then = max(float(n), 2.0), max(float(n_train), 2.0)
        if kind == "constant":
            assert variance is not None
            return math.sqrt(max(0.0, 1 + 2 * math.log(now / then) / float(variance)))
        ratio = 1.0 if now == then else math.log(now) / math.log(then)
        return math.sqrt(ratio) if kind == "normalized" else ratio
    return _of_tensors(n, n_train, kind, variance)


def _of_tensors(
    n: float | Tensor, n_train: float | Tensor, kind: Kind, variance: float | Tensor | None
) -> Tensor:
    tensors = [value for value in (n, n_train, variance) if isinstance(value, Tensor)]
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    device = tensors[0].device
    now, then = (
        torch.as_tensor(count, dtype=dtype, device=device).clamp_min(2.0) for count in (n, n_train)
    )
    if kind == "constant":
        spread = torch.as_tensor(variance, dtype=dtype, device=device)
        return (1 + 2 * (now / then).log() / spread).clamp_min(0.0).sqrt()
    ratio = now.log() / then.log()
    return ratio.sqrt() if kind == "normalized" else ratio


def _check(expected: str, name: str, value: float | Tensor, strict: bool) -> None:
    low, high = value, value
    if isinstance(value, Tensor):
        if not value.numel():
            return
        low, high = (float(end) for end in value.detach().aminmax())
    if not (low > 0 if strict else low >= 0) or math.isinf(high):
        shown = value if not isinstance(value, Tensor) else f"a tensor with {low} to {high}"
        raise ValueError(f"{name}: expected finite numbers {expected}, got {shown}.")


def proportional_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    sizes: Float[Tensor, "batch keys"] | Int[Tensor, "batch keys"],
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention to tokens that stand for several: `ln size_j` is added to every score of key j.

    The proportional attention of token merging. A key of size m counts like m keys that are alike,
    so tokens that were merged weigh as much as before, exactly where they were equal. The number of
    tokens shrinks and the attention does not sharpen, without any factor: this is the answer to
    merged tokens, `logit_scale` to sequences that really are of another length.

    Runs on a fused kernel, also with `is_causal`; the sizes become a feature of the keys.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in
            `scaled_dot_product_attention`.
        sizes: how many tokens each key stands for; 0 hides a key.

    Returns:
        The output, in query's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: for sizes of another shape, below 0 or not finite.
    """
    expected = (key.shape[0], key.shape[2])
    if tuple(sizes.shape) != expected:
        raise ValueError(
            f"sizes: expected [batch, keys] = {list(expected)}, got {list(sizes.shape)}."
        )
    _check("at least 0", "sizes", sizes, strict=False)
    return biased_attention_state(
        query,
        key,
        value,
        key_bias=sizes.to(torch.promote_types(query.dtype, torch.float32)).log()[:, None],
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    ).output
