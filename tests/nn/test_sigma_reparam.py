"""sigmaReparam against the golden vectors of the official code, its invariants, and real models."""

import copy
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from attending.nn import sigma_reparam
from attending.nn.sigma_reparam import SigmaReparam, spectral_norm_estimate

GOLDEN = Path(__file__).parent.parent / "golden" / "sigma-reparam"
EXACT = {"rtol": 0, "atol": 1e-10}


def load(case: str) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.asarray(value))
        for name, value in np.load(GOLDEN / f"{case}.npz").items()
    }


def the_reparam(layer: nn.Module, name: str = "weight") -> SigmaReparam:
    return layer.parametrizations[name][0]


def set_state(layer: nn.Module, u: Tensor, gamma: Tensor) -> None:
    reparam = the_reparam(layer)
    with torch.no_grad():
        reparam.u.copy_(u)
        reparam.gamma.copy_(gamma)


def converged(layer: nn.Module, steps: int) -> nn.Module:
    for _ in range(steps):
        sigma_reparam.power_step(layer)
    return layer


# The float64 reference, by the definitions of the card.


def reference(weight: Tensor, u: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrix = weight.double().flatten(1)
    v = matrix @ u.double()
    v = v / v.norm()
    u = matrix.T @ v
    u = u / u.norm()
    sigma = v @ matrix @ u
    return gamma.double() / sigma * weight.double(), sigma, u, v


@pytest.mark.parametrize("case", ["linear_case1", "linear_case2"])
def test_golden_linear(case: str) -> None:
    golden = load(case)
    rows, columns = golden["weight"].shape
    layer = nn.Linear(columns, rows, bias="bias" in golden, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(golden["weight"])
        if "bias" in golden:
            layer.bias.copy_(golden["bias"])
    sigma_reparam.sigma_reparam(layer)
    reparam = the_reparam(layer)
    exact = golden["svdvals"].max()
    torch.testing.assert_close(reparam.gamma[0].detach(), exact, **EXACT)
    set_state(layer, golden["u0"], golden["gamma"])
    x = golden["x"].clone().requires_grad_()
    for step in range(3):
        y = layer(x)
        torch.testing.assert_close(y, golden["y_train"][step], **EXACT)
        torch.testing.assert_close(reparam.u, golden["u_after"][step], **EXACT)
        torch.testing.assert_close(reparam.measured, golden["sigma_used"][step], **EXACT)
    (y * golden["cotangent"]).sum().backward()
    torch.testing.assert_close(reparam.gamma.grad, golden["grad_gamma"], **EXACT)
    torch.testing.assert_close(x.grad, golden["grad_x"], **EXACT)
    original = layer.parametrizations.weight.original
    torch.testing.assert_close(original.grad, golden["grad_weight"], **EXACT)
    layer.eval()
    torch.testing.assert_close(layer(x), golden["y_eval"], **EXACT)
    torch.testing.assert_close(reparam.u, golden["u_after_eval"], **EXACT)
    assert float(reparam.measured) != float(reparam.gamma.detach())  # two things, unlike officially


def test_golden_convolution() -> None:
    golden = load("conv2d_case1")
    out, channels, height, width = golden["weight"].shape
    layer = nn.Conv2d(
        channels,
        out,
        (height, width),
        stride=int(golden["stride"]),
        padding=int(golden["padding"]),
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.weight.copy_(golden["weight"])
        layer.bias.copy_(golden["bias"])
    sigma_reparam.sigma_reparam(layer)
    set_state(layer, golden["u0"], golden["gamma"])
    torch.testing.assert_close(layer(golden["x"]), golden["y_train"], **EXACT)
    torch.testing.assert_close(the_reparam(layer).u, golden["u_after"], **EXACT)
    torch.testing.assert_close(layer.eval()(golden["x"]), golden["y_eval"], **EXACT)
    torch.testing.assert_close(the_reparam(layer).u, golden["u_after"], **EXACT)


LAYERS = {
    "linear": lambda n, m: (nn.Linear(n, m), torch.randn(3, n)),
    "conv1d": lambda n, m: (nn.Conv1d(n, m, 3, padding=1), torch.randn(2, n, 9)),
    "grouped": lambda n, m: (
        nn.Conv2d(2 * n, 2 * m, (3, 1), stride=2, groups=2, dilation=2, padding_mode="circular",
                  padding=1),
        torch.randn(2, 2 * n, 9, 8),
    ),
    "conv3d": lambda n, m: (nn.Conv3d(n, m, 2), torch.randn(1, n, 3, 3, 3)),
    "transposed": lambda n, m: (nn.ConvTranspose2d(n, m, 3), torch.randn(1, n, 4, 4)),
    "embedding": lambda n, m: (nn.Embedding(n + 1, m, padding_idx=0), torch.tensor([[0, 1, n]])),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=15)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    double=st.booleans(),
    gamma=st.sampled_from((None, 1.0, -0.7)),
    seed=st.integers(0, 2**31),
)
def test_invariants(
    kind: str, n: int, m: int, double: bool, gamma: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    layer, x = LAYERS[kind](n, m)
    layer = layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    plain = copy.deepcopy(layer)
    before = layer(x)
    settings_before = layer.extra_repr()
    sigma_reparam.sigma_reparam(layer)
    reparam = the_reparam(layer)
    assert layer.extra_repr() == settings_before

    # With gamma = sigma the function is kept, to the last bit.
    assert torch.equal(layer.eval()(x), before)
    layer.train()
    if gamma is not None:
        with torch.no_grad():
            reparam.gamma.fill_(gamma)

    # A training step is the recurrence of the card; eval does not store.
    start = nn.functional.normalize(torch.randn(reparam.u.shape, dtype=torch.float64), dim=0)
    with torch.no_grad():
        reparam.u.copy_(start)
    start = reparam.u.clone()
    what, sigma, u, v = reference(plain.weight.detach(), start, reparam.gamma.detach())
    tight = {"rtol": 1e-9, "atol": 1e-9} if double else {"rtol": 1e-3, "atol": 1e-3}
    seen = layer.eval().weight
    assert torch.equal(reparam.u, start)
    trained = layer.train().weight
    assert torch.equal(seen, trained)
    torch.testing.assert_close(trained.double(), what, **tight)
    torch.testing.assert_close(reparam.u.double(), u, **tight)
    torch.testing.assert_close(reparam.v.double(), v, **tight)
    assert float(sigma) <= torch.linalg.matrix_norm(plain.weight.double().flatten(1), 2) + 1e-9

    # Exact gradients, orthogonal to W.
    cotangent = torch.randn_like(trained)
    original = layer.parametrizations.weight.original
    grad, grad_gamma = torch.autograd.grad((trained * cotangent).sum(), (original, reparam.gamma))
    inner = (cotangent * plain.weight).double().sum()
    outer = torch.outer(v, u).view_as(original)
    factor = reparam.gamma.detach().double() / sigma
    expected = factor * (cotangent.double() - inner / sigma * outer)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(grad.double() / scale, expected / scale, **tight)
    torch.testing.assert_close(grad_gamma.double() / scale, (inner / sigma)[None] / scale, **tight)
    assert abs(float((grad * original.detach()).double().sum())) <= tight["atol"] * 10 * scale

    # Folding gives the next forward's weight, in train and eval mode alike.
    folded = sigma_reparam.remove(copy.deepcopy(layer.eval()))
    assert torch.equal(layer(x), folded(x))
    assert type(folded) is type(plain)
    assert torch.equal(sigma_reparam.remove(copy.deepcopy(layer.train())).weight, folded.weight)
    assert set(folded.state_dict()) == set(plain.state_dict())


@settings(max_examples=10)
@given(n=st.integers(1, 8), m=st.integers(1, 8), factor=st.floats(1e-3, 1e3))
def test_converged_norm_is_gamma_and_the_weight_is_scale_invariant(
    n: int, m: int, factor: float
) -> None:
    torch.manual_seed(n * 10 + m)
    layer = nn.Linear(n, m, dtype=torch.float64)
    sigma_reparam.sigma_reparam(layer)
    start = nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0)
    set_state(layer, start, torch.tensor([-1.3]))
    converged(layer, 1000)
    norm = torch.linalg.matrix_norm(layer.weight.detach(), 2).item()
    assert norm == pytest.approx(1.3, rel=1e-6)
    before = layer.weight.detach()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(factor)
    converged(layer, 1)
    torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-6, atol=1e-9)


def test_gamma_may_start_at_one() -> None:
    layer = sigma_reparam.sigma_reparam(nn.Linear(6, 4), gamma_init="one")
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1)
    assert the_reparam(layer).gamma.tolist() == [1]


