"""The experiment of dynamic mask attention: its task, its peers, and its rule."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attending import papers
from attending.papers import _dynamic_mask_attention_experiment as experiment
from attending.papers.dynamic_mask_attention import RULE, settings

SETTINGS = settings("smoke")


@pytest.mark.parametrize("name", experiment.MODELS)
def test_no_model_sees_a_later_token(name: str) -> None:
    torch.manual_seed(0)
    model = experiment.Decoder(name, 256, 64, SETTINGS)
    words = torch.randint(256, (1, 64))
    later = words.clone()
    later[:, 40:] = 3
    with torch.no_grad():
        torch.testing.assert_close(model(later)[:, :40], model(words)[:, :40])


def test_the_models_are_of_about_one_size() -> None:
    sizes = [
        sum(one.numel() for one in experiment.Decoder(name, 64, 64, SETTINGS).parameters())
        for name in experiment.MODELS
    ]
    assert max(sizes) < 1.03 * min(sizes)


def influences(layer: torch.nn.Module, tokens: int) -> Tensor:
    """Which tokens have a part in the output of the last one."""
    hidden = torch.randn(1, tokens, SETTINGS["dim"], requires_grad=True)
    output = layer(hidden, is_causal=True)[0, -1]
    grad = torch.autograd.grad(output.sum(), hidden)[0]
    return grad[0].abs().sum(-1) > 0


def test_peers_see_what_they_say() -> None:
    torch.manual_seed(0)
    window = influences(experiment.attention("window", SETTINGS), 40)
    assert window.nonzero().flatten().tolist() == list(range(24, 40))
    assert bool(influences(experiment.attention("full", SETTINGS), 40).all())
    layer = experiment.attention("nsa_like", SETTINGS)
    assert isinstance(layer, experiment.NSALikeAttention)
    assert (layer.recent, layer.chosen, layer.block) == (8, 2, 4)  # 8 and 2 * 4 tokens
    assert bool(influences(layer, 40).all())  # the means of blocks
    with torch.no_grad():  # without them: of each head the best blocks and the last tokens
        layer.gate.weight.zero_()
        layer.gate.bias.copy_(torch.tensor([-200.0, 0.0, 0.0]).repeat_interleave(4))
    seen = influences(layer, 40)
    assert 8 + 8 <= int(seen.sum()) <= 8 + 4 * 8
    assert bool(seen[32:].all())
    one_token = experiment.attention("nsa_like", SETTINGS)(torch.randn(1, 1, 64), is_causal=True)
    assert bool(one_token.isfinite().all())


def test_each_key_comes_twice_and_its_value_is_the_answer() -> None:
    task = experiment.Recall(SETTINGS)
    batch = task.batch(5, torch.Generator().manual_seed(1))
    pairs = SETTINGS["pairs"]
    for row in range(5):
        words = batch.words[row].tolist()
        front = dict(zip(words[0 : 2 * pairs : 2], words[1 : 2 * pairs : 2], strict=True))
        assert len(front) == pairs
        for place, answer in zip(batch.places[row], batch.answers[row], strict=True):
            assert int(place) >= 2 * pairs
            assert front[words[int(place)]] == int(answer)


def verdict(recall: tuple[float, ...], loss: tuple[float, ...]) -> str:
    """Of full, window, NSA-like and dynamic, two equal seeds."""
    numbers = {f"recall_{n}": [v] * 2 for n, v in zip(experiment.MODELS, recall, strict=True)}
    numbers |= {f"text_loss_{n}": [v] * 2 for n, v in zip(experiment.MODELS, loss, strict=True)}
    return RULE.judge(numbers)


def test_the_rule() -> None:
    good, text = (0.9, 0.1, 0.5, 0.89), (2.0, 2.1, 2.1, 2.01)
    assert verdict(good, text) == "held"
    assert verdict((0.9, 0.1, 0.5, 0.8), text) == "held in direction"
    assert verdict(good, (2.0, 2.1, 2.1, 2.03)) == "held in direction"
    assert verdict(good, (2.0, 2.0, 2.1, 2.01)) == "held in direction"
    assert verdict((0.9, 0.1, 0.5, 0.1), text) == "did not hold"


def test_smoke(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    summary = papers.reproduce("dynamic-mask-attention", out_dir=tmp_path, picture=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in experiment.MODELS:
        assert 3 < summary.measurements[f"recall_loss_{name}"].mean < 7
        assert 4 < summary.measurements[f"text_loss_{name}"].mean < 8
