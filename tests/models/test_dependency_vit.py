"""The small DependencyViT: plain, pruned, and as a tree."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from attending.models.dependency_vit import DependencyViT
from attending.probes.dependency_tree import pruned_tree


def make(**changes: object) -> DependencyViT:
    sizes = {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, **changes}
    return DependencyViT(8, 1, 4, **sizes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "forward"},
        {"layer_scale": 0.1},
        {"pooling": "message_mean"},
        {"controller_bias": None},
        {"prune_after": (0, 1)},
        {"prune_after": (1,), "rank_by": "received"},
        {"prune_after": (1,), "rank_by": "random", "attention": "forward"},
    ],
)
def test_it_learns(changes: dict[str, object]) -> None:
    model = make(**changes)
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_parsing_does_not_change_the_logits_and_masks_are_conserved() -> None:
    model, images = make(), torch.randn(3, 1, 8, 8)
    parse = model.parse(images)
    torch.testing.assert_close(parse.logits, model(images))
    sent = torch.stack([mask.sum(1) for mask in parse.dependencies])
    assert sent.shape == (3, 3, 16)
    assert (sent[1:] < sent[:-1]).all()  # no token sends more than in the layer before
    assert (sent[0] < 1).all()


def test_pruning_by_the_message() -> None:
    model, images = make(prune_after=(0, 1)), torch.randn(2, 1, 8, 8)
    parse = model.parse(images)
    assert [mask.shape[1] for mask in parse.dependencies] == [16, 13, 10]
    torch.testing.assert_close(parse.logits, model(images))
    sent = parse.dependencies[0].sum(1)
    for item in range(2):
        kept = parse.indices[1][item]
        dropped = torch.isin(torch.arange(16), kept, invert=True)
        assert sent[item][kept].min() >= sent[item][dropped].max()
        tree = pruned_tree(
            [mask[item] for mask in parse.dependencies], [one[item] for one in parse.indices]
        )
        assert (tree < 0).sum() == 1
        assert not torch.isin(torch.arange(16)[dropped], tree).any()


def test_pruning_can_be_changed() -> None:
    model, images = make(), torch.randn(2, 1, 8, 8)
    whole = model(images)
    model.set_pruning((0,), 0.5)
    assert not torch.allclose(model(images), whole)
    model.set_pruning((0,), 0.0)  # keeps all
    torch.testing.assert_close(model(images), whole)


def test_tokens_have_no_places_but_their_positions() -> None:
    """Without positions an image of shuffled patches is the same to the model."""
    model = make(patch_size=1)
    nn.init.zeros_(model.positions)
    images = torch.randn(1, 1, 8, 8)
    shuffled = images.flatten()[torch.randperm(64)].view(1, 1, 8, 8)
    torch.testing.assert_close(model(shuffled), model(images))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"patch_size": 3}, "patch_size"),
        ({"attention": "backward"}, "attention"),
        ({"pooling": "max"}, "pooling"),
        ({"prune_after": (3,)}, "prune_after"),
        ({"prune_after": (0,), "attention": "forward"}, "rank_by"),
        ({"prune_after": (0, 1), "prune_ratio": 0.6}, "ratio"),
    ],
)
def test_refusals(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make(**changes)
    with pytest.raises(ValueError, match="image"):
        make()(torch.zeros(1, 1, 7, 8))
