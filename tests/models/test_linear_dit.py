"""The small diffusion transformer, in all its kinds of attention."""

from typing import get_args

import pytest
import torch

from attending.models.linear_dit import Attention, LinearDiT, time_features

KINDS = get_args(Attention)


def make(attention: str, **changes: int) -> LinearDiT:
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, **changes}
    return LinearDiT(8, 3, num_classes=4, attention=attention, patch_size=2, **sizes)


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.rand(batch), torch.tensor([0, 4, 2])[:batch]


@pytest.mark.parametrize("attention", KINDS)
def test_it_learns(attention: str) -> None:
    model, (image, time, labels) = make(attention), inputs()
    assert (model(image, time, labels) == 0).all()
    target = image.flip(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (model(image, time, labels) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    again = make(attention)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(image, time, labels), model(image, time, labels))


def test_patches_go_back_to_where_they_came_from() -> None:
    """With blocks that do nothing and layers that copy, the image comes out as it went in."""
    model = make("softmax", embed_dim=24)
    with torch.no_grad():
        model.positions.zero_()
        model.patches.bias.zero_()
        model.patches.weight.zero_()
        model.patches.weight.view(24, 12)[:12] = torch.eye(12)
        model.out.weight[:, :12] = torch.eye(12)
    model.norm = torch.nn.Identity()
    image, time, labels = inputs()
    torch.testing.assert_close(model(image, time, labels), image)


def test_lambdas_stay_at_zero_without_the_difference() -> None:
    model, (image, time, labels) = make("dydila_undifferenced"), inputs()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    before = model(image, time, labels)
    for block in model.blocks:
        values = block.attention.query_difference.values
        assert values is block.attention.key_difference.values
        assert not values.requires_grad
        values.fill_(1.0)
    assert not torch.allclose(model(image, time, labels), before)


def test_time_features_tell_times_apart() -> None:
    found = time_features(torch.linspace(0, 1, 50), 16)
    assert found.shape == (50, 16)
    distances = torch.cdist(found, found) + torch.eye(50)
    assert distances.min() > 0.01


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="patch_size: expected a divisor"):
        LinearDiT(8, 1, 10, patch_size=3)
    with pytest.raises(ValueError, match="num_heads: expected"):
        LinearDiT(8, 1, 10, embed_dim=10, num_heads=4)
    with pytest.raises(ValueError, match="attention: expected one of"):
        LinearDiT(8, 1, 10, attention="linear")
    with pytest.raises(ValueError, match="image: expected"):
        make("relu")(torch.randn(2, 3, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.long))
