"""The map read by columns: keys ask and queries answer.

A column sum needs every row's normaliser first. With it, the column is itself an attention, the
roles exchanged: *keys ask and queries answer* with the bias `log w[i] - lse[i]`,

    sum_i w[i] p[i, j] = exp(LSE_i(s[i, j] + log w[i] - lse[i]))

and what the exchanged attention returns as its output is the mean, over the queries that look at
the key, of any per-query feature. Under `is_causal` both sequences are read backwards, which makes
the exchanged map causal again. One fused pass, O(tokens) memory.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.kernels import CHUNK_BYTES
from attending.core.state import AttentionState, attend, merge, reweigh
from attending.core.statistics._call import Call


def check_weights(query_weights: Tensor | None, call: Call) -> Tensor | None:
    if query_weights is None:
        return None
    full = tuple(call.query.shape[:3])
    fits = 1 <= query_weights.dim() <= 3 and all(
        size in (1, whole)
        for size, whole in zip(reversed(query_weights.shape), reversed(full), strict=False)
    )
    if not fits or query_weights.shape[-1] != full[-1]:
        raise ValueError(
            "query_weights: expected [queries], or leading dimensions that broadcast to [batch, "
            f"heads, queries] = {list(full)}, got {list(query_weights.shape)}."
        )
    weights = query_weights.to(call.query.dtype)
    if not torch.compiler.is_compiling() and bool((weights < 0).any()):
        raise ValueError("query_weights: expected weights of at least 0, got a negative one.")
    return weights.expand(full)


def received_state(
    call: Call, lse: Tensor, log_weights: Tensor | None, features: Tensor
) -> AttentionState:
    """The exchanged attention: lse is the log of the mass that a key receives from the queries."""
    answer = lse.masked_fill(lse == -math.inf, math.inf).neg()
    if log_weights is not None:
        answer = answer + log_weights
    key = call.key.repeat_interleave(call.groups, 1)
    bias = call.bias
    if call.is_causal:
        return _received_causal(key, call.query, features, answer, call.scale)
    if bias is None or bias.shape[2] == 1:
        state = attend(key, call.query, features, key_bias=answer, scale=call.scale)
        # A bias per key is a bias per asking row now: it only shifts the row's lse.
        return state if bias is None else reweigh(state, bias.squeeze(2))
    # A mask for every pair is there already; its transpose is copied a block of keys at a time.
    keys = key.shape[2]
    step = max(1, CHUNK_BYTES // (4 * bias.shape[0] * bias.shape[1] * max(call.query.shape[2], 1)))
    blocks = []
    for start in range(0, keys, step):
        part = bias.expand(*bias.shape[:3], keys)[..., start : start + step]
        blocks.append(
            attend(
                key[:, :, start : start + step],
                call.query,
                features,
                bias=part.transpose(-1, -2).contiguous(),
                key_bias=answer,
                scale=call.scale,
            )
        )
    return AttentionState(*(torch.cat(parts, 2) for parts in zip(*blocks, strict=True)))


def _received_causal(
    key: Tensor, query: Tensor, features: Tensor, answer: Tensor, scale: float
) -> AttentionState:
    """Key j hears the queries i >= j: causal once both sequences are read backwards."""
    square = min(query.shape[2], key.shape[2])

    def backwards(tensor: Tensor) -> Tensor:
        return tensor[:, :, :square].flip(2)

    state = attend(
        backwards(key),
        backwards(query),
        backwards(features),
        key_bias=backwards(answer),
        is_causal=True,
        scale=scale,
    )
    state = AttentionState(state.output.flip(2), state.lse.flip(2))
    if query.shape[2] > square:
        # The queries beyond the last key see all keys.
        rest = attend(
            key,
            query[:, :, square:],
            features[:, :, square:],
            key_bias=answer[:, :, square:],
            scale=scale,
        )
        state = merge(state, rest)
    unseen = key.shape[2] - square
    if unseen == 0:
        return state
    return AttentionState(
        torch.nn.functional.pad(state.output, (0, 0, 0, unseen)),
        torch.nn.functional.pad(state.lse, (0, unseen), value=-math.inf),
    )


def bucket_columns(tokens: int, size: int) -> Float[Tensor, "tokens size"]:
    """One-hot rows: token t of n belongs to bucket `floor(t * size / n)`."""
    bucket = torch.arange(tokens) * size // max(tokens, 1)
    return torch.nn.functional.one_hot(bucket, size).float()


def pool(by_bucket: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """[batch, heads, size, size] of the mass that each bucket of queries gives to each key."""
    columns = bucket_columns(by_bucket.shape[-1], rows.shape[1]).to(by_bucket)
    return bucket_means(by_bucket @ columns, rows, weight)


def bucket_means(sums: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Sums over the queries of each bucket, divided by the weight of those queries."""
    count = weight @ rows
    return sums / count.where(count > 0, torch.ones_like(count))[..., None]
