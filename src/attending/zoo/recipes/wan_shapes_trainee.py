"""What ``wan-shapes`` is trained with: the model, its running average, quick attention."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.zoo.caption_embedding import CaptionEmbedding
from attending.zoo.recipes.training_attention import training_attention
from attending.zoo.recipes.wan_shapes_data import FlowBatch


class QuickWanAttention:
    """The attention of a Wan block by what is fastest to train with on a processor.

    The same numbers as diffusers' ``WanAttnProcessor`` gives, up to rounding: rotary positions
    without writes to every other element, and plain products (see
    :func:`attending.zoo.recipes.training_attention.training_attention`).
    """

    _attention_backend = None  # diffusers sets these two on every processor
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend, within the video or to the caption."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        # Under autocast the norm of a bfloat16 tensor has no fast kernel, as its weight is float32.
        query, key = attn.norm_q(query.float()), attn.norm_k(key.float())
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = (rotate(x, *rotary_emb) for x in (query, key))
        query, key = query.to(value.dtype), key.to(value.dtype)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed, _ = training_attention(attn, query, key, value, attention_mask)
        out: Tensor = attn.to_out[0](mixed.flatten(2))
        return out


def rotate(
    states: Float[Tensor, "batch tokens heads dim"],
    cos: Float[Tensor, "1 tokens 1 dim"],
    sin: Float[Tensor, "1 tokens 1 dim"],
) -> Float[Tensor, "batch tokens heads dim"]:
    """Turn each pair of neighbouring elements by the angle of its token."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2].to(states.dtype), sin[..., 1::2].to(states.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Trainee(nn.Module):
    """The model with its text encoder, and the running average of both, which is shipped."""

    def __init__(self, wan: Any, text: CaptionEmbedding) -> None:
        super().__init__()
        # The average keeps diffusers' own attention.
        self.average_wan = copy.deepcopy(wan).requires_grad_(False).eval()
        self.average_text = copy.deepcopy(text).requires_grad_(False).eval()
        self.wan, self.text = wan, text
        wan.set_attn_processor(QuickWanAttention())

    def compile_blocks(self) -> None:
        """Compile the blocks, once for every shape of a batch; needs a C++ compiler."""
        for block in self.wan.blocks:
            block.compile(dynamic=False)

    def loss(self, batch: FlowBatch, bfloat16: bool) -> Tensor:
        """Mean squared error of the velocity."""
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            velocity = self.wan(
                hidden_states=batch.noisy,
                timestep=1000 * batch.levels,
                encoder_hidden_states=self.text(batch.captions),
                return_dict=False,
            )[0]
        errors: Tensor = velocity.float() - batch.velocity
        return errors.square().mean()

    @torch.no_grad()
    def average(self, finished: int, decay: float) -> None:
        """Move the average towards the model; it starts short, as the first steps are poor."""
        weight = 1 - min(decay, finished / (finished + 9))
        pairs = ((self.average_wan, self.wan), (self.average_text, self.text))
        for slow, fast in pairs:
            torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), weight)
