"""Spectral norms of weights and of their updates, against the singular values."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attending as at
from attending.monitor.weights import LANCZOS_STEPS, spectral_norms
from attending.nn import sigma_reparam
from tests.monitor.models import adam, llama, padded_probe, text, train_one


def exact(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), ord=2))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_small_or_low_rank_matrices_are_exact(
    rows: int, columns: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(min(rows, LANCZOS_STEPS), columns, generator=generator)
    low = torch.randn(rows, rank, generator=generator) @ torch.randn(
        rank, columns, generator=generator
    )
    norms = spectral_norms([small, low, small.bfloat16(), small.double().T])
    expected = [exact(small), exact(low), exact(small.bfloat16()), exact(small)]
    assert norms == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("shape", [(64, 192), (192, 192), (768, 256)])
def test_the_hardest_matrices_are_two_percent_low_at_most(shape: tuple[int, int]) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        gauss = torch.randn(shape, generator=generator)
        for matrix in (gauss, gauss.sign()):
            found = spectral_norms([matrix])[0]
            assert 0.975 * exact(matrix) <= found <= exact(matrix) * (1 + 1e-6)


def test_what_is_not_finite_is_nan_and_spoils_nothing_else() -> None:
    good, bad = torch.eye(3), torch.full((3, 3), torch.nan)
    norms = spectral_norms([good, bad, 2 * good, torch.zeros(3, 3)])
    assert norms[0] == pytest.approx(1.0)
    assert norms[1] != norms[1]
    assert norms[2:] == pytest.approx([2.0, 0.0])
    assert spectral_norms([]) == []


def test_the_update_is_that_of_the_step_that_is_due() -> None:
    model, probe = llama(), padded_probe()
    monitor, optimizer = at.AttentionMonitor(model, probe, every=3), adam(model)
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"]
    for step in range(1, 8):
        before = {name: model.get_parameter(name).detach().clone() for name in names}
        train_one(model, optimizer, step)
        found = monitor.step()
        assert (found is not None) == (step in (1, 3, 6))
        if found is None:
            continue
        assert [weight.name for weight in found.weights] == names
        for weight in found.weights:
            now = model.get_parameter(weight.name).detach()
            assert weight.norm == pytest.approx(exact(now), rel=5e-3)
            if step == 1:  # nobody knew that it would come
                assert weight.update_ratio is None
            else:
                update = exact(now - before[weight.name])
                assert weight.update_norm == pytest.approx(update, rel=5e-3)
                assert weight.update_ratio == pytest.approx(update / exact(now), rel=1e-2)
    assert "attention/update_ratio_max" not in monitor.history[0].scalars()
    assert monitor.history[-1].scalars()["attention/update_ratio_max"] == max(
        weight.update_ratio or 0.0 for weight in monitor.history[-1].weights
    )


def test_a_measurement_out_of_turn_knows_no_update() -> None:
    model = llama()
    monitor, optimizer = at.AttentionMonitor(model, padded_probe(), every=2), adam(model)
    train_one(model, optimizer, 0)
    monitor.step()  # keeps the weights for step 2
    assert monitor.measure().weights[0].update_ratio is None


def test_fused_and_plain_pytorch_weights_are_found() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4))
    found = at.AttentionMonitor(model, {"input_ids": text(0)}).measure()
    assert [weight.name for weight in found.weights] == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
    ]
    plain = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    found = at.AttentionMonitor(plain, torch.randn(2, 5, 16)).measure()
    assert [weight.name for weight in found.weights] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
    ]
    assert found.weights[0].norm == pytest.approx(exact(plain.self_attn.in_proj_weight), rel=5e-3)


def test_weights_are_chosen_by_name_and_frozen_ones_left_out() -> None:
    model = llama()
    model.model.layers[0].requires_grad_(False)
    found = at.AttentionMonitor(model, padded_probe()).measure()
    assert {weight.layer for weight in found.weights} == {1}
    chosen = at.AttentionMonitor(model, padded_probe(), weights=("*.up_proj", "lm_head"))
    assert [weight.name for weight in chosen.measure().weights] == [
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
    ]
    none = at.AttentionMonitor(model, padded_probe(), weights=(), every=1)
    assert none.measure().weights == ()
    assert "attention/weight_norm_max" not in none.measure().scalars()


def test_reading_a_weight_takes_no_power_step() -> None:
    """In training mode, to read a weight under sigmaReparam is a step of its power iteration."""
    trained = []
    for watch in (False, True):
        model = llama()
        sigma_reparam.convert(model, exclude=("lm_head",))
        monitor = at.AttentionMonitor(model, padded_probe(), every=1)
        optimizer = adam(model)
        for step in range(3):
            train_one(model, optimizer, step)
            if watch:
                found = monitor.step()
                assert found is not None
                assert found.weights
        trained.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_sharded_weights_are_left_out_and_named(tmp_path: Path) -> None:
    """`fully_shard` on one process: weights are DTensors, layers are measured all the same."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, probe = llama(), padded_probe()
    expected = at.AttentionMonitor(model, probe).measure()
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        monitor = at.AttentionMonitor(model, probe, every=1)
        optimizer = adam(model)
        found = monitor.measure()
        assert found.layers == expected.layers
        train_one(model, optimizer, 0)
        found_later = monitor.step()
    finally:
        dist.destroy_process_group()
    assert found_later is not None
    assert found_later.layers != expected.layers
    assert found_later.weights == ()
    assert set(monitor.skipped_weights) == {weight.name for weight in expected.weights}
    assert "DTensor" in next(iter(monitor.skipped_weights.values()))


@pytest.mark.parametrize("names", ["q_proj", ("nothing*",)])
def test_names_that_choose_nothing_are_refused(names: str | tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="weights: expected"):
        at.AttentionMonitor(llama(), padded_probe(), weights=names)
