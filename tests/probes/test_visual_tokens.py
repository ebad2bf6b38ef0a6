import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.probes.visual_tokens import attention_entropy, attention_layer, visual_tokens
from tests.interventions.llava import make_llava, pixels


@given(tokens=st.integers(1, 30), scale=st.floats(1e-6, 1e6))
def test_entropy(tokens: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    attention = torch.rand(3, tokens, generator=generator).double()
    entropy = attention_entropy(attention)
    assert bool((entropy >= -1e-12).all())
    assert bool((entropy <= math.log(tokens) + 1e-12).all())
    torch.testing.assert_close(attention_entropy(scale * attention), entropy)
    even = attention_entropy(torch.full((tokens,), 0.25))
    assert even.item() == pytest.approx(math.log(tokens), abs=1e-6)
    alone = torch.zeros(tokens)
    assert attention_entropy(alone).item() == 0
    alone[0] = 0.3
    assert attention_entropy(alone).item() == pytest.approx(0, abs=1e-6)


def test_entropy_golden() -> None:
    from pathlib import Path

    import numpy as np

    for name in ("a", "b"):
        folder = Path(__file__).parents[1] / "golden" / "agile-pruner"
        stored = np.load(folder / f"select_{name}.npz")
        attention = torch.from_numpy(stored["cls_attention"]).mean(1)
        expected = float(stored["attention_entropy"])
        assert attention_entropy(attention).item() == pytest.approx(expected, abs=1e-12)


def test_visual_tokens_are_those_of_the_model() -> None:
    model = make_llava()
    images = pixels(3)
    tokens = visual_tokens(model, images)
    features = torch.stack(model.get_image_features(images, return_dict=True).pooler_output)
    assert torch.equal(tokens.features, features)
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower(images, output_attentions=True)
    expected = tower.attentions[-2].mean(1)[:, 0, 1:]
    torch.testing.assert_close(tokens.attention, expected)
    assert tokens.statistic == "cls"
    assert tokens.effective_rank.shape == tokens.entropy.shape == (3,)
    centred = features - features.mean(1, keepdim=True)
    share = torch.linalg.svdvals(centred.double())
    share = share / share.sum(-1, keepdim=True)
    torch.testing.assert_close(
        tokens.effective_rank.double(),
        (-torch.xlogy(share, share).sum(-1)).exp(),
        rtol=1e-4,
        atol=0,
    )
    assert not torch.equal(tokens.effective_rank, tokens.uncentred_effective_rank)


def test_layers() -> None:
    model = make_llava()
    assert attention_layer(model) == -2
    assert attention_layer(model, 3) == 2
    assert attention_layer(model, [-5, -1]) == -1
    with pytest.raises(ValueError, match="vision_feature_layer: expected the output of a layer"):
        attention_layer(model, 0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="attention: expected a float tensor"):
        attention_entropy(torch.tensor([0.1, -0.1]))
    with pytest.raises(ValueError, match="model: expected a vision-language model"):
        visual_tokens(torch.nn.Linear(2, 2), torch.ones(1, 2))
    model = make_llava()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="model: expected a token for each of the patches"):
        visual_tokens(model, pixels(1))
