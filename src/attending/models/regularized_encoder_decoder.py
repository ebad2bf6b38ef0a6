"""An encoder-decoder that can be made, step by step, to behave as a decoder-only language model.

How Fu et al. (2304.04052) explain decoder-only models: as an encoder-decoder under regularisers.
Each is a switch here, on by default. With all of them on, the model computes exactly what the
causal language model `PartialAttentionLM(partial=False)` with the same weights does; with all off,
it is the classical encoder-decoder.

- `joint_attention`: a decoder layer attends to source and target in one softmax, which the paper
  calls unidirectional cross-attention; off, self-attention is followed by cross-attention.
- `share_parameters`: the encoder's layers are the decoder's; off, there are two stacks.
- `layer_wise`: decoder layer l reads what goes into encoder layer l; off, the encoder's output.
- `consecutive_positions`: the target's positions go on after the source's; off, they start at 0.
- `causal_source`: a source token sees those before it; off, it sees all.

The fifth regulariser of the paper, the source auto-encoder, is a loss: the language-model loss on
the source, for which the output has logits of the source as well. That an LM's source is causal is
not on the paper's list as far as known; without it the model equals a prefix-LM.

**A reconstruction**: the list of regularisers is from the abstract and summaries, the paper's body
was not at hand. Pre-norm only.
"""

from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.models._source_target_blocks import DecoderBlock, sinusoids
from attending.nn.partial_attention import PartialAttention


class SourceTargetLogits(NamedTuple):
    """Logits of the token after each token.

    Attributes:
        source: `[batch, source, vocab]`. The last one of a sample is for the first target token,
            where the model is a language model.
        target: `[batch, target, vocab]`.
    """

    source: Float[Tensor, "batch source vocab"]
    target: Float[Tensor, "batch target vocab"]


class RegularizedEncoderDecoder(nn.Module):
    """Encoder and decoder with the switches of the module's docstring.

        model = RegularizedEncoderDecoder(vocab_size=1000)         # a language model in two parts
        model = RegularizedEncoderDecoder(                          # the classical one
            vocab_size=1000, joint_attention=False, share_parameters=False, layer_wise=False,
            consecutive_positions=False, causal_source=False,
        )

    Args:
        vocab_size, embed_dim, depth, num_heads, mlp_dim, segments: as in `PartialAttentionLM`;
            depth is that of the encoder and that of the decoder.
        joint_attention, share_parameters, layer_wise, consecutive_positions, causal_source: the
            switches.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        *,
        mlp_dim: int | None = None,
        segments: bool = True,
        joint_attention: bool = True,
        share_parameters: bool = True,
        layer_wise: bool = True,
        consecutive_positions: bool = True,
        causal_source: bool = True,
    ) -> None:
        super().__init__()
        self.joint_attention, self.layer_wise = joint_attention, layer_wise
        self.consecutive_positions, self.causal_source = consecutive_positions, causal_source
        self.words = nn.Embedding(vocab_size, embed_dim)
        self.segments = nn.Embedding(2, embed_dim) if segments else None
        width = 4 * embed_dim if mlp_dim is None else mlp_dim

        def stack() -> nn.ModuleList:
            layers = range(depth)
            return nn.ModuleList(
                DecoderBlock(embed_dim, num_heads, layer, None, "pre", width) for layer in layers
            )

        self.blocks = stack()
        self.encoder: nn.ModuleList | None = None if share_parameters else stack()
        self.cross: nn.ModuleList | None = None
        if not joint_attention:
            self.cross = nn.ModuleList(
                PartialAttention(embed_dim, num_heads, source_map="identity") for _ in range(depth)
            )
            self.cross_norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        nn.init.normal_(self.words.weight, std=embed_dim**-0.5)
        if self.segments is not None:
            nn.init.normal_(self.segments.weight, std=embed_dim**-0.5)

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        target: Int[Tensor, "batch target"],
        source_mask: Bool[Tensor, "batch source"] | None = None,
    ) -> SourceTargetLogits:
        """Logits of source and target.

        Args:
            source: padded at its end.
            target: what has been generated; padding at its end sees and disturbs nothing.
            source_mask: True for source tokens; all by default.

        Raises:
            ValueError: for a mask of another shape, or with padding before a token.
        """
        if source_mask is None:
            source_mask = torch.ones_like(source, dtype=torch.bool)
        if source_mask.shape != source.shape or bool(
            (source_mask.diff(dim=1) & source_mask[:, 1:]).any()
        ):
            raise ValueError(
                f"source_mask: expected {list(source.shape)} with the padding at the end, got "
                f"{list(source_mask.shape)} or padding before a token."
            )
        places = torch.arange(source.shape[1], device=source.device).expand(source.shape)
        states = self._encode(self._embed(source, places, 0), source_mask)
        start = source_mask.sum(1, keepdim=True) if self.consecutive_positions else 0
        places = torch.arange(target.shape[1], device=target.device).expand(target.shape) + start
        hidden = self._embed(target, places, 1)
        count = target.shape[1]
        past = torch.ones(count, count, dtype=torch.bool, device=target.device).tril()
        joint = torch.cat(
            [
                source_mask[:, None, None, :].expand(-1, 1, count, -1),
                past[None, None].expand(len(target), 1, -1, -1),
            ],
            -1,
        )
        for layer, block in enumerate(cast(list[DecoderBlock], list(self.blocks))):
            seen = states[layer if self.layer_wise else -1]
            if self.cross is None:
                hidden = hidden + self._joint(block, hidden, seen, joint)
            else:
                hidden = hidden + block.attention(block.attention_norm(hidden), past[None, None])
                asked = self.cross_norms[layer](hidden)
                hidden = hidden + self.cross[layer](asked, seen, source_mask)
            hidden = hidden + block.mlp(block.mlp_norm(hidden))
        table = self.words.weight.T
        return SourceTargetLogits(self.norm(states[-2]) @ table, self.norm(hidden) @ table)

    def _encode(self, hidden: Tensor, source_mask: Tensor) -> list[Tensor]:
        """What goes into each layer, what comes out of the last, and that after the norm."""
        length = hidden.shape[1]
        visible = source_mask[:, None, :].expand(-1, length, -1)
        if self.causal_source:
            visible = visible.tril()
        itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
        mask = (visible | (itself & ~source_mask[:, :, None]))[:, None]
        states = [hidden]
        stack = self.blocks if self.encoder is None else self.encoder
        for block in stack:
            states.append(block(states[-1], mask, None))
        return [*states, self.norm(states[-1])]

    def _joint(self, block: DecoderBlock, hidden: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        """One softmax over source and target, with the projections of the block's attention."""
        attention, norm = block.attention, block.attention_norm
        query, key, value = attention.project(norm(hidden))
        _, source_key, source_value = attention.project(norm(seen))
        output = scaled_dot_product_attention(
            query,
            torch.cat([source_key, key], 2),
            torch.cat([source_value, value], 2),
            attn_mask=mask,
        )
        return attention.out_proj(output.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _embed(self, tokens: Tensor, positions: Tensor, segment: int) -> Tensor:
        hidden: Tensor = self.words(tokens)
        hidden = hidden + sinusoids(positions, hidden.shape[-1]).to(hidden.dtype)
        if self.segments is None:
            return hidden
        return hidden + self.segments.weight[segment]
