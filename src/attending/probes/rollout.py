"""Attention rollout: how much of an output token comes from which input token, through all layers.

Abnar and Zuidema (2020, arXiv 2005.00928) follow attention through the depth of a model, half of
each block going through attention and half past it, along the residual connection:

    A'_l    = (mean over heads of A_l + I) / 2
    rollout = A'_L ... A'_2 A'_1              row i: where token i at the end comes from

Rows of this product are needed, and seldom all: that of the class token, or of the last one. A row
e_i is carried from the last layer down to the first, `r <- r A'_l`, and `r A_l` is what the keys
receive from queries with the weights r (`attending.statistics.received_features`). So neither a map
nor a product of maps is ever stored; memory grows with the number of tokens.

That works for the mean over heads alone. Fusing heads by the maximum or minimum, or dropping the
smallest entries first, as code for vision transformers does, needs the maps themselves.

Rollout is a heuristic: what values, output projections and MLPs do to the tokens plays no part.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attending.core.statistics import received_features, row_summary
from attending.taps import AttentionCall, tap
from attending.taps.running import evaluating, run_model

Queries = int | Sequence[int] | Int[Tensor, " chosen"] | Int[Tensor, "batch chosen"]


def attention_rollout(
    model: nn.Module,
    inputs: Any,
    *,
    queries: Queries | None = None,
    head_fusion: str = "mean",
    residual: float = 0.5,
) -> Float[Tensor, "batch chosen tokens"]:
    """Rollout of a model on one batch: what chosen tokens at the end have of each at the start.

        with a BERT or ViT:     attention_rollout(model, inputs, queries=0)       # the class token
        with a language model:  attention_rollout(model, inputs, queries=-1)      # the last token

    The model runs once, in evaluation mode and without gradients, and is then what it was. The
    queries and keys of all its layers are kept until the end.

    Beside the forward it costs one to three passes over the attention of every layer, as long as
    there are no more queries than a head has dimensions; many more cost in proportion.

    Args:
        model: an encoder or decoder whose attention is self-attention over one sequence. For a
            model with several (a text and a vision tower, an encoder and a decoder) pass the part,
            or choose among the calls of a tap yourself and use `rollout_of_calls`.
        inputs: a mapping of the model's arguments, a tuple of positional ones, or a tensor.
        queries: which tokens at the end: one index, several, or a tensor `[batch, chosen]` if they
            differ among the sequences. Negative ones count from the end, padding included. None
            is all of them, which makes a result of tokens x tokens.
        head_fusion: "mean", the only one that needs no map.
        residual: the share that goes past attention, 0.5 in the paper.

    Returns:
        `[batch, chosen, tokens]`, at least in float32. Rows are not negative and sum to 1; padding
        gets 0 from every token that is none.

    Raises:
        ValueError: for arguments that are not as above, and for a model of which no rollout is
            defined; the message says why.
        attending.taps.TapError: if the tap saw no attention call; the message says what to set.
    """
    _check_fusion(head_fusion)
    _check_residual(residual)
    calls: list[AttentionCall]
    with evaluating(model), torch.no_grad(), tap(model) as calls:
        run_model(model, inputs)
    _check_one_tower(calls)
    return rollout_of_calls(calls, queries=queries, head_fusion=head_fusion, residual=residual)


def rollout_of_calls(
    calls: Sequence[AttentionCall],
    *,
    queries: Queries | None = None,
    head_fusion: str = "mean",
    residual: float = 0.5,
) -> Float[Tensor, "batch chosen tokens"]:
    """Rollout through calls that a tap recorded, in their order, which need not be all of a model.

        with tap(model) as calls, torch.no_grad():
            model(**inputs)
        rollout_of_calls(calls[6:], queries=0)            # from the sixth layer on
        rollout_of_calls([call for call in calls if call.name.startswith("vision")], queries=0)

    Args:
        calls: self-attention calls over the same tokens, first layer first.
        queries, head_fusion, residual: as in `attention_rollout`.

    Returns:
        As `attention_rollout`.
    """
    _check_fusion(head_fusion)
    _check_residual(residual)
    _check_chain(calls)
    batch, tokens = calls[0].query.shape[0], calls[0].query_length
    device = calls[0].query.device
    chosen = _indices(queries, batch, tokens, device)
    dtype = torch.promote_types(calls[0].query.dtype, torch.float32)
    share = torch.zeros(batch, tokens, chosen.shape[1], dtype=dtype, device=device)
    share.scatter_(1, chosen[:, None], 1.0)  # transposed: tokens x chosen
    with torch.no_grad():
        for call in reversed(calls):
            share = _down(call, share, residual)
    return share.transpose(1, 2)


def _down(call: AttentionCall, share: Tensor, residual: float) -> Tensor:
    """`A'^T share`, `[batch, tokens, chosen]`, for the fused map A' of a layer."""
    arguments = (call.attn_mask, call.is_causal, call.softmax_scale, call.enable_gqa)
    alive = share.new_ones(1)
    if call.attn_mask is not None:
        lse = row_summary(call.query, call.key, None, *arguments).lse
        # The share of the heads in which a row attends to something; rows of A' shall sum to 1.
        alive = (lse > -torch.inf).to(share).mean(1)[..., None]
    total = residual + (1 - residual) * alive
    share = share / total.where(total > 0, torch.ones_like(total))
    # All heads of a part together are no larger than the result, or than the queries.
    step = max(call.query.shape[-1], share.shape[2] // call.num_heads)
    attended = [
        received_features(call.query, call.key, part[:, None], *arguments).mean(1)
        for part in share.split(step, 2)
    ]
    passed = share * residual
    if residual == 0.0:  # then a row that attends to nothing stays where it is
        passed = share.masked_fill(alive > 0, 0.0)
    return torch.cat(attended, 2) * (1 - residual) + passed


def _indices(
    queries: Queries | None, batch: int, tokens: int, device: torch.device
) -> Int[Tensor, "batch chosen"]:
    if queries is None:
        queries = torch.arange(tokens)
    chosen = torch.as_tensor([queries] if isinstance(queries, int) else queries, device=device)
    integer = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if (
        not integer
        or chosen.dim() not in (1, 2)
        or chosen.numel() == 0
        or (chosen.dim() == 2 and chosen.shape[0] not in (1, batch))
    ):
        raise ValueError(
            "queries: expected an index, a list of indices, or integers [batch, chosen] with batch "
            f"= {batch}, got {chosen.dtype} {list(chosen.shape)}."
        )
    if bool((chosen < -tokens).any()) or bool((chosen >= tokens).any()):
        raise ValueError(
            f"queries: expected indices from {-tokens} to {tokens - 1}, as there are {tokens} "
            f"tokens, got {int(chosen.min())} to {int(chosen.max())}."
        )
    return chosen.long().remainder(tokens).expand(batch, chosen.shape[-1])


def _check_fusion(head_fusion: str) -> None:
    if head_fusion != "mean":
        raise ValueError(
            f'head_fusion: expected "mean", got {head_fusion!r}. Another fusion is not linear in '
            "the maps of the heads, so it needs every map in full; this function never makes one. "
            "For short sequences make them with attending.core.reference.attention_map."
        )


def _check_residual(residual: float) -> None:
    if not 0.0 <= residual < 1.0:
        raise ValueError(f"residual: expected a share from 0 to below 1, got {residual}.")


def _check_chain(calls: Sequence[AttentionCall]) -> None:
    """A product of maps is defined if they are all over the same tokens."""
    if not calls:
        raise ValueError("calls: expected at least one AttentionCall, got none.")
    first = calls[0]
    for call in calls:
        if call.query.dim() != 4:
            raise ValueError(
                f"calls: expected tensors [batch, heads, tokens, dim], got {call!r}, whose batch "
                "or head dimension is missing or split."
            )
        if call.is_cross:
            raise ValueError(
                f"calls: expected self-attention, got {call!r}. Rollout follows one sequence; of a "
                "model with cross-attention use a part, such as model.get_encoder(), or choose "
                "calls and pass them to rollout_of_calls."
            )
        same = call.query.shape[0] == first.query.shape[0] and call.query_length == call.key_length
        if not same or call.query_length != first.query_length:
            raise ValueError(
                f"calls: expected {first.query.shape[0]} sequences of {first.query_length} queries "
                f"and as many keys, as in the first call, got {call!r}. Rollout multiplies maps "
                "over the same tokens: it is not defined across windows, pooling, another tower or "
                "a KV cache. Choose calls that fit and pass them to rollout_of_calls."
            )


def _check_one_tower(calls: Sequence[AttentionCall]) -> None:
    """Calls of one forward, and no layer comes after a later one of another part of the model."""
    if calls[-1].forward:
        raise ValueError(
            "inputs: expected one forward of the model, but it ran "
            f"{calls[-1].forward + 1} times. Pass one batch, and the model rather than a loop "
            "around it."
        )
    for before, call in pairwise(calls):
        if before.layer is None or call.layer is None or before.name == call.name:
            continue
        if call.layer < before.layer and not before.is_cross and not call.is_cross:
            raise ValueError(
                f"model: expected one stack of layers, got layer {call.layer} ({call.name}) after "
                f"layer {before.layer} ({before.name}). Pass the part of the model that is meant, "
                "or choose among the calls of a tap and pass them to rollout_of_calls."
            )
