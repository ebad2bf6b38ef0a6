"""Visual attention redistribution (2503.03321), for `interventions.py`.

As in LLaVA-1.5: 576 image tokens behind a short prompt, then text; one sink in the text, three in
the image. Every text query that sees the image is edited, the dearest case. The eager form does
what the official code does: it makes the map, sums it over the image and its sinks, and writes the
edited one.
"""

import torch
from _edited_layer import DIM, HEADS, Attention, eager_map
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.interventions.visual_attention_redistribution import VisualAttentionRedistribution

FIRST, IMAGE = 32, 576
SINKS = (0, FIRST + 5, FIRST + 20, FIRST + 30)
MOVED = 0.6
IMAGE_TOKEN, WIDTH = 1, 16


class _Layer(nn.Module):
    """A layer that is nothing but its attention, and is shown its input as any other."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, hidden_states: Tensor) -> Tensor:
        found: Tensor = self.self_attn()
        return found


class _Model(nn.Module):
    """One layer, whose input marks the sinks by their first channel."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(attention)])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.ones(*input_ids.shape, WIDTH)
        hidden[:, list(SINKS), 0] = 100.0
        found: Tensor = self.layers[0](hidden)
        return found


class Redistribution:
    """Mass of the sinks goes to the other image tokens, in every row that sees one."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = torch.randn(3, 1, HEADS, length, DIM, generator=generator).unbind(0)
        self.input_ids = torch.zeros(1, length, dtype=torch.long)
        self.input_ids[:, FIRST : FIRST + min(IMAGE, length // 2)] = IMAGE_TOKEN
        self.model = _Model(Attention(*self.tensors, True))
        self.method = VisualAttentionRedistribution(
            (0,),
            scale_tau=True,
            min_image_mass=0.0,
            min_non_sink_ratio=0.0,
            move_fraction=MOVED,
            skip_first=0,
            skip_last=0,
            image_token_id=IMAGE_TOKEN,
        )

    def sdpa(self) -> Tensor:
        """Without an edit."""
        return scaled_dot_product_attention(*self.tensors, is_causal=True)

    def ours(self) -> Tensor:
        """In a block, as users have it."""
        with self.method(self.model) as run:
            output: Tensor = self.model(self.input_ids)
        assert len(run.heads) == HEADS
        return output

    def eager(self) -> Tensor:
        """The same on a map that is there."""
        query, key, value = self.tensors
        attention = eager_map(query, key, value)
        image = self.input_ids == IMAGE_TOKEN
        sinks = torch.zeros_like(image)
        sinks[:, list(SINKS)] = True
        of_image, of_sinks = (image & ~sinks).nonzero()[:, 1], sinks.nonzero()[:, 1]
        received = attention[..., of_image].sum(-1, keepdim=True)
        chosen = (received > 0) & ~image[:, None, :, None]
        moved = MOVED * attention[..., of_sinks].sum(-1, keepdim=True)
        growth = 1 + moved / received.masked_fill(received == 0, 1.0)
        edited = attention.clone()
        edited[..., of_sinks] *= torch.where(chosen, 1 - MOVED, 1.0)
        edited[..., of_image] *= torch.where(chosen, growth, 1.0)
        return edited @ value
