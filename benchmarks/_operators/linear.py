"""Linear attention as its paper writes it down (2006.16236), for `operators.py`; and of peers."""

import torch
from torch import Tensor
from torch.nn.functional import elu

from attending.nn.linear_attention import linear_attention


def ours(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """With the paper's features, elu + 1."""
    return linear_attention(elu(query) + 1, elu(key) + 1, value, is_causal=is_causal)


def straightforward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Equations 5 and 9 to 12: with a running sum of outer products where it is causal."""
    query, key = elu(query) + 1, elu(key) + 1
    if is_causal:
        outer = torch.einsum("bhtd,bhte->bhtde", key, value).cumsum(2)
        divisor = torch.einsum("bhtd,bhtd->bht", query, key.cumsum(2))
        return torch.einsum("bhtd,bhtde->bhte", query, outer) / divisor[..., None]
    divisor = torch.einsum("bhtd,bhd->bht", query, key.sum(2))
    return query @ (key.transpose(-1, -2) @ value) / divisor[..., None]


def fla_naive(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """What flash-linear-attention offers without a GPU: its chunked form in plain PyTorch."""
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn

    if not is_causal:
        raise NotImplementedError("fla has causal forms only")
    query, key, value = ((elu(query) + 1), (elu(key) + 1), value)
    found: Tensor = naive_chunk_linear_attn(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)), scale=1.0, normalize=True
    )
    return found.transpose(1, 2)
