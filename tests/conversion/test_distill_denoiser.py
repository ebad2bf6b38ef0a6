"""Distillation of a video transformer under frame masks, on the real class."""

import copy

import pytest
import torch

from attending.conversion.distill_denoiser import distill_denoiser
from attending.interventions.frame_reference_attention import FrameReferenceAttention
from attending.sparse.frame_masks import frame_reference_mask
from tests.interventions.denoisers import wan

FRAMES, TOKENS = 5, 4
METHOD = FrameReferenceAttention(frame_reference_mask(FRAMES, 1), TOKENS)
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 3, FRAMES, 4, 4, generator=generator),
        "timestep": torch.rand(2, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
    }


@pytest.fixture(scope="module")
def teacher():
    model = wan(layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn1.to_q" in name or "attn1.to_k" in name:
                parameter.mul_(6.0)  # so that it matters what attention sees
    return model


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_sparse_student_learns_what_it_is_shown(teacher, checkpointed):
    student = copy.deepcopy(teacher)
    if checkpointed:
        student.train()
        student.enable_gradient_checkpointing()
    weights = copy.deepcopy(teacher.state_dict())
    seen = []
    curve = distill_denoiser(
        student,
        teacher,
        (batch(number % 2) for number in range(20)),
        around=METHOD,
        learning_rate=3e-4,
        relative=True,
        watched=LAYERS,
        on_step=lambda number, step: seen.append((number, step)),
    )
    assert curve[-2].total < 0.8 * curve[0].total  # of the same batch
    assert curve[-1].total < 0.8 * curve[1].total
    assert [number for number, _ in seen] == list(range(1, 21))
    assert [step for _, step in seen] == curve
    for step in curve:
        assert step.total == pytest.approx(step.prediction + step.hidden, rel=1e-5)
    assert all(torch.equal(teacher.state_dict()[name], one) for name, one in weights.items())
    assert not any(module._forward_hooks for module in student.modules())


def test_a_step_is_the_gradient_of_the_loss(teacher):
    student, by_hand = copy.deepcopy(teacher), copy.deepcopy(teacher)
    one = batch(0)
    distill_denoiser(
        student, teacher, [one], around=METHOD, optimizer=torch.optim.SGD(student.parameters(), 0.1)
    )
    with METHOD(by_hand):
        error = by_hand(**one).sample - teacher(**one).sample.detach()
        error.square().mean().backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    for mine, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        wanted = theirs if theirs.grad is None else theirs - 0.1 * theirs.grad
        torch.testing.assert_close(mine, wanted)


def test_without_a_change_there_is_nothing_to_learn(teacher):
    student = copy.deepcopy(teacher)
    assert distill_denoiser(student, teacher, [batch(0)])[0].total == 0.0


def test_what_does_not_fit_is_named(teacher):
    student = copy.deepcopy(teacher)
    with pytest.raises(ValueError, match="teacher: expected another object"):
        distill_denoiser(teacher, teacher, [batch(0)])
    with pytest.raises(ValueError, match="at least one batch"):
        distill_denoiser(student, teacher, [])
    broken = batch(0)
    broken["hidden_states"][0, 0, 0, 0, 0] = torch.nan
    weights = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="finite"):
        distill_denoiser(student, teacher, [broken])
    assert all(torch.equal(student.state_dict()[name], one) for name, one in weights.items())
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="require a gradient"):
        distill_denoiser(student, teacher, [batch(0)])