def test_spectral_norm_of_a_large_weight_starts_close() -> None:
    weight = torch.randn(1500, 1100)
    layer = nn.Linear(1100, 1500, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    sigma_reparam.sigma_reparam(layer)
    exact = torch.linalg.matrix_norm(weight, 2).item()
    assert the_reparam(layer).gamma.item() == pytest.approx(exact, rel=1e-3)


def test_assigning_a_weight_sets_everything() -> None:
    layer = sigma_reparam.sigma_reparam(nn.Linear(5, 4))
    weight = torch.randn(4, 5)
    layer.weight = weight.clone()
    assert torch.equal(layer.weight, weight)
    exact = torch.linalg.matrix_norm(weight, 2).item()
    assert the_reparam(layer).gamma.item() == pytest.approx(exact, rel=1e-6)


def test_padding_row_stays_zero() -> None:
    table = sigma_reparam.sigma_reparam(nn.Embedding(7, 3, padding_idx=0))
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.tensor([0, 1, 2])).square().sum().backward()
        optimizer.step()
    assert (table.weight[0] == 0).all()


def mlp(widths: tuple[int, ...] = (6, 8, 8, 5)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def unsettle(model: nn.Module) -> None:
    """A stale u, so that one step more or less is seen in every digit."""
    for module in model.modules():
        if isinstance(module, SigmaReparam):
            generator = torch.Generator().manual_seed(module.u.numel())
            module.u.copy_(
                nn.functional.normalize(torch.randn(module.u.shape, generator=generator), dim=0)
            )


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("update", ["forward", "manual"])
@pytest.mark.parametrize("training", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant, update, training) -> None:
    model = sigma_reparam.convert(mlp(), update=update)
    unsettle(model)
    model.train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 6, requires_grad=True)
    model(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_a_layer_used_twice_under_checkpointing_wants_manual_steps() -> None:
    layer = sigma_reparam.sigma_reparam(nn.Linear(5, 5), update="manual")
    unsettle(layer)
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 5, requires_grad=True)
    for one in (layer, twin):
        sigma_reparam.power_step(one)
    layer(layer(x).tanh()).square().sum().backward()
    inner = checkpoint(twin, x, use_reentrant=False).tanh()
    checkpoint(twin, inner, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(gradients(layer), gradients(twin), rtol=0, atol=0)


def test_one_reading_per_step_with_the_cache_of_parametrize() -> None:
    layer = sigma_reparam.sigma_reparam(nn.Linear(5, 5))
    unsettle(layer)
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 5)
    with parametrize.cached():
        twin(twin(x).tanh())
    layer(x)
    assert torch.equal(the_reparam(layer).u, the_reparam(twin).u)


