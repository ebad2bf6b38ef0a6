"""All statistics of a map at once, in blocks of rows that stay in the processor's cache.

A fused kernel multiplies twice, query by key and probabilities by value. Most statistics need the
first product alone: with the softmax of a block of rows in the cache, entropies, maxima and column
sums are a few passes over it, each some twentieths of the price of the product. So on a CPU all of
them together cost less than one `scaled_dot_product_attention`. The block is the only part of the
map that ever exists, and its size does not depend on the number of tokens.

There is no backward pass here; what needs a gradient goes through the fused kernels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attending.core.statistics._call import Call

# Of scores per thread. Measured on an AMD EPYC of 2023 (1 MB of second-level cache per core, and
# more behind it) with 1k to 16k keys: a quarter of it costs 30% more, twice as much gains nothing.
BLOCK_BYTES = 2**21
LEAST_ROWS = 32  # with fewer, the matrix product is slow


class Sweep(NamedTuple):
    """What one sweep found; None for what was not asked for.

    Attributes:
        lse, entropy, max_probability: [batch, heads, queries]; lse is -inf for an empty row, of
            which the others are 0.
        features: `sum_j p[i, j] features[j]`, [batch, heads, queries, features].
        received: `sum_i query_features[i] p[i, j]`, [batch, heads, query features, keys].
        by_bucket: the sum over the queries of each bucket of `weights[i] p[i, j]`,
            [batch, heads, size, keys].
        second_moment: `sum_j p[i, j]^2`, [batch, heads, queries].
    """

    lse: Tensor
    entropy: Tensor | None
    max_probability: Tensor
    features: Tensor | None
    received: Tensor | None
    by_bucket: Tensor | None
    second_moment: Tensor | None

    def mass(self) -> Tensor:
        """What each key receives, by the buckets or by the first query feature."""
        if self.by_bucket is not None:
            return self.by_bucket.sum(2)
        assert self.received is not None
        return self.received[..., 0, :]


def can_sweep(call: Call, *others: Tensor | None) -> bool:
    """Whether this is a CPU and nobody asks for a gradient or a graph to compile."""
    if call.query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    tensors = (call.query, call.key, call.bias, *others)
    return not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def sweep(
    call: Call,
    *,
    entropy: bool = False,
    second_moment: bool = False,
    features: Tensor | None = None,
    query_features: Tensor | None = None,
    size: int | None = None,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
) -> Sweep:
    """One sweep over the map.

    Args:
        call: what the map is made of.
        entropy, second_moment: whether those of the rows are wanted.
        features: [batch, kv_heads, keys, features].
        query_features: [batch, heads, queries, query features].
        size: the number of buckets of queries for `by_bucket`.
        weights: of the queries in `by_bucket`, [batch, heads, queries]; 1 by default.
        lse: to normalise `received` and `by_bucket` by, in place of the lse of the rows.
    """
    batch, heads, queries, _ = call.query.shape
    keys = call.key.shape[2]
    # A part that all keys share shifts a row's scores by a constant, which costs digits.
    mean = call.key.mean(2, keepdim=True) if keys else call.key.new_zeros(1, 1, 1, 1)
    key = call.key - mean
    shift = (call.query * mean.repeat_interleave(call.groups, 1)).sum(-1) * call.scale
    new = call.query.new_zeros
    found = Sweep(
        lse=new(batch, heads, queries),
        entropy=new(batch, heads, queries) if entropy else None,
        max_probability=new(batch, heads, queries),
        features=None if features is None else new(batch, heads, queries, features.shape[-1]),
        received=None
        if query_features is None
        else new(batch, heads, query_features.shape[-1], keys),
        by_bucket=None if size is None else new(batch, heads, size, keys),
        second_moment=new(batch, heads, queries) if second_moment else None,
    )
    if found.lse.numel() == 0 or keys == 0:
        found.lse.fill_(-math.inf)
        return found
    budget = BLOCK_BYTES * torch.get_num_threads() // call.query.element_size()
    rows = max(LEAST_ROWS, budget // keys)
    if call.is_causal:  # what lies above the diagonal of a block is computed in vain
        rows = min(rows, max(LEAST_ROWS, queries // 16))
    rows = min(queries, rows)
    together = min(heads, max(1, budget // (rows * keys)))
    buffers = new(2, together * rows * keys)
    for item in range(batch):
        for head in range(0, heads, together):
            part = (item, slice(head, min(heads, head + together)))
            kv = (item, torch.arange(heads)[part[1]] // call.groups if call.groups > 1 else part[1])
            _sweep_heads(
                Sweep(*(None if tensor is None else tensor[part] for tensor in found)),  # type: ignore[arg-type]
                buffers,
                rows,
                # Models pass views in which the heads of a token lie side by side.
                (call.query[part] * call.scale).contiguous(),
                key[kv].contiguous(),
                _part_of_bias(call, part),
                call.is_causal,
                None if features is None else features[kv].transpose(-1, -2),
                None if query_features is None else query_features[part].transpose(-1, -2),
                None if weights is None else weights[part],
                None if lse is None else lse[part] - shift[part],
            )
    found.lse.add_(shift)
    return found


def _sweep_heads(
    found: Sweep,
    buffers: Tensor,
    rows: int,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    features: Tensor | None,
    query_features: Tensor | None,
    weights: Tensor | None,
    lse: Tensor | None,
) -> None:
    """Fill in what is asked for of a few heads; [heads, ...], the features transposed."""
    heads, queries, _ = query.shape
    keys = key.shape[1]
    key = key.transpose(-1, -2)
    above = torch.ones(rows, rows, dtype=torch.bool).triu(1) if is_causal else None
    for start in range(0, queries, rows):
        stop = min(queries, start + rows)
        seen = min(keys, stop) if is_causal else keys
        shape = (heads, stop - start, seen)
        scores, p = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
        torch.bmm(query[:, start:stop], key[..., :seen], out=scores)
        if bias is not None:
            scores += bias[:, start:stop, :seen]
        if above is not None and start < seen:
            diagonal = scores[..., start:]
            diagonal.masked_fill_(above[: stop - start, : seen - start], -math.inf)
        highest = scores.amax(-1, keepdim=True)
        empty = None
        if bias is not None:
            empty = highest == -math.inf
            highest = highest.masked_fill(empty, 0.0)
        scores.sub_(highest)
        torch.softmax(scores, -1, out=p)
        if empty is not None:
            p.masked_fill_(empty, 0.0)
        top = p.amax(-1)
        found.max_probability[:, start:stop] = top
        log_total = top.log_().neg_()
        own = torch.add(log_total, highest.squeeze(-1), out=found.lse[:, start:stop])
        if empty is not None:
            own.masked_fill_(empty.squeeze(-1), -math.inf)
        if found.features is not None and features is not None:
            # In this order the product is four times as fast where features are few.
            found.features[:, start:stop] = (features[..., :seen] @ p.transpose(-1, -2)).transpose(
                -1, -2
            )
        factor = None if lse is None else _renormalise(own, lse[:, start:stop])
        if found.received is not None and query_features is not None:
            asking = query_features[..., start:stop]
            found.received[..., :seen] += (
                asking if factor is None else asking * factor[:, None]
            ) @ p
        if found.by_bucket is not None:
            size = found.by_bucket.shape[1]
            bucket = torch.arange(start, stop) * size // queries
            first, last = int(bucket[0]), int(bucket[-1])
            one_hot = (bucket == torch.arange(first, last + 1)[:, None]).to(p).expand(heads, -1, -1)
            for multiplier in (factor, None if weights is None else weights[:, start:stop]):
                one_hot = one_hot if multiplier is None else one_hot * multiplier[:, None]
            found.by_bucket[:, first : last + 1, :seen] += one_hot @ p
        if found.entropy is not None:
            # A hidden key is not to give 0 * -inf, which is NaN.
            if bias is not None:
                scores.clamp_min_(-1e30)
            elif above is not None and start < seen:
                diagonal.clamp_min_(-1e30)
            mean_score = torch.mul(p, scores, out=scores).sum(-1)
            rows_entropy = log_total.sub_(mean_score).clamp_min_(0.0)
            if empty is not None:
                rows_entropy.masked_fill_(empty.squeeze(-1), 0.0)
            found.entropy[:, start:stop] = rows_entropy
        if found.second_moment is not None:
            found.second_moment[:, start:stop] = p.square_().sum(-1)


def _part_of_bias(call: Call, part: tuple[int, slice]) -> Tensor | None:
    if call.bias is None:
        return None
    return call.bias.expand(*call.query.shape[:3], call.key.shape[2])[part]


def _renormalise(own: Tensor, given: Tensor) -> Tensor:
    """What makes probabilities under the lse of their row those under another one."""
    ignored = given == -math.inf
    return (own - given.masked_fill(ignored, math.inf)).exp()
