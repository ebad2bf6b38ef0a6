"""The layer of dynamic mask attention: caches, padding, gradients at the start, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from attending.nn.dynamic_mask_attention import DynamicMaskAttention
from attending.nn.dynamic_mask_cache import DynamicMaskCache
from attending.nn.rotary import rotate
from tests.nn import reference_dynamic_mask as reference


def layer(**changes: object) -> DynamicMaskAttention:
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "keep_window": 4, "gate_init": 0.8, "dtype": torch.float64}
    return DynamicMaskAttention(16, 4, **{**options, **changes})


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def rotation(tokens: int, first: int = 0) -> tuple[Tensor, Tensor]:
    angles = torch.arange(first, first + tokens)[:, None] / torch.tensor([1.0, 7.0])
    angles = torch.cat([angles, angles], -1)[None].double()
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("score", ["exp", "linear"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_layer_is_its_definition(score: str, qk_norm: bool) -> None:
    one = layer(score=score, qk_norm=qk_norm, bias=True)
    hidden = torch.randn(2, 11, 16, dtype=torch.float64)
    turned = rotation(11)
    query, key, value = (
        proj(hidden).view(2, 11, -1, 4).transpose(1, 2)
        for proj in (one.q_proj, one.k_proj, one.v_proj)
    )
    if qk_norm:
        query, key = one.q_norm(query), one.k_norm(key)
    query, key = rotate(query, *turned), rotate(key, *turned)
    z = one.score_proj(value.transpose(1, 2).flatten(2)).transpose(1, 2)
    delta = one.gate[:, None] * torch.log(1 + z.exp())
    delta = delta.exp() if score == "exp" else delta
    causal = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    mask = reference.keep_mask(delta, causal, 4)
    expected = reference.attention(query, key, value, delta, mask)
    expected = one.out_proj(expected.transpose(1, 2).flatten(2))
    close(one(hidden, is_causal=True, position_embeddings=turned), expected)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(1, 9), st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_pieces_with_a_cache_are_the_whole(pieces: list[int], window: int, padded: int) -> None:
    one = layer(keep_window=window)
    tokens = sum(pieces)
    hidden = torch.randn(2, tokens, 16, dtype=torch.float64)
    seen = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    seen[1, ..., :padded] = False
    whole = one(hidden, seen, is_causal=True, position_embeddings=rotation(tokens))
    if padded < tokens:
        alone = one(
            hidden[1:, padded:],
            is_causal=True,
            position_embeddings=rotation(tokens - padded, padded),
        )
        close(whole[1:, padded:], alone)
    for cache in (DynamicCache(), DynamicMaskCache(window)):
        outputs, first = [], 0
        for piece in pieces:
            last = first + piece
            outputs.append(
                one(
                    hidden[:, first:last],
                    seen[..., :last],
                    is_causal=True,
                    position_embeddings=rotation(piece, first),
                    cache=cache,
                )
            )
            first = last
        close(torch.cat(outputs, 1), whole)
    held = cache.layers[0]
    assert all(tensor.shape[2] == min(window, tokens) for tensor in held)


def test_rows_that_see_nothing_are_zero_before_the_projection() -> None:
    one = layer()
    hidden = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    seen = torch.arange(9) > 5
    output = one(hidden, seen[None, None, None], is_causal=True)
    assert not bool(output[:, :6].any())
    assert bool(output[:, 6:].any())
    grad = torch.autograd.grad(output.sum(), hidden)[0]
    assert bool(grad.isfinite().all())
    assert not bool(grad[:, :6].any())


def test_everything_is_trained_from_the_first_step() -> None:
    """At A = 0 the weights of the score would get no gradient, and all tokens would tie."""
    one = layer(gate_init=None, keep_window=3)
    hidden = torch.randn(2, 12, 16, dtype=torch.float64)
    one(hidden, is_causal=True).square().sum().backward()
    for name, parameter in one.named_parameters():
        assert bool(parameter.grad.any()), name
    assert bool((one.gate != 0).all())
    with pytest.raises(ValueError, match="gate_init: expected a finite number other than 0"):
        layer(gate_init=0)


def test_gradients_by_finite_differences() -> None:
    one = layer(keep_window=3)
    hidden = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True)
    parameters = dict(one.named_parameters())

    def run(hidden: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(one, named, (hidden,), {"is_causal": True})

    assert torch.autograd.gradcheck(run, (hidden, *parameters.values()), fast_mode=True)


def test_not_causal_chooses_among_all() -> None:
    one = layer()
    hidden = torch.randn(1, 9, 16, dtype=torch.float64)
    turned_around = one(hidden.flip(1)).flip(1)
    close(one(hidden), turned_around)
    cache = DynamicMaskCache(4)
    with pytest.raises(ValueError, match="is_causal: expected True with a cache"):
        one(hidden, cache=cache)


def test_bfloat16_and_autocast() -> None:
    exact = layer(keep_window=40)
    hidden = torch.randn(2, 30, 16, dtype=torch.float64)
    expected = exact(hidden, is_causal=True).float()
    low = layer(keep_window=40, dtype=torch.float32)
    low.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = low(hidden.float(), is_causal=True)
    close(found.float(), expected, 3e-2)
    half = low.bfloat16()
    close(half(hidden.bfloat16(), is_causal=True).float(), expected, 3e-2)


def test_options_make_another_layer_like_it() -> None:
    one = layer(qk_norm=True, bias=True, head_dim=6, score="linear", layer_idx=3)
    again = DynamicMaskAttention(**one.options(), dtype=torch.float64)
    again.load_state_dict(one.state_dict())
    hidden = torch.randn(1, 9, 16, dtype=torch.float64)
    assert torch.equal(again(hidden, is_causal=True), one(hidden, is_causal=True))
    assert "keep_window=4" in repr(one)


def test_masks_that_a_forgetting_cache_cannot_read() -> None:
    one = layer()
    hidden = torch.randn(1, 6, 16, dtype=torch.float64)
    window = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    with pytest.raises(ValueError, match="attn_mask: expected padding and causality alone"):
        one(hidden, window, is_causal=True, cache=DynamicMaskCache(4))
    with pytest.raises(ValueError, match="attn_mask: expected 6 keys or more"):
        one(hidden, window[:1, :3], is_causal=True, cache=DynamicMaskCache(4))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    close(
        one(hidden, causal, is_causal=True, cache=DynamicMaskCache(4)), one(hidden, is_causal=True)
    )


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor"):
        layer(num_kv_heads=3)
    with pytest.raises(ValueError, match="keep_window: expected a number of keys"):
        layer(keep_window=0)
