"""Distillation losses against their definition, and watched modules on a real model."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attending.losses.distillation import distillation_loss, watch_modules


class Net(nn.Module):
    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def test_the_loss_is_its_definition_and_its_gradient_too():
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    student.requires_grad_()
    inner = {name: torch.randn(4, dtype=torch.float64, requires_grad=True) for name in "ab"}
    outer = {name: torch.randn(4, dtype=torch.float64, requires_grad=True) for name in "ab"}
    found = distillation_loss(
        student, teacher, inner, outer, prediction_weight=0.3, hidden_weight=2.0
    )
    prediction = ((student - teacher) ** 2).sum() / 15
    hidden = sum(((inner[n] - outer[n]) ** 2).sum() / 4 for n in "ab") / 2
    assert found.prediction.item() == pytest.approx(prediction.item(), rel=1e-14)
    assert found.hidden.item() == pytest.approx(hidden.item(), rel=1e-14)
    found.total.backward()
    torch.testing.assert_close(student.grad, 0.3 * 2 * (student - teacher).detach() / 15)
    torch.testing.assert_close(inner["a"].grad, 2 * (inner["a"] - outer["a"]).detach() / 4)
    assert outer["a"].grad is None


def test_equal_models_have_no_loss_and_scale_does_not_matter_to_the_relative_one():
    one = torch.randn(7)
    assert float(distillation_loss(one, one, {"a": one}, {"a": one}).total) == 0.0
    other = torch.randn(7)
    small = distillation_loss(one, other, {"a": one}, {"a": other}, relative=True)
    large = distillation_loss(
        100 * one, 100 * other, {"a": 100 * one}, {"a": 100 * other}, relative=True
    )
    torch.testing.assert_close(small.total, large.total)
    nothing = distillation_loss(one, torch.zeros(7), relative=True)
    torch.testing.assert_close(nothing.total, one.square().mean())


def test_half_precision_is_compared_in_float32():
    one = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    found = distillation_loss(one, torch.full((1000,), 1.0078125, dtype=torch.bfloat16))
    assert found.total.dtype == torch.float32
    assert float(found.total) == pytest.approx(0.0078125**2)


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_watched_modules_train_the_student_and_leave_no_trace(use_reentrant):
    teacher, student = Net(), Net(use_reentrant)
    names = ["blocks.0", "blocks.1"]
    x = torch.randn(3, 4)
    hooks = [len(module._forward_hooks) for module in student.modules()]
    with watch_modules(teacher, names) as wanted, torch.no_grad():
        target = teacher(x)
    with watch_modules(student, names) as found:
        prediction = student(x)
        loss = distillation_loss(prediction, target, found, wanted, prediction_weight=0.0)
        loss.total.backward()
    assert list(found) == names
    assert hooks == [len(module._forward_hooks) for module in student.modules()]
    plain = Net()
    plain.load_state_dict(student.state_dict())
    first = plain.blocks[0](x)
    expected = ((first - wanted["blocks.0"]) ** 2).mean() / 2
    expected = expected + ((plain.blocks[1](first) - target) ** 2).mean() / 2
    expected.backward()
    for mine, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_reentrant_checkpointing_is_refused_and_not_silently_without_effect():
    student = Net(use_reentrant=True)
    x = torch.randn(3, 4, requires_grad=True)
    with watch_modules(student, ["blocks.1.0"]) as found:
        prediction = student(x)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        distillation_loss(prediction, prediction.detach(), found, dict(found))


def test_inputs_can_be_watched_and_repeated_runs_are_told_apart():
    net = Net()
    x, y = torch.randn(2, 3, 4).unbind(0)
    with watch_modules(net, ["blocks.0"], side="input") as found:
        net(x), net(y)
    assert list(found) == ["blocks.0", "blocks.0#1"]
    assert found["blocks.0"] is x
    assert found["blocks.0#1"] is y


def test_what_does_not_fit_is_named():
    one, two = torch.randn(3), torch.randn(4)
    with pytest.raises(ValueError, match="teacher: expected the shape"):
        distillation_loss(one, two)
    with pytest.raises(ValueError, match="same names"):
        distillation_loss(one, one, {"a": one}, {"b": one})
    with (
        pytest.raises(ValueError, match=r"lacks \['blocks.7'\]"),
        watch_modules(Net(), ["blocks.7"]),
    ):
        pass
    with pytest.raises(ValueError, match="names"), watch_modules(Net(), []):
        pass
