"""The causal sum that linear attention is made of, in chunks, and what its sums are taken in."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 64  # tokens; the work within a chunk is quadratic in it, the steps are tokens / CHUNK


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over tokens are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast would turn the float32 products within into bfloat16; here it is off."""
    return torch.autocast(tensor.device.type, enabled=False)


def causal_sum(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    before: Float[Tensor, "batch kv_heads dim value_dim"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """`sum_{j <= i} (query[i] . key[j]) value[j] + query[i] @ before`: the bare sum, in chunks.

    What causal methods are built of that divide or weigh in their own way; arguments are not
    checked. `heads` is a multiple of `kv_heads`.
    """
    with full_precision(query):
        grouped = query.unflatten(1, (key.shape[1], -1))  # [batch, kv_heads, group, tokens, dim]
        output: Tensor = _CausalSum.apply(  # type: ignore[no-untyped-call]
            grouped, key[:, :, None], value[:, :, None], False
        )
        if before is not None:
            output = output.to(before.dtype) + grouped.to(before.dtype) @ before[:, :, None]
    return output.flatten(1, 2).to(query.dtype)


class _CausalSum(torch.autograd.Function):
    """`output[i] = sum_{j <= i} (query[i] . key[j]) value[j]`, or over `j >= i` in reverse.

    All of `[batch, heads, group, tokens, dim]`: several queries at a place, or several keys.

    The gradients are three sums of the same kind: with `s[i, j] = grad[i] . value[j]`,
    `grad_query[i] = sum_{j <= i} s[i, j] key[j]`, and over i >= j, `grad_key[j] = sum_i s[i, j]
    query[i]` and `grad_value[j] = sum_i (query[i] . key[j]) grad[i]`. So the backward pass has the
    memory of the forward pass, and can be differentiated itself.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, reverse: bool) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.reverse = reverse
        return _sweep(query, key, value, reverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value = ctx.saved_tensors
        needs_query, needs_key, needs_value, _ = ctx.needs_input_grad
        there, back = ctx.reverse, not ctx.reverse
        sweep: Callable[[Tensor, Tensor, Tensor, bool], Tensor] = _CausalSum.apply
        return (
            sweep(grad, value, key, there) if needs_query else None,
            sweep(value, grad, query, back) if needs_key else None,
            sweep(key, query, grad, back) if needs_value else None,
            None,
        )


def _sweep(query: Tensor, key: Tensor, value: Tensor, reverse: bool) -> Tensor:
    batch, heads, asked, tokens, dim = query.shape
    offered, value_dim = key.shape[2], value.shape[-1]
    dtype = accumulation_dtype(query.dtype)
    output = query.new_empty(batch, heads, asked, tokens, value_dim)
    state = query.new_zeros(batch * heads, dim, value_dim, dtype=dtype)
    size = min(CHUNK, tokens)
    order = torch.arange(size, device=query.device)
    sees = order[:, None] <= order if reverse else order[:, None] >= order
    seen = sees.to(dtype).repeat(asked, offered)
    starts = range(0, tokens, CHUNK)
    with full_precision(query):
        for start in reversed(starts) if reverse else starts:
            stop = min(start + CHUNK, tokens)
            if stop - start < size:
                seen_here = sees[: stop - start, : stop - start].to(dtype).repeat(asked, offered)
            else:
                seen_here = seen
            # Several queries or keys at a place lie one after another, each with its own mask.
            queries, keys, values = (
                tensor[:, :, :, start:stop].to(dtype).flatten(2, 3).flatten(0, 1)
                for tensor in (query, key, value)
            )
            weights = torch.bmm(queries, keys.transpose(1, 2)).mul_(seen_here)
            if value_dim == 1:  # a CPU has no fast product with a single column, but with a row
                row = torch.bmm(state.transpose(1, 2), queries.transpose(1, 2))
                found = row.baddbmm_(values.transpose(1, 2), weights.transpose(1, 2))
            else:
                found = torch.bmm(queries, state).baddbmm_(weights, values)
            output[:, :, :, start:stop] = found.view(batch, heads, asked, stop - start, value_dim)
            state.baddbmm_(keys.transpose(1, 2), values)
    return output
