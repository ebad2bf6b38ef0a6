"""The parts of models that read a source and a target: a block, and what decoding keeps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attending.nn.partial_attention import PartialAttention, SourceMap, SourceMemory, crop_source
from attending.nn.self_attention import SelfAttention
from attending.nn.source_target_layout import SourceTargetLayout

Norm = Literal["pre", "post"]
Update = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class DecodingState:
    """What decoding keeps between tokens; a `KeyValueCache` of the self-attention.

    Attributes:
        visible: which columns so far are no padding.
        position: of the next target token of each sample.
        keys, values: of the self-attention, by layer.
        memories: the source of the partial attention, by layer; None without it.
    """

    visible: Bool[Tensor, "batch tokens"]
    position: Int[Tensor, " batch"]
    keys: list[Tensor | None]
    values: list[Tensor | None]
    memories: list[SourceMemory | None]

    @classmethod
    def of(cls, layout: SourceTargetLayout, depth: int) -> "DecodingState":
        """That of a prompt that has not been read."""
        visible = layout.source_mask | layout.target_mask
        counted = layout.target_mask if layout.restart_positions else visible
        return cls(visible, counted.sum(1), [None] * depth, [None] * depth, [None] * depth)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values of a layer; return all of them."""
        for kept, new in ((self.keys, key), (self.values, value)):
            old = kept[layer_idx]
            kept[layer_idx] = new if old is None else torch.cat([old, new], 2)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        assert keys is not None
        assert values is not None
        return keys, values


class DecoderBlock(nn.Module):
    """Self-attention, partial attention if there is a `source_map`, feed-forward."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        layer: int,
        source_map: SourceMap | None,
        norm: Norm,
        mlp_dim: int,
    ) -> None:
        super().__init__()
        self.pre, self.layer = norm == "pre", layer
        self.attention = SelfAttention(embed_dim, num_heads, bias=False, layer_idx=layer)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.partial: PartialAttention | None = None
        if source_map is not None:
            self.partial = PartialAttention(embed_dim, num_heads, source_map=source_map)
            self.partial_norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, embed_dim)
        )
        self.mlp_norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        source: Tensor | SourceMemory | None,
        state: DecodingState | None = None,
    ) -> Tensor:
        """One update.

        Args:
            hidden: `[batch, tokens, dim]`.
            mask: who may look where in self-attention.
            source: which tokens are source; or what was kept of them, when one token is decoded.
            state: where keys and the source are kept.
        """

        def attend(states: Tensor) -> Tensor:
            attended: Tensor = self.attention(states, attn_mask=mask, cache=state)
            return attended

        hidden = self._add(hidden, self.attention_norm, attend)
        if self.partial is not None:
            partial = self.partial
            memory = source
            if isinstance(source, Tensor):
                memory = partial.encode(*crop_source(hidden, source))
                if state is not None:
                    state.memories[self.layer] = memory
            assert isinstance(memory, SourceMemory)
            kept = memory
            hidden = self._add(hidden, self.partial_norm, lambda one: partial(one, kept))
        return self._add(hidden, self.mlp_norm, self.mlp)

    def _add(self, hidden: Tensor, norm: nn.Module, update: Update) -> Tensor:
        if self.pre:
            return hidden + update(norm(hidden))
        return norm(hidden + update(hidden))  # type: ignore[no-any-return]


def sinusoids(
    positions: Int[Tensor, "batch tokens"], dim: int
) -> Float[Tensor, "batch tokens dim"]:
    """Sines and cosines of positions, wave lengths from 2 pi to 20,000 pi; of the size of words."""
    half = (dim + 1) // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32) / max(half, 1)
    angles = positions[..., None].float() * torch.exp(-math.log(10_000) * steps)
    waves: Tensor = torch.cat([angles.sin(), angles.cos()], -1)[..., :dim]
    return waves / math.sqrt(dim)
