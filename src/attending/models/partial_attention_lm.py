"""A small decoder for sequence-to-sequence tasks, with or without partial attention to the source.

One stack over source and target together; what makes it a causal language model, a prefix-LM or
PALM is the layout and whether the blocks have the second path:

| | `partial` | layout |
| --- | --- | --- |
| causal LM | False | `bidirectional_source=False, restart_positions=False` |
| prefix-LM | False | `bidirectional_source=True` |
| PALM | True | `bidirectional_source=True, restart_positions=True` |

    layout = source_target_layout(source_lengths, attention_mask=mask)
    logits = model(tokens, layout)
    loss = source_target_loss(logits, tokens, layout)
    made = model.generate(tokens, layout, max_new_tokens=20)

A block is self-attention, partial attention, feed-forward, in this order:

    "pre"     h += self(n1(h), mask);  h += partial(n2(h), h[source]);  h += mlp(n3(h))
    "post"    h = n1(h + self(h, mask));  h = n2(h + partial(h, h[source]));  h = n3(h + mlp(h))

with the source states of this very layer, not normalised in "pre", as in third-party code [3rd].

Source: Fu et al. (2304.04052). **A reconstruction**, see `attending.nn.partial_attention`: the
paper most likely has "post" [inferred]. Sinusoidal positions and learned segment embeddings; how
the paper encodes positions beyond "separately" is not known. Rows of padding hold numbers that mean
nothing.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attending.models._source_target_blocks import DecoderBlock, DecodingState, Norm, sinusoids
from attending.nn.partial_attention import SourceMap
from attending.nn.source_target_layout import SourceTargetLayout


class PartialAttentionLM(nn.Module):
    """A decoder over a source and a target.

    Args:
        vocab_size: number of tokens.
        embed_dim: width.
        depth: blocks.
        num_heads: heads of both attentions.
        partial: whether the blocks have partial attention. It brings `6 embed_dim**2` parameters a
            block (`4` with `source_map="identity"`).
        norm: "pre" or "post".
        source_map: of `PartialAttention`.
        mlp_dim: width of the feed-forward layers; `4 * embed_dim` by default. To compare at equal
            parameters give the model without partial attention `7 * embed_dim`.
        segments: whether source and target have an embedding that tells them apart.

    Raises:
        ValueError: for sizes that do not divide, or an unknown `norm`.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        *,
        partial: bool = True,
        norm: Norm = "pre",
        source_map: SourceMap = "silu_residual",
        mlp_dim: int | None = None,
        segments: bool = True,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f'norm: expected "pre" or "post", got {norm!r}.')
        self.words = nn.Embedding(vocab_size, embed_dim)
        self.segments = nn.Embedding(2, embed_dim) if segments else None
        self.blocks = nn.ModuleList(
            DecoderBlock(
                embed_dim,
                num_heads,
                layer,
                source_map if partial else None,
                norm,
                4 * embed_dim if mlp_dim is None else mlp_dim,
            )
            for layer in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim) if norm == "pre" else nn.Identity()
        nn.init.normal_(self.words.weight, std=embed_dim**-0.5)
        if self.segments is not None:
            nn.init.normal_(self.segments.weight, std=embed_dim**-0.5)

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], layout: SourceTargetLayout
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits at every token, source and target. The head is the table of words."""
        return self.logits(self.run(self.embed(tokens, layout), layout))

    def embed(
        self, tokens: Int[Tensor, "batch tokens"], layout: SourceTargetLayout
    ) -> Float[Tensor, "batch tokens dim"]:
        """What goes into the first block: word, position and segment.

        Raises:
            ValueError: for a layout of another size.
        """
        if tokens.shape != layout.position_ids.shape:
            raise ValueError(
                f"layout: expected that of tokens {list(tokens.shape)}, got one for "
                f"{list(layout.position_ids.shape)}."
            )
        return self._embed(tokens, layout.position_ids, layout.segment_ids)

    def run(
        self, hidden: Float[Tensor, "batch tokens dim"], layout: SourceTargetLayout
    ) -> Float[Tensor, "batch tokens dim"]:
        """The blocks and the last norm, on embeddings; for gradients and perturbations of them."""
        return self._run(hidden, layout, None)

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of final states."""
        return hidden @ self.words.weight.T

    def prefill(
        self, tokens: Int[Tensor, "batch tokens"], layout: SourceTargetLayout
    ) -> tuple[Float[Tensor, "batch vocab"], DecodingState]:
        """Read a prompt: the source, and the beginning of a target if there is one.

        Returns:
            The logits of the token after each sample's last one, and what decoding needs.
        """
        state = DecodingState.of(layout, len(self.blocks))
        hidden = self._run(self.embed(tokens, layout), layout, state)
        number = torch.arange(tokens.shape[1], device=tokens.device)
        last = (number * state.visible).argmax(1)
        return self.logits(hidden[torch.arange(len(tokens)), last]), state

    def step(
        self, tokens: Int[Tensor, " batch"], state: DecodingState
    ) -> Float[Tensor, "batch vocab"]:
        """Logits after one more target token each; the state moves on."""
        state.visible = torch.cat([state.visible, state.visible.new_ones(len(tokens), 1)], 1)
        segment = torch.ones_like(tokens)[:, None]
        hidden = self._embed(tokens[:, None], state.position[:, None], segment)
        state.position = state.position + 1
        mask = state.visible[:, None, None, :]
        for block, memory in zip(self.blocks, state.memories, strict=True):
            hidden = block(hidden, mask, memory, state)
        return self.logits(self.norm(hidden))[:, 0]

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch tokens"],
        layout: SourceTargetLayout,
        max_new_tokens: int,
        stop_token: int | None = None,
    ) -> Int[Tensor, "batch new"]:
        """Decode greedily, with a cache: the keys of the target, and those of the source once.

        Args:
            tokens: the prompt; at least one token of each sample is no padding.
            layout: of the prompt.
            max_new_tokens: how many to make.
            stop_token: a sample that has made it repeats it from then on.
        """
        logits, state = self.prefill(tokens, layout)
        made: list[Tensor] = []
        stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for number in range(max_new_tokens):
            token = logits.argmax(-1)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = stopped | (token == stop_token)
            made.append(token)
            if bool(stopped.all()) or number + 1 == max_new_tokens:
                break
            logits = self.step(token, state)
        return torch.stack(made, 1) if made else tokens[:, :0]

    def _embed(self, tokens: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        hidden: Tensor = self.words(tokens)
        hidden = hidden + sinusoids(positions, hidden.shape[-1]).to(hidden.dtype)
        return hidden if self.segments is None else hidden + self.segments(segments)

    def _run(
        self, hidden: Tensor, layout: SourceTargetLayout, state: DecodingState | None
    ) -> Tensor:
        mask = layout.attend_mask[:, None]
        for block in self.blocks:
            hidden = block(hidden, mask, layout.source_mask, state)
        return self.norm(hidden)  # type: ignore[no-any-return]


def source_target_loss(
    logits: Float[Tensor, "batch tokens vocab"],
    tokens: Int[Tensor, "batch tokens"],
    layout: SourceTargetLayout,
    source_weight: float = 0.0,
    source_objective: Literal["own", "next"] = "own",
) -> Float[Tensor, ""]:
    """`L_target + source_weight * L_source`, each a mean over tokens, in nats.

    Args:
        logits: at every token.
        tokens: what was read. A target token is predicted from the token before it.
        layout: which tokens are what.
        source_weight: of the source auto-encoding; 0.5 in the third-party code [3rd].
        source_objective: "own", each source token from its own final state, as the third-party PALM
            has it; "next", the language-model loss on the source, as an LM has it. In the paper
            auto-encoding of the source belongs to the regularised encoder-decoder; whether its PALM
            keeps it is not known.

    Raises:
        ValueError: for "next" in a layout in which source tokens see those after them, an unknown
            objective, or a batch without any target token to predict.
    """
    if source_objective not in ("own", "next"):
        raise ValueError(f'source_objective: expected "own" or "next", got {source_objective!r}.')
    following = following_tokens(layout)
    losses = cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    before = logits[:, :-1].transpose(1, 2)
    shifted = cross_entropy(before, tokens[:, 1:], reduction="none")
    chosen = following & layout.target_mask[:, 1:]
    if not bool(chosen.any()):
        raise ValueError(
            "layout: expected target tokens with a token before them, got none in the batch."
        )
    loss = shifted[chosen].mean()
    if not source_weight:
        return loss
    if source_objective == "own":
        return loss + source_weight * losses[layout.source_mask].mean()
    if layout.bidirectional_source:
        raise ValueError(
            'source_objective: expected "own" in a layout with a bidirectional source, whose '
            'tokens see those after them, got "next".'
        )
    return loss + source_weight * shifted[following & layout.source_mask[:, 1:]].mean()


def following_tokens(layout: SourceTargetLayout) -> Bool[Tensor, "batch rest"]:
    """Of all columns but the first: whether there is a token here and one before it."""
    real = layout.source_mask | layout.target_mask
    return real[:, 1:] & real[:, :-1]
