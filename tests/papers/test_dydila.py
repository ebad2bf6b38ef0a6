"""The experiment of DyDiLA: its models, what it measures, and its rule."""

from pathlib import Path

import pytest
import torch

from attending import papers
from attending.models.linear_dit import LinearDiT
from attending.nn.focused_attention import focused_kernel
from attending.papers import _dydila_training as training
from attending.papers.dydila import OTHERS, RULE
from attending.papers.dydila import settings as settings_of


def test_models_have_about_the_same_number_of_parameters() -> None:
    sizes = [
        sum(p.numel() for p in training.build(kind, settings_of("small")).parameters())
        for kind in training.KINDS
    ]
    assert max(sizes) / min(sizes) < 1.07


def test_frechet_distance() -> None:
    """Of two normal distributions with diagonal covariances it is a sum over the axes."""
    one = torch.randn(200_000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0])
    other = torch.randn(200_000, 3, dtype=torch.float64) * torch.tensor([2.0, 2.0, 1.0]) + 1
    assert training.frechet_distance(one, other) == pytest.approx(3 + 1 + 0 + 4, rel=0.02)
    assert training.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    flat = one.clone()
    flat[:, 1] = 0  # a covariance without full rank
    assert training.frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)


class Straight(LinearDiT):
    """A model that knows where each image is going."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__(8, 1, 10, embed_dim=8, depth=1, num_heads=1)
        self.target = target

    def forward(self, image: torch.Tensor, time: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (self.target - image) / (1 - time)[:, None, None, None]


def test_drawing_ends_at_the_image_and_its_loss_is_none() -> None:
    target = torch.rand(4, 1, 8, 8)
    model, labels = Straight(target), torch.zeros(4, dtype=torch.long)
    drawn = training.draw(model, labels, 7, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, target, rtol=1e-4, atol=1e-5)
    loss = training.flow_loss(model, target, labels, torch.Generator().manual_seed(0))
    assert float(loss) < 1e-6


@pytest.mark.parametrize("kind", training.KINDS)
def test_similarity_is_that_of_the_map(kind: str) -> None:
    layer = training.build(kind, {"dim": 8, "depth": 1, "heads": 1}).blocks[0].attention
    hidden = torch.randn(1, 9, 8)
    with torch.no_grad():
        if kind.startswith("dydila"):
            layer.query_difference.values.fill_(0.4)
            query, key, other_query, other_key, asked, held = layer.features(hidden)
            query, key = query - 0.4 * other_query, key - 0.4 * other_key
            assert torch.allclose(asked, torch.tensor(0.4))
            assert torch.allclose(held, torch.tensor(0.4))
        else:
            query, key, _ = layer.project(hidden)
        rows = query @ key.transpose(-1, -2)
        if kind == "softmax":
            rows = (rows / 8**0.5).softmax(-1)
        elif kind in ("relu", "focused"):
            query, key = (focused_kernel(one, layer.power) for one in (query, key))
            rows = query @ key.transpose(-1, -2)
        unit = rows[0, 0][rows[0, 0].norm(dim=-1) > 0]
        unit = unit / unit.norm(dim=-1, keepdim=True)
        count = len(unit)
        expected = ((unit @ unit.T).sum() - count) / (count * (count - 1))
        ours = training.layer_similarity(layer, hidden)
    assert float(ours) == pytest.approx(float(expected), abs=1e-4)


def numbers(**changes: float) -> dict[str, list[float]]:
    found = {}
    for figure in ("loss", "similarity", "distance"):
        found |= {f"{figure}_{other}": [1.0] * 3 for other in OTHERS}
        found[f"{figure}_dydila"] = [0.5] * 3
    return found | {name: [value] * 3 for name, value in changes.items()}


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers()) == "held"
    assert judge(numbers(distance_softmax=0.4)) == "held in direction"
    for other in ("softmax", "focused", "dydila_undifferenced"):
        assert judge(numbers(**{f"loss_{other}": 0.4})) == "held in direction"
    assert judge(numbers(loss_relu=0.4)) == "did not hold"
    assert judge(numbers(similarity_relu=0.4)) == "did not hold"
    assert judge(numbers(loss_dydila=float("nan"))) == "did not hold"
    one_seed = numbers()
    one_seed["similarity_dydila"][2] = 1.1
    assert judge(one_seed) == "did not hold"


def test_smoke(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    summary = papers.reproduce("dydila", out_dir=tmp_path, picture=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    for kind in training.KINDS:
        assert 0.5 < summary.measurements[f"loss_{kind}"].mean < 4
        assert -1 < summary.measurements[f"similarity_{kind}"].mean <= 1
        assert summary.measurements[f"distance_{kind}"].mean > 0