def test_two_forwards_before_one_backward() -> None:
    # As in a GAN: the buffers move on while the first graph still needs its own u and v.
    layer = sigma_reparam.sigma_reparam(nn.Linear(6, 4, dtype=torch.float64))
    unsettle(layer)
    weight, gamma = layer.parametrizations.weight.original, the_reparam(layer).gamma
    start = the_reparam(layer).u.clone()
    x, y = torch.randn(2, 3, 6, dtype=torch.float64)
    (layer(x).square().sum() - layer(y).square().sum()).backward()
    w = weight.detach().clone().requires_grad_()
    g = gamma.detach().clone().requires_grad_()

    def what(u):
        v = nn.functional.normalize((w @ u).detach(), dim=0)
        u = nn.functional.normalize((w.T @ v).detach(), dim=0)
        return g / (v @ w @ u) * w, u

    first, u = what(start)
    second, _ = what(u)
    bias = layer.bias.detach()
    ((x @ first.T + bias).square().sum() - (y @ second.T + bias).square().sum()).backward()
    torch.testing.assert_close(weight.grad, w.grad)
    torch.testing.assert_close(gamma.grad, g.grad)


def test_accumulation_takes_more_steps_towards_the_same_sigma() -> None:
    layer = sigma_reparam.sigma_reparam(nn.Linear(6, 4, dtype=torch.float64))
    exact = torch.linalg.matrix_norm(layer.parametrizations.weight.original, 2).item()
    unsettle(layer)
    errors = []
    for _ in range(6):
        layer(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
        errors.append(exact - float(the_reparam(layer).measured))
    assert all(later <= earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize(
    ("update", "checkpointed", "backend"),
    [
        ("forward", False, "aot_eager"),
        ("forward", False, "aot_eager_decomp_partition"),
        ("manual", False, "aot_eager"),
        ("manual", True, "aot_eager_decomp_partition"),
    ],
)
def test_compiled_training_is_the_same(update: str, checkpointed: bool, backend: str) -> None:
    model = sigma_reparam.convert(mlp(), update=update)
    unsettle(model)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()

    def run(model, x):
        if checkpointed:
            return checkpoint(model, x, use_reentrant=False).square().sum()
        return model(x).square().sum()

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for one, function in ((model, run), (twin, compiled)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            function(one, x).backward()
            optimizer.step()
            if update == "manual":
                sigma_reparam.power_step(one)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(twin.eval(), x), compiled(model.eval(), x))


def test_half_precision() -> None:
    model = mlp((16, 32, 8)).to(torch.bfloat16)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    before = model(x)
    sigma_reparam.convert(model)
    assert torch.equal(model(x), before)
    reparam = the_reparam(model[0])
    assert reparam.gamma.dtype == reparam.u.dtype == torch.float32

    # Cast afterwards: the vectors and gamma keep their digits.
    late = sigma_reparam.convert(mlp((16, 32, 8)))
    gamma = the_reparam(late[0]).gamma.detach().clone()
    raw = late[0].parametrizations.weight.original.detach().clone()
    late(torch.randn(2, 16)).sum().backward()
    late.to(torch.bfloat16)
    assert the_reparam(late[0]).gamma.grad.dtype == torch.float32
    assert torch.equal(the_reparam(late[0]).gamma.detach(), gamma)
    assert late[0].weight.dtype == torch.bfloat16
    expected = reference(raw.bfloat16(), the_reparam(late[0]).u, gamma)[0]
    torch.testing.assert_close(late[0].weight.double(), expected, rtol=2**-8, atol=1e-6)
    assert late.double()[0].weight.dtype == torch.float64


def test_autocast_does_not_touch_the_power_iteration() -> None:
    layer = sigma_reparam.sigma_reparam(nn.Linear(64, 64))
    unsettle(layer)
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.weight
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert torch.equal(inside, twin.weight)


def test_multihead_attention_and_encoder_layers() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    before = model.eval()(x)
    sigma_reparam.convert(model)
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():  # the fast path of PyTorch
        torch.testing.assert_close(model(x), before)
    assert set(sigma_reparam.spectral_norms(model)) == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }
    model.train()(x).sum().backward()
    sigma_reparam.remove(model)
    torch.testing.assert_close(model.eval()(x), before)
    other = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert len(sigma_reparam.spectral_norms(sigma_reparam.convert(other))) == 4


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.arange(10)[None]}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(10)[None]}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    return ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 1, 8, 8)}


