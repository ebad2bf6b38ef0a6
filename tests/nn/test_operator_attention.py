"""The layer around an operator: that of PyTorch, where the operator is softmax attention."""

import functools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attending.nn.flow_attention import flow_attention
from attending.nn.operator_attention import OperatorAttention


def test_around_softmax_it_is_that_of_pytorch() -> None:
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    ours = OperatorAttention(16, 4, scaled_dot_product_attention)
    with torch.no_grad():
        torch.nn.init.normal_(theirs.in_proj_bias)
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(16 * index, 16 * (index + 1))
            getattr(ours, name).weight.copy_(theirs.in_proj_weight[rows])
            getattr(ours, name).bias.copy_(theirs.in_proj_bias[rows])
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    hidden, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(hidden), theirs(hidden, hidden, hidden)[0])
    torch.testing.assert_close(ours(hidden, memory), theirs(hidden, memory, memory)[0])
    visible = torch.rand(5, 5).tril() + torch.eye(5) > 0.3
    expected = theirs(hidden, hidden, hidden, attn_mask=~visible)[0]
    torch.testing.assert_close(ours(hidden, attn_mask=visible), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_with_flow_attention_and_groups(kv_heads: int) -> None:
    operator = functools.partial(flow_attention, clamp=5.0)
    layer = OperatorAttention(16, 4, operator, num_kv_heads=kv_heads, kdim=6, vdim=3)
    hidden, key, value = torch.randn(2, 5, 16), torch.randn(2, 5, 6), torch.randn(2, 5, 3)
    before = layer(hidden, key, value, is_causal=True)
    hidden[:, 3:] = 0
    after = layer(hidden, key, value, is_causal=True)
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.equal(after[:, 3:], before[:, 3:])
    mask = torch.tensor([True, True, True, False, False])[None, None, None]
    cut = layer(hidden[:, :3], key[:, :3], value[:, :3])
    torch.testing.assert_close(layer(hidden, key, value, attn_mask=mask)[:, :3], cut)


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        OperatorAttention(10, 3, flow_attention)
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor"):
        OperatorAttention(12, 6, flow_attention, num_kv_heads=4)
