import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.sparse.merged_tokens import attention_outliers, pru_merge, vision_zip
from tests.sparse import naive
from tests.sparse.test_visual_tokens import problem


@given(tokens=st.integers(3, 30), keep=st.integers(2, 30), contextual=st.integers(1, 29))
def test_vision_zip(tokens: int, keep: int, contextual: int) -> None:
    keep = min(keep, tokens - 1)
    contextual = min(contextual, keep - 1, tokens - keep)
    if contextual == 0:
        return
    features, attention = problem(2, tokens, 5)
    key, _ = problem(2, tokens, 7, seed=3)
    merged = vision_zip(features, attention, key, keep, contextual=contextual)
    assert merged.count.tolist() == [keep, keep]
    for image in range(2):
        expected = naive.vision_zip(features[image], attention[image], key[image], keep, contextual)
        torch.testing.assert_close(merged.tokens[image], expected)
    picked = features.gather(1, merged.index[..., None].expand(-1, -1, 5))
    assert torch.equal(picked[:, : keep - contextual], merged.tokens[:, : keep - contextual])


def test_vision_zip_budgets() -> None:
    features, attention = problem(1, 576, 4)
    for keep, dominant in ((64, 54), (128, 108), (192, 162)):
        index = vision_zip(features, attention, features, keep).index[0]
        most = attention[0].topk(dominant).indices.sort().values
        assert index[:dominant].tolist() == most.tolist()
        assert len(set(index.tolist())) == keep
    one = vision_zip(features, attention, features, 1)
    assert one.index.tolist() == [[int(attention.argmax())]]


@given(
    tokens=st.integers(4, 30),
    keep=st.one_of(st.none(), st.integers(1, 30)),
    plus=st.booleans(),
    neighbours=st.integers(0, 32),
)
def test_pru_merge(tokens: int, keep: int | None, plus: bool, neighbours: int) -> None:
    features, attention = problem(3, tokens, 5)
    attention[0, 0] = 0.9  # an outlier for certain
    key, _ = problem(3, tokens, 7, seed=3)
    merged = pru_merge(features, attention, key, keep, plus=plus, neighbours=neighbours)
    if keep is not None and keep >= tokens:
        assert torch.equal(merged.tokens, features)
        return
    outliers = attention_outliers(attention)
    for image, count in enumerate(merged.count.tolist()):
        index = merged.index[image].tolist()
        assert index[count - 1 :] == [-1] * (merged.index.shape[1] - count + 1)
        kept = index[: count - 1]
        assert kept == sorted(set(kept))
        expected = naive.pru_merge(features[image], attention[image], key[image], kept, neighbours)
        torch.testing.assert_close(merged.tokens[image, :count], expected)
        assert not merged.tokens[image, count:].any()
        if keep is not None:
            assert count == keep
        elif plus:
            assert set(outliers[image].nonzero()[:, 0].tolist()) <= set(kept)
        else:
            assert kept == outliers[image].nonzero()[:, 0].tolist()


def test_pru_merge_fills_up_evenly() -> None:
    features, attention = problem(1, 64, 4)
    attention[:] = 0.01
    attention[0, [5, 40]] = 0.3
    index = pru_merge(features, attention, features, 9).index[0, :-1]
    assert {5, 40} <= set(index.tolist())
    assert int(index.diff().max()) <= 64 / 6 + 2
    # Without plus the most attended, and these are the earlier ones of the equal.
    index = pru_merge(features, attention, features, 5, plus=False).index[0]
    assert index.tolist() == [0, 1, 5, 40, -1]


def test_outliers() -> None:
    attention = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 14]])
    # Quartiles 3 and 7: above 13.
    assert attention_outliers(attention).nonzero().tolist() == [[0, 8], [1, 8]]
    attention[1, 0] = 13.5
    assert attention_outliers(attention)[1].nonzero()[:, 0].tolist() == [8]


def test_everything_is_kept_as_it_is() -> None:
    features, attention = problem(2, 6, 4)
    for merge in (vision_zip, pru_merge):
        merged = merge(features.bfloat16(), attention, features, 6)
        assert torch.equal(merged.tokens, features.bfloat16())
        assert merged.index.tolist() == [list(range(6))] * 2
        half = merge(features.bfloat16(), attention.bfloat16(), features.bfloat16(), 4)
        assert half.tokens.dtype == torch.bfloat16
        assert torch.isfinite(half.tokens).all()


def test_gradients_reach_every_token() -> None:
    features, attention = problem(1, 12, 4)
    features.requires_grad_()
    for merge in (vision_zip, pru_merge):
        merge(features, attention, features.detach(), 5).tokens.sum().backward()
        assert bool((features.grad != 0).all())
        features.grad = None


def test_bad_input() -> None:
    features, attention = problem(2, 6, 4)
    for merge in (vision_zip, pru_merge):
        with pytest.raises(ValueError, match="key: expected a float tensor"):
            merge(features, attention, features[:, :5], 3)
        with pytest.raises(ValueError, match="keep: expected a whole number"):
            merge(features, attention, features, 0)
        with pytest.raises(ValueError, match=r"attention: expected \[2, 6\]"):
            merge(features, attention[:, 1:], features, 3)
    with pytest.raises(ValueError, match="contextual: expected a number from 0 to 2"):
        vision_zip(features, attention, features, 3, contextual=3)
    with pytest.raises(ValueError, match="neighbours: expected a number"):
        pru_merge(features, attention, features, 3, neighbours=-1)
