"""What is behind `attending.nn.reversed_attention`: the transposed product and its gradient."""

import torch
from jaxtyping import Bool
from torch import Tensor

from attending.core.masks import visible_entries
from attending.core.state import attend
from attending.core.statistics import received_features


class Reversed(torch.autograd.Function):
    """The transposed map times what is sent, with the gradient as ordinary attention."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, sent: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        return received_features(query, key, sent, bias, scale=scale)

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object
    ) -> None:
        query, key, sent, bias, scale = inputs
        ctx.save_for_backward(query, key, sent, bias)  # type: ignore[arg-type]
        ctx.scale = scale  # type: ignore[attr-defined]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, sent, bias = ctx.saved_tensors
        needs = [ctx.needs_input_grad[index] for index in (0, 1, 3)]
        query, key = query.detach(), key.detach()
        query.requires_grad_(needs[0])
        key.requires_grad_(needs[1])
        bias = None if bias is None else bias.detach().requires_grad_(needs[2])
        with torch.enable_grad():
            output = attend(query, key, grad.to(query.dtype), bias=bias, scale=ctx.scale).output
        wanted = [one for one, need in zip((query, key, bias), needs, strict=True) if need]
        found = torch.autograd.grad(output, wanted, sent.to(output.dtype)) if wanted else ()
        rest = iter(found)
        grads = [next(rest) if need else None for need in needs]
        return grads[0], grads[1], output.detach().to(sent.dtype), grads[2], None


def sender_shares(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The map, made: rows sum to 1, or are 0 where a sender may send to nobody."""
    scores = query @ key.mT * scale
    if bias is None:
        return scores.softmax(-1)
    scores = scores + bias
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def sender_gates(query: Tensor, sender_weights: Tensor | None) -> Tensor | None:
    """The weights as `[batch, heads, queries]`, at least in float32."""
    if sender_weights is None:
        return None
    full, shape = tuple(query.shape[:3]), tuple(sender_weights.shape)
    fits = 1 <= len(shape) <= 3 and all(
        size in (1, whole) for size, whole in zip(reversed(shape), reversed(full), strict=False)
    )
    if not fits or shape[-1] != full[-1]:
        raise ValueError(
            "sender_weights: expected [queries], or leading dimensions that broadcast to [batch, "
            f"heads, queries] = {list(full)}, got {list(shape)}."
        )
    return sender_weights.to(torch.promote_types(query.dtype, torch.float32)).expand(full)


def hidden_senders(
    bias: Tensor | None, query: Tensor, key: Tensor
) -> Bool[Tensor, "batch heads tokens"] | None:
    """The tokens hidden from all as keys, `[batch or 1, heads or 1, tokens]`; None if not known."""
    if bias is None or query.shape[2] != key.shape[2]:
        return None
    seen = visible_entries(bias).any(2)
    return None if bool(seen.all()) else ~seen.expand(*seen.shape[:2], query.shape[2])
