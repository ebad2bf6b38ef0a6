"""Rotary position embedding, in the two layouts that checkpoints come in.

A pair of channels is turned by the angle `position * frequency`:

    (a, b) -> (a cos - b sin, b cos + a sin)

transformers pairs channel c with c + dim/2 (halves); Meta's own Llama code, flash-attn's
interleaved mode and the Differential Transformer's official code pair 2c with 2c + 1. A
permutation of the rows of the query and the key projection turns one into the other.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    tensor: Float[Tensor, "batch heads tokens dim"],
    cosine: Float[Tensor, "#batch tokens rotated"],
    sine: Float[Tensor, "#batch tokens rotated"],
    interleaved: bool = False,
) -> Float[Tensor, "batch heads tokens dim"]:
    """Rotary embedding of the first channels; the others stay as they are.

    Args:
        tensor: queries or keys.
        cosine, sine: of the angles, a number for each channel that is turned, as transformers'
            models make them: for halves the frequencies come twice in a row, `[f, f]`.
        interleaved: pair neighbouring channels. `cosine` and `sine` are in the same form, `[f, f]`.
    """
    width = cosine.shape[-1]
    turned = tensor[..., :width]
    cosine, sine = cosine[:, None], sine[:, None]
    if interleaved:
        half = width // 2
        first, second = turned[..., 0::2], turned[..., 1::2]
        cosine, sine = cosine[..., :half], sine[..., :half]
        pair = (first * cosine - second * sine, second * cosine + first * sine)
        rotated = torch.stack(pair, -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        rotated = turned * cosine + torch.cat([-second, first], -1) * sine
    return rotated if width == tensor.shape[-1] else torch.cat([rotated, tensor[..., width:]], -1)