MODELS = {"gpt2": (gpt2, ("lm_head",), 8), "llama": (llama, (), 15), "vit": (vit, (), 14)}


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    make, exclude, count = MODELS[name]
    model, inputs = make()
    before = model(**inputs).logits
    sigma_reparam.convert(model, exclude=exclude)
    norms = sigma_reparam.spectral_norms(model)
    assert len(norms) == count
    assert torch.equal(model(**inputs).logits, before)
    for norm in norms.values():
        assert norm.measured == norm.gamma

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for _, p in model.named_parameters())
    model.eval()
    trained = model(**inputs).logits
    assert not torch.allclose(trained, before)

    # Round trip of the state, by PyTorch and by save_pretrained.
    twin, _ = make()
    sigma_reparam.convert(twin, exclude=exclude)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(**inputs).logits, trained)
    model.save_pretrained(tmp_path / "converted", save_original_format=False)
    twin, _ = make()
    sigma_reparam.convert(twin, exclude=exclude)
    missing = twin.load_state_dict(
        load_file(tmp_path / "converted" / "model.safetensors"), strict=False
    )
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # tied: saved once
    assert torch.equal(twin(**inputs).logits, trained)

    # Folded, it is a plain checkpoint.
    sigma_reparam.remove(model)
    assert torch.equal(model(**inputs).logits, trained)
    assert not any(isinstance(module, SigmaReparam) for module in model.modules())
    model.save_pretrained(tmp_path / "folded")
    loaded = type(model).from_pretrained(tmp_path / "folded").eval()
    assert torch.equal(loaded(**inputs).logits, trained)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(use_reentrant: bool) -> None:
    model, inputs = llama()
    sigma_reparam.convert(model.train())
    unsettle(model)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for one in (model, twin):
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)


