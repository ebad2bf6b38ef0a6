"""Masks and positions of sequences that are a source followed by a target, batched.

For sequence-to-sequence use of one decoder: translation, summaries, answers over a document. What
each token may look at, and where it is, depends on the length of its own sample's source:

                        source tokens see          target tokens see
    prefix-LM           all of the source          the source, and the target before them
    causal LM           the source before them     likewise

    layout = source_target_layout(source_lengths, num_tokens=tokens.shape[1])
    attention(query, key, value, attn_mask=layout.attend_mask[:, None])
    model(input_ids=tokens, attention_mask=layout.attend_mask[:, None],
          position_ids=layout.position_ids)                               # transformers

Source: Fu et al., "Decoder-Only or Encoder-Decoder?" (2304.04052); the paper's body was not at
hand, so the prefix-LM mask, the restarted positions and the segments are as third-party code has
them (christianThardy/Partial-Attention-Language-Model) [3rd]. That code uses the longest source of
the batch for all samples, so that in shorter ones the partial attention sees target tokens;
`source_mask` here is each sample's own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class SourceTargetLayout(NamedTuple):
    """Who may look where in a batch of sources and targets.

    Attributes:
        attend_mask: for self-attention, True where a token (second dimension) may look at another
            (third). Padding is seen by none; it sees itself, so that no row is empty.
        position_ids: of each token; 0 for padding.
        segment_ids: 0 for source (and padding), 1 for target.
        source_mask: which tokens are source: the keys of partial attention.
        target_mask: which are target.
        bidirectional_source: whether source tokens see the source after them. Then they must not be
            trained to predict it.
        restart_positions: whether the target counts from 0 again.
    """

    attend_mask: Bool[Tensor, "batch tokens tokens"]
    position_ids: Int[Tensor, "batch tokens"]
    segment_ids: Int[Tensor, "batch tokens"]
    source_mask: Bool[Tensor, "batch tokens"]
    target_mask: Bool[Tensor, "batch tokens"]
    bidirectional_source: bool
    restart_positions: bool


def source_target_layout(
    source_lengths: Int[Tensor, " batch"] | Sequence[int],
    num_tokens: int | None = None,
    *,
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    bidirectional_source: bool = True,
    restart_positions: bool = True,
) -> SourceTargetLayout:
    """The layout of a batch in which each sample has a source of its own length.

    Args:
        source_lengths: how many of the first tokens of each sample, padding not counted, are
            source. 0 is allowed: all is target.
        num_tokens: tokens per row, if there is no padding.
        attention_mask: 1 for tokens, 0 for padding on either side; instead of `num_tokens`.
        bidirectional_source: a prefix-LM; False is a causal language model.
        restart_positions: count the target from 0 again. Source token k and target token k then
            have the same position, which rotary positions of a pretrained model have not learned:
            take False for those.

    Raises:
        ValueError: for lengths below 0 or above the tokens of their sample, or without exactly one
            of `num_tokens` and `attention_mask`.
    """
    if (num_tokens is None) == (attention_mask is None):
        raise ValueError(
            "num_tokens, attention_mask: expected exactly one of them, got "
            f"{'neither' if num_tokens is None else 'both'}."
        )
    device = None
    if attention_mask is not None:
        device = attention_mask.device
    elif isinstance(source_lengths, Tensor):
        device = source_lengths.device
    lengths = torch.as_tensor(source_lengths, device=device)
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            "source_lengths: expected whole numbers [batch], got "
            f"{lengths.dtype} {list(lengths.shape)}."
        )
    if attention_mask is None:
        real = torch.ones(len(lengths), num_tokens or 0, dtype=torch.bool, device=device)
    else:
        real = attention_mask.bool()
    if real.dim() != 2 or len(real) != len(lengths):
        raise ValueError(
            f"attention_mask: expected [batch, tokens] with {len(lengths)} samples, as there are "
            f"source_lengths, got {list(real.shape)}."
        )
    counts = real.sum(1)
    if bool((lengths < 0).any()) or bool((lengths > counts).any()):
        raise ValueError(
            "source_lengths: expected from 0 to the tokens of each sample, "
            f"{counts.tolist()}, got {lengths.tolist()}."
        )
    number = real.cumsum(1) - 1  # of the token within its sample
    source = real & (number < lengths[:, None])
    target = real & ~source
    past = number[:, :, None] >= number[:, None, :]
    visible = past & real[:, None, :] & real[:, :, None]
    if bidirectional_source:
        visible = visible | (source[:, None, :] & source[:, :, None])
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=device)
    visible = visible | (itself & ~real[:, :, None])
    positions = number - lengths[:, None] * target if restart_positions else number
    return SourceTargetLayout(
        visible,
        positions.masked_fill(~real, 0),
        target.long(),
        source,
        target,
        bidirectional_source,
        restart_positions,
    )
