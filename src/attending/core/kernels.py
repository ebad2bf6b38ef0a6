"""Where a state is computed: PyTorch's own fused kernels, a chunked one where they do not reach.

Every function here takes `(query, key, value, bias, is_causal, scale)` with equal head counts or
GQA groups and returns `(output, lse)`. What the kernels lack is added around them:

- **the gradient of lse**. The flash backward computes `ds = p * (do . v - delta)` with
  `delta = rowsum(do * o)`. One more value column, zero in `value`, 1 in `do` and `-dlse` in `o`,
  leaves `do . v` as it is and makes `delta` smaller by `dlse`: `ds = p * (dp - rowsum + dlse)`,
  in the same fused kernel;
- **empty rows**. The CPU kernel reports lse = 0 for a row without visible keys, others NaN; here
  such a row has output 0 and lse -inf;
- **other value dims**. Query and key or value are padded with zero columns, which change nothing.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor]]

CHUNK_BYTES = 2**25  # of scores that the chunked kernel holds at a time, at most
CACHE_BYTES = 2**21  # of them on a CPU, where that is enough for a product of matrices to be fast
FEW_ROWS = 32


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`(output, lse)` from the fastest kernel of the device that can do it exactly."""
    queries, dim = query.shape[2:]
    value_dim = value.shape[-1]
    if key.shape[2] == 0 or query.numel() == 0 or value_dim == 0:
        return _nothing(query, value)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return chunked_attention(query, key, value, bias, is_causal, scale)
    if query.device.type == "cpu":
        width, kernel, fill = max(dim, value_dim), _flash_cpu, False
    elif query.device.type == "cuda" and query.dtype != torch.float64:
        width, kernel, fill = -(-max(dim, value_dim) // 8) * 8, _cuda, True
    else:
        return chunked_attention(query, key, value, bias, is_causal, scale)
    empty = None if bias is None else _empty_rows(bias, is_causal, queries, key.shape[2])
    if bias is not None and empty is not None and fill:
        # Kernels other than the CPU's give NaN for empty rows: let them see their keys, then blank.
        bias = bias.masked_fill(empty[..., None], 0.0)
    output, lse = kernel(
        widened(query, width),
        widened(key, width),
        widened(value, width),
        bias,
        is_causal,
        scale,
    )
    output = output[..., :value_dim]
    if empty is not None:
        lse = lse.masked_fill(empty, -math.inf)
        if fill:
            output = output.masked_fill(empty[..., None], 0.0)
    return output, lse


def widened(tensor: Tensor, width: int) -> Tensor:
    """The tensor with columns of zeros up to that width. (`pad` copies even what is as wide.)"""
    missing = width - tensor.shape[-1]
    return pad(tensor, (0, missing)) if missing else tensor


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_zeros(*rows, value.shape[-1]), query.new_full(rows, -math.inf, dtype=dtype)


def _empty_rows(bias: Tensor, is_causal: bool, queries: int, keys: int) -> Tensor:
    """Which rows see no key: boolean, broadcasts to [batch, heads, queries]."""
    visible = bias > -math.inf
    if not is_causal:
        return ~visible.expand(*bias.shape[:3], keys).any(-1)
    if bias.shape[2] == 1:
        seen = visible.expand(*bias.shape[:3], keys).squeeze(2).cummax(-1).values
        last = torch.arange(queries, device=bias.device).clamp_max(keys - 1)
        return ~seen[..., last]
    return ~visible.expand(*bias.shape[:3], keys).tril().any(-1)


class _FlashCPU(torch.autograd.Function):
    """The CPU flash kernel, with the gradient of lse. Handles GQA, and a bias under `is_causal`."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        return output, lse

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object
    ) -> None:
        query, key, value, bias, is_causal, scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, bias, *output)  # type: ignore[arg-type, misc]
        ctx.is_causal, ctx.scale = is_causal, scale  # type: ignore[attr-defined]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
        query, key, value, bias, output, lse = ctx.saved_tensors
        cut = flash_cpu_gradients(
            query, key, value, bias, ctx.is_causal, ctx.scale, output, lse, grad_output, grad_lse
        )
        return *cut, None, None, None


def flash_cpu_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, ...]:
    """Of query, key and value, from the CPU flash kernel; all of one width."""
    tensors = _augment(query, key, value, output, grad_output, grad_lse)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    dims = (query.shape[-1], key.shape[-1], value.shape[-1])
    return tuple(g[..., :d].to(query.dtype) for g, d in zip(grads, dims, strict=True))


def _augment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(do, q, k, v, o)` for a flash backward that shall also see the gradient of lse."""
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_lse is None:
        return grad_output.contiguous(), query, key, value, output
    # The column carries -dlse through the output's dtype: half precision would round it.
    dtype = torch.promote_types(query.dtype, torch.float32)
    extra = -(-(query.shape[-1] + 1) // multiple) * multiple - query.shape[-1]
    ones = torch.ones_like(grad_lse, dtype=dtype)[..., None]
    column = -grad_lse.to(dtype)[..., None]
    return (
        pad(torch.cat([grad_output.to(dtype), ones], -1), (0, extra - 1)),
        pad(query.to(dtype), (0, extra)),
        pad(key.to(dtype), (0, extra)),
        pad(value.to(dtype), (0, extra)),
        pad(torch.cat([output.to(dtype), column], -1), (0, extra - 1)),
    )


def _flash_cpu(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    query, key, value = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
    )
    if bias is not None:
        # The kernel rounds a float32 bias by itself; it only refuses one wider than the query.
        bias = bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    given = (query, key, value, bias, is_causal, scale)
    if torch.is_grad_enabled():
        output, lse = _FlashCPU.apply(*given)  # type: ignore[no-untyped-call]
    else:
        output, lse = _FlashCPU.forward(*given)
    return output, lse


class _EfficientCUDA(torch.autograd.Function):
    """The memory-efficient CUDA kernel: any float but float64, biases, causal to the top left."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal, scale=scale
        )
        return result  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object
    ) -> None:
        query, key, value, bias, is_causal, scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, bias, *output)  # type: ignore[arg-type, misc]
        ctx.is_causal, ctx.scale = is_causal, scale  # type: ignore[attr-defined]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_lse, *_):  # type: ignore[no-untyped-def]
        query, key, value, bias, output, lse, seed, offset = ctx.saved_tensors
        if grad_lse is not None:
            grad_lse = grad_lse[..., : query.shape[2]]
        tensors = _augment(query, key, value, output, grad_output, grad_lse, multiple=8)
        if bias is not None:
            bias = bias.to(tensors[0].dtype)
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *tensors[:4],
            bias,
            tensors[4],
            lse,
            seed,
            offset,
            0.0,
            [True, True, True, False],
            ctx.is_causal,
            scale=ctx.scale,
        )
        dims = (query.shape[-1], key.shape[-1], value.shape[-1])
        cut = (g[..., :d].to(query.dtype) for g, d in zip(grads[:3], dims, strict=True))
        return *cut, None, None, None


def _cuda(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    if bias is not None:
        # The kernel wants rows that start at multiples of 16 bytes.
        keys = key.shape[2]
        padded = pad(bias.to(query.dtype).expand(*bias.shape[:3], keys), (0, -keys % 8))
        bias = padded[..., :keys].expand(*query.shape[:3], keys)
    result = _EfficientCUDA.apply(query, key, value, bias, is_causal, scale)  # type: ignore[no-untyped-call]
    output, lse, _, _ = result
    return output, lse[..., : query.shape[2]]


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Plain torch in blocks of rows: any device and dtype, and the gradient of a learned bias.

    The backward pass computes each block again, so memory stays bounded there too.
    """
    outputs, lses = zip(
        *map_rows(dense_rows, query, key, bias, is_causal, scale, value=value), strict=True
    )
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def map_rows(
    function: Callable[..., tuple[Tensor, ...]],
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    **tensors: Tensor,
) -> list[tuple[Tensor, ...]]:
    """Call `function(scores, **tensors)` on blocks of rows of the scores, in bounded memory.

    The tensors are per key, `[batch, kv_heads, keys, ...]`. Under `is_causal` a block has only the
    keys that its rows can see.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    step = _rows_at_once(4 * batch * heads * max(keys, 1), query.device)

    def block(
        start: int, query: Tensor, key: Tensor, bias: Tensor | None, rest: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        return function(row_scores(start, query, key, bias, is_causal, scale), **rest)

    results = []
    for start in range(0, queries, step):
        rows, seen = query[:, :, start : start + step], key
        part = bias if bias is None or bias.shape[2] == 1 else bias[:, :, start : start + step]
        rest = tensors
        if is_causal and start + step < keys:
            last = start + step
            seen, rest = key[:, :, :last], {name: one[:, :, :last] for name, one in tensors.items()}
            part = part if part is None or part.shape[3] == 1 else part[..., :last]
        if torch.is_grad_enabled():
            results.append(checkpoint(block, start, rows, seen, part, rest, use_reentrant=False))
        else:
            results.append(block(start, rows, seen, part, rest))
    return results


def _rows_at_once(row_bytes: int, device: torch.device) -> int:
    most = max(1, CHUNK_BYTES // row_bytes)
    return min(most, max(FEW_ROWS, CACHE_BYTES // row_bytes)) if device.type == "cpu" else most


def row_scores(
    start: int, query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Rows `start, start + 1, ...` of the scaled and biased scores, at least in float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.to(dtype).reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ key.to(dtype).transpose(-1, -2)).view(batch, heads, rows, keys) * scale
    if bias is not None:
        scores = scores + bias
    if is_causal:
        row = torch.arange(start, start + rows, device=query.device)[:, None]
        hidden = torch.arange(keys, device=query.device) > row
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def dense_rows(scores: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(output, lse)` of a block of rows; probabilities in place of the output without a value."""
    highest = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (highest + total.log()).masked_fill(empty, -math.inf).squeeze(-1)
    output = weights / total
    if value is not None:
        output = weigh(output, value).to(value.dtype)
    return output, lse


def weigh(weights: Tensor, value: Tensor) -> Tensor:
    """`weights @ value` in the dtype of the weights, where value may have fewer heads."""
    batch, heads, rows, keys = weights.shape
    grouped = weights.reshape(batch, value.shape[1], -1, keys)
    return (grouped @ value.to(weights.dtype)).view(batch, heads, rows, -1)
