"""Reversed attention with a map, as its paper has it (2304.03282), for `operators.py`."""

from torch import Tensor

from attending.nn.reversed_attention import reversed_attention


def ours(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Two passes with exchanged roles; there is no causal form."""
    return reversed_attention(query, key, value, is_causal=is_causal)


def straightforward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The map, transposed, times what is sent."""
    if is_causal:
        raise NotImplementedError("reversed attention has no causal form")
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    sent: Tensor = scores.softmax(-1).transpose(-1, -2) @ value
    return sent
