"""Models of diffusers made local for good: what they compute, what is trained, save and load."""

import copy
import inspect
import threading
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import attending as at
from attending.conversion.linearize import (
    attention_parameters,
    distillation_step,
    is_linearized,
    linearize,
    load_linearized,
    restore_full_attention,
    self_attention_modules,
)
from attending.interventions import CircularWindow
from attending.losses.linearization import official_layers
from tests.interventions.tiny_denoisers import (
    flux_inputs,
    sd3_inputs,
    tiny_flux,
    tiny_sd3,
    tiny_wan,
    wan_inputs,
)

MODELS = {
    "flux": (tiny_flux, flux_inputs),
    "sd3": (tiny_sd3, sd3_inputs),
    "wan": (tiny_wan, wan_inputs),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_intervention_does_and_can_be_undone(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    before = model(**inputs()).sample
    with CircularWindow(2)(model):
        expected = model(**inputs()).sample
    weights = dict(model.state_dict())
    attributes, signature = set(vars(model)), inspect.signature(model.forward)
    assert linearize(model, 2) is model
    assert is_linearized(model)
    assert torch.equal(model(**inputs()).sample, expected)
    assert model.state_dict().keys() == weights.keys()
    assert inspect.signature(model.forward) == signature
    restore_full_attention(model)
    assert set(vars(model)) == attributes
    assert torch.equal(model(**inputs()).sample, before)
    assert not is_linearized(model)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_trained(name: str) -> None:
    make, inputs = MODELS[name]
    model = linearize(make(), 2, down_factor=None if name == "wan" else 1)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    parts = Counter(name.split(".")[-2 if "to_out" not in name else -3] for name in trained)
    attention = {
        "flux": {"to_q": 6, "to_k": 6, "to_v": 6, "to_out": 2, "pool_weights": 0},
        "sd3": {"to_q": 4, "to_k": 4, "to_v": 4, "to_out": 4},
        "wan": {"to_q": 4, "to_k": 4, "to_v": 4, "to_out": 4},
    }[name]
    for part in ("to_q", "to_k", "to_v", "to_out"):
        assert parts[part] == attention[part], (part, sorted(trained))
    assert not any("add_" in one or "norm" in one or "attn2" in one for one in trained)
    pools = {one for one in trained if "pool_weights" in one}
    assert len(pools) == {"flux": 3, "sd3": 2, "wan": 0}[name]
    assert {id(one) for one in attention_parameters(model)} == {
        id(one) for one in model.parameters() if one.requires_grad
    }
    model(**inputs()).sample.square().mean().backward()
    lonely = [n for n, one in model.named_parameters() if one.requires_grad and one.grad is None]
    assert not lonely


@torch.no_grad()
def test_save_and_load(tmp_path) -> None:
    from diffusers import FluxTransformer2DModel

    model = linearize(tiny_flux(), 2, down_factor=2)
    for weight in model.circular_window.pool_weights.values():  # type: ignore[union-attr]
        weight.copy_(torch.randn_like(weight))
    inputs = flux_inputs(4, 6)
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path)
    loaded = load_linearized(FluxTransformer2DModel, tmp_path)
    assert is_linearized(loaded)
    assert loaded.circular_window.settings == CircularWindow(2, down_factor=2)
    assert torch.equal(loaded(**inputs).sample, expected)
    plain = tmp_path / "plain"
    tiny_flux().save_pretrained(plain)
    with pytest.raises(ValueError, match="folder"):
        load_linearized(FluxTransformer2DModel, plain)
    restore_full_attention(loaded).save_pretrained(plain)
    with pytest.raises(ValueError, match="folder"):
        load_linearized(FluxTransformer2DModel, plain)


@torch.no_grad()
def test_copies_and_taps() -> None:
    model = linearize(tiny_flux(), 2)
    expected = model(**flux_inputs()).sample
    other = copy.deepcopy(model)
    restore_full_attention(model)
    assert torch.equal(other(**flux_inputs()).sample, expected)
    with at.tap(other) as calls:
        assert torch.equal(other(**flux_inputs()).sample, expected)
    assert [call.name for call in calls] == self_attention_modules(other)
    assert calls[0].key_length == 33


@torch.no_grad()
def test_goes_on_after_an_error() -> None:
    model = linearize(tiny_flux(), 2)
    expected = model(**flux_inputs()).sample
    broken = flux_inputs() | {"pooled_projections": torch.zeros(1, 3)}
    with pytest.raises(RuntimeError):
        model(**broken)
    with pytest.raises(ValueError, match="img_ids"):
        model(**flux_inputs() | {"img_ids": torch.zeros(30, 3)})
    assert torch.equal(model(**flux_inputs()).sample, expected)


@torch.no_grad()
def test_two_threads_at_once() -> None:
    model = linearize(tiny_flux(), 2)
    expected = {size: model(**flux_inputs(*size)).sample for size in ((5, 6), (3, 4))}
    found: dict = {size: [] for size in expected}

    def work(size: tuple[int, int]) -> None:
        with torch.no_grad():
            found[size] += [model(**flux_inputs(*size)).sample for _ in range(8)]

    threads = [threading.Thread(target=work, args=(size,)) for size in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size, outputs in found.items():
        assert len(outputs) == 8
        assert all(torch.equal(one, expected[size]) for one in outputs)


def batch() -> tuple[dict[str, Tensor], Tensor]:
    inputs = flux_inputs()
    noise = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
    return inputs, noise - inputs["hidden_states"]


def test_a_window_without_limits_has_nothing_to_learn_from_the_teacher() -> None:
    teacher = tiny_flux()
    student = linearize(copy.deepcopy(teacher), 100)
    loss = distillation_step(student, teacher, *batch())
    torch.testing.assert_close(loss.total, loss.flow_matching)
    assert loss.prediction < 1e-10
    assert loss.attention < 1e-10


def test_gradients_under_checkpointing_are_those_without() -> None:
    grads = []
    for checkpointing in (False, True):
        teacher = tiny_flux()
        student = linearize(copy.deepcopy(teacher), 2, down_factor=1)
        if checkpointing:
            student.enable_gradient_checkpointing()
        student.train()
        loss = distillation_step(student, teacher, *batch())
        student(**flux_inputs(3, 10))  # another image before backward
        loss.total.backward()
        assert loss.attention > 0
        grads.append([one.grad for one in attention_parameters(student)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_distillation_brings_the_student_closer() -> None:
    teacher = tiny_flux()
    student = linearize(copy.deepcopy(teacher), 2)
    optimizer = torch.optim.AdamW(attention_parameters(student), lr=1e-3)
    losses = []
    inputs, _ = batch()
    with torch.no_grad():
        velocity = teacher(**inputs).sample
    for _ in range(25):
        loss = distillation_step(student, teacher, inputs, velocity)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.prediction.item(), loss.attention.item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < losses[0][1]
    frozen = dict(teacher.named_parameters())
    moved = {n for n, one in student.named_parameters() if not torch.equal(one, frozen[n])}
    assert all(".attn.to_" in name for name in moved)


def test_a_mask_over_the_image_is_refused() -> None:
    model = linearize(tiny_wan(), 2)

    def mask(module: nn.Module, args: tuple) -> tuple:
        return (*args[:2], torch.ones(1, 1, 1, 90, dtype=torch.bool), *args[3:])

    hook = model.blocks[0].attn1.register_forward_pre_hook(mask)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="attention_mask"):
        model(**wan_inputs())
    hook.remove()
    model(**wan_inputs())


def test_layers_and_weights_of_the_loss() -> None:
    teacher = tiny_flux(single_layers=8)
    student = linearize(copy.deepcopy(teacher), 2)
    names = self_attention_modules(teacher)
    chosen = official_layers(names)
    assert chosen == ["single_transformer_blocks.3.attn", "single_transformer_blocks.7.attn"]
    some = distillation_step(student, teacher, *batch(), layers=chosen)
    every = distillation_step(student, teacher, *batch())
    assert some.attention != every.attention
    matching = distillation_step(
        student, nn.Identity(), *batch(), prediction_weight=0, attention_weight=0
    )
    torch.testing.assert_close(matching.total, every.flow_matching)
    assert matching.total == matching.flow_matching


def test_errors() -> None:
    model = linearize(tiny_flux(), 2)
    with pytest.raises(ValueError, match="not linearized before"):
        linearize(model, 3)
    with pytest.raises(ValueError, match="model: expected a transformer of diffusers"):
        linearize(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="radius"):
        linearize(tiny_flux(), 0)
    with pytest.raises(ValueError, match="model: expected one of linearize"):
        restore_full_attention(tiny_flux())
    model.forward = lambda **inputs: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Take off first"):
        restore_full_attention(model)
    with pytest.raises(ValueError, match="teacher"):
        distillation_step(model, model, *batch())
    with pytest.raises(ValueError, match="names"):
        distillation_step(model, tiny_flux(), *batch(), layers=["nowhere"])