def test_converting_twice_changes_nothing() -> None:
    model = sigma_reparam.convert(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)))
    kinds = [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    sigma_reparam.convert(model)
    assert [type(module) for module in model.modules()] == kinds
    assert isinstance(model[0], nn.Conv2d)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_exclude() -> None:
    def names(**options) -> set[str]:
        model = nn.ModuleDict({"block": mlp((3, 3, 3)), "head": nn.Linear(3, 2)})
        return set(sigma_reparam.spectral_norms(sigma_reparam.convert(model, **options)))

    everything = {"block.0.weight", "block.2.weight", "head.weight"}
    assert names() == everything
    assert names(exclude=("head",)) == {"block.0.weight", "block.2.weight"}
    assert names(exclude=("block",)) == {"head.weight"}
    assert names(exclude=("block.0",)) == {"block.2.weight", "head.weight"}
    assert names(exclude=("b*.2", "he?d")) == {"block.0.weight"}
    assert names(exclude=lambda name, module: name.endswith("0")) == everything - {"block.0.weight"}
    assert names(modules=(nn.Linear,)) == everything


def test_frozen_weights_get_a_frozen_gamma() -> None:
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    sigma_reparam.sigma_reparam(layer)
    assert not the_reparam(layer).gamma.requires_grad


def tied() -> nn.Module:
    model = nn.ModuleDict({"table": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
    model["head"].weight = model["table"].weight
    return model


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))


def filled(value: float) -> nn.Linear:
    layer = nn.Linear(3, 3)
    nn.init.constant_(layer.weight, value)
    return layer


one = sigma_reparam.sigma_reparam
BAD = {
    "weight: expected a weight other than zero": lambda: one(filled(0.0)),
    "weight: expected finite": lambda: one(filled(float("nan"))),
    "module: expected a floating point parameter 'weight'": lambda: one(nn.Tanh()),
    "of 2 dimensions": lambda: one(nn.LayerNorm(3)),
    "meta device": lambda: one(nn.Linear(3, 3, device="meta")),
    "sparse=True or max_norm": lambda: one(nn.Embedding(3, 3, max_norm=1.0)),
    "parametrized already": lambda: one(one(nn.Linear(3, 3))),
    "gamma_init": lambda: one(nn.Linear(3, 3), gamma_init="sigma"),
    "update": lambda: one(nn.Linear(3, 3), update="never"),
    "u: expected a vector": lambda: spectral_norm_estimate(torch.ones(3, 2), torch.ones(3)),
    "model: the weight head.weight is tied.* table.weight, head.weight": lambda: (
        sigma_reparam.convert(tied())
    ),
    "model: expected at least one layer": lambda: sigma_reparam.convert(nn.Tanh()),
    "exclude: 'x' matches no": lambda: sigma_reparam.convert(mlp(), exclude=("x",)),
    "exclude: expected a sequence": lambda: sigma_reparam.convert(mlp(), exclude="0"),
    "model: 1: .*exclude": lambda: sigma_reparam.convert(nn.Sequential(mlp(), filled(0.0))),
    "model: 0: .*parametrized": lambda: sigma_reparam.convert(nn.Sequential(normed())),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_a_refused_conversion_changes_nothing() -> None:
    model = nn.Sequential(mlp(), filled(0.0))
    with pytest.raises(ValueError, match="zero"):
        sigma_reparam.convert(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


@pytest.mark.slow
def test_two_processes_with_fully_shard(tmp_path: Path) -> None:
    """Three training steps of a sharded model equal those of one process on the whole batch."""
    script = Path(__file__).parent / "sharded_step.py"
    meeting = f"file://{tmp_path / 'meeting'}"
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", meeting, str(tmp_path / "sharded.pt")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs

    from tests.nn import sharded_step

    expected = sharded_step.single_process()
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    torch.testing.assert_close(sharded, expected, rtol=1e-5, atol=1e-6)
