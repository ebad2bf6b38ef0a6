"""Visual attention redistribution (2503.03321), for `interventions.py`.

As in LLaVA-1.5: 576 image tokens behind a short prompt, then text; one sink in the text, three in
the image. Every row that looks at the image at all is edited, the dearest case. The eager form does
what the official code does: it makes the map, sums it over the image and its sinks, and writes the
edited one.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.interventions._visual_groups import Groups, edit
from attending.taps import AttentionCall

FIRST, IMAGE = 32, 576
SINKS = (0, FIRST + 5, FIRST + 50, FIRST + 90)
MOVED = 0.6


def masks(tokens: int) -> tuple[Tensor, Tensor]:
    """Which tokens are of the image, and which are sinks; a quarter at most of a short sequence."""
    image = torch.zeros(1, tokens, dtype=torch.bool)
    image[:, FIRST : FIRST + min(IMAGE, tokens // 4)] = True
    sinks = torch.zeros_like(image)
    sinks[:, [place for place in SINKS if place < tokens]] = True
    return image, sinks


def ours(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours, as the handler of a tap does it."""
    image, sinks = masks(query.shape[2])
    image, sinks = (mask.expand(len(query), -1) for mask in (image, sinks))
    call = AttentionCall(
        name="",
        layer=0,
        query=query,
        key=key,
        value=value,
        is_causal=is_causal,
        module=nn.Identity(),
    )
    groups = Groups(image & ~sinks, image & sinks, sinks & ~image, ~image)
    options = {"min_image_mass": 0.0, "min_non_sink_ratio": 0.0, "move_fraction": MOVED}
    return edit(call, _attend, groups, **options).output


def eager(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same on a map that is there."""
    tokens = query.shape[2]
    image, sinks = masks(tokens)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    attention = scores.softmax(-1)
    of_image, of_sinks = (image & ~sinks).nonzero()[:, 1], sinks.nonzero()[:, 1]
    received = attention[..., of_image].sum(-1, keepdim=True)
    chosen = (received > 0) & ~image[:, None, :, None]
    moved = MOVED * attention[..., of_sinks].sum(-1, keepdim=True)
    growth = 1 + moved / received.masked_fill(received == 0, 1.0)
    edited = attention.clone()
    edited[..., of_sinks] *= torch.where(chosen, 1 - MOVED, 1.0)
    edited[..., of_image] *= torch.where(chosen, growth, 1.0)
    return edited @ value


def _attend(call: AttentionCall) -> Tensor:
    return scaled_dot_product_attention(
        call.query, call.key, call.value, is_causal=call.is_causal, scale=call.scale
    )
