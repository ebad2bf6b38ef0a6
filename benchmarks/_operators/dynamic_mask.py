"""Dynamic mask attention as its official code has it (2508.02124), for `operators.py`.

That is transformers' Doge with SDPA: scores of the values spread over the whole map, the causal
mask, a top-w for each row, and SDPA with the mask that results. The weights of the scores are fixed
random numbers; to make the scores is part of the time of all contenders.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softplus

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from attending.nn.dynamic_mask import dynamic_mask, dynamic_mask_attention, value_scores

WINDOW = 256


@lru_cache(maxsize=1)
def _parameters(heads: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(heads, heads * dim, generator=generator) * (heads * dim) ** -0.5
    return weight, torch.full((heads,), 0.5)


def _scores(value: Tensor) -> Tensor:
    return value_scores(value, *_parameters(value.shape[1], value.shape[3]))


def ours(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Gathered keys for blocks of rows."""
    return dynamic_mask_attention(query, key, value, _scores(value), WINDOW, is_causal=is_causal)


def straightforward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The mask of the whole map, by a top-w for each row."""
    weight, gate = _parameters(value.shape[1], value.shape[3])
    delta = softplus(value.transpose(1, 2).flatten(2) @ weight.T) * gate
    tokens = query.shape[2]
    rows = delta.exp().transpose(1, 2)[:, :, None].expand(-1, -1, tokens, -1)
    if is_causal:
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        rows = rows.masked_fill(future, -torch.inf)
    if tokens > WINDOW:
        kept = torch.zeros_like(rows, dtype=torch.bool)
        kept = kept.scatter(-1, rows.topk(WINDOW, dim=-1, sorted=False).indices, True)
        rows = rows.masked_fill(~kept, -torch.inf)
    output: Tensor = scaled_dot_product_attention(query, key, value, attn_mask=rows)
    return output


def kept_blocks(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The blocks of the map in which anything is kept, by the engine of block-sparse attention.

    It has no gradient of the scores, so that its backward pass does less.
    """
    delta = _scores(value).detach()
    mask = dynamic_mask(delta, WINDOW, is_causal).expand(*query.shape[:3], key.shape[2])
    plan = BlockPlan.from_mask(mask, block_size=128)
    bias = delta[:, :, None].masked_fill(~mask, -torch.inf)
    return block_sparse_attention(query, key, value, plan, bias=bias).output
