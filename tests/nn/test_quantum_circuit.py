"""The circuit: golden vectors, gates as full matrices, PennyLane, shots, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.nn.quantum_circuit import CircuitMap, measured
from attending.nn.quantum_gates import circuit_unitary, num_angles, unistochastic
from tests.nn import reference_doubly_stochastic as reference

GOLDEN = Path(__file__).parent.parent / "golden" / "quantum-doubly-stochastic"


def golden(name):
    with np.load(GOLDEN / f"quantum_dsm_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def of_golden(vectors):
    return CircuitMap(
        2 ** int(vectors["data_qubits"]),
        int(vectors["aux_qubits"]),
        int(vectors["layers"]),
        theta=vectors["theta"],
    )


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(ours, expected, tolerance=1e-9):
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["n2_aux1", "n4_aux3"])
def test_golden(name):
    vectors = golden(name)
    circuit = of_golden(vectors)
    close(circuit.angles(vectors["M"]), vectors["angles"])
    close(circuit(vectors["M"]), vectors["P"])
    unitary = circuit_unitary(vectors["angles"], circuit.num_qubits, circuit.num_layers)
    close(unitary, torch.complex(vectors["U_re"], vectors["U_im"]))
    random = torch.complex(vectors["randU_re"], vectors["randU_im"])
    close(unistochastic(random, circuit.num_tokens), vectors["randU_P"])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.integers(0, 3))
def test_gates_are_those_of_full_matrices(seed, qubits, layers):
    angles = normal(seed, 2, num_angles(qubits, layers))
    ours = circuit_unitary(angles, qubits, layers)
    for unitary, row in zip(ours, angles, strict=True):
        close(unitary, reference.circuit_unitary(row, qubits, layers))
    eye = torch.eye(2**qubits, dtype=torch.complex128)
    close(ours @ ours.mH, eye.expand_as(ours))
    close(circuit_unitary(0 * angles[0], qubits, layers), eye)
    for tokens in (2**power for power in range(qubits + 1)):
        found = unistochastic(ours, tokens)
        one = torch.ones(2, tokens, dtype=torch.float64)
        close(found.sum(-1), one)
        close(found.sum(-2), one)


def test_without_auxiliary_qubits_the_map_is_the_squared_unitary():
    circuit = CircuitMap(4, 0, 3, dtype=torch.float64)
    scores = normal(0, 4, 4)
    unitary = circuit_unitary(circuit.angles(scores), 2, 3)
    close(circuit(scores), unitary.abs().square())
    close(circuit(0 * scores), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "flipped", [[13], [11, 14], [3, 6, 12], [3, 7, 9, 10], [0, 2, 5, 8, 9, 10, 14]]
)
def test_signs_that_the_map_does_not_see(flipped):
    """These five and what they combine to are the 32 patterns, found by trying all 2^16."""
    scores, signs = normal(9, 16), torch.ones(16, dtype=torch.float64)
    signs[flipped] = -1
    pair = torch.stack([scores, signs * scores]).view(2, 4, 4)
    for aux_qubits, seen in ((3, False), (2, True)):
        first, second = CircuitMap(4, aux_qubits, 8, dtype=torch.float64)(pair)
        assert bool((first - second).abs().max() > 1e-3) == seen
        if not seen:
            close(first, second)


@pytest.mark.parametrize("layers", [0, 2])
def test_gradients(layers):
    circuit = CircuitMap(4, 1, layers, mode="trainable", dtype=torch.float64)
    scores = normal(1, 2, 4, 4).requires_grad_()

    def function(scores, theta):
        return torch.func.functional_call(circuit, {"theta": theta}, (scores,))

    assert torch.autograd.gradcheck(function, (scores, circuit.theta))


def test_the_memory_of_the_backward_pass_does_not_grow_with_the_layers():
    def kept(layers):
        bytes_kept = 0

        def pack(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes if tensor.numel() > 4096 else 0  # matrices, not gates
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            angles = normal(2, num_angles(7, layers)).requires_grad_()
            circuit_unitary(angles, 7, layers)
        return bytes_kept

    assert kept(12) == kept(2) > 0


def test_modes_and_state():
    static, trained = CircuitMap(4, 1, 2), CircuitMap(4, 1, 2, mode="trainable")
    assert not list(static.parameters())
    assert [name for name, _ in trained.named_parameters()] == ["theta"]
    assert static.num_qubits == 3
    assert CircuitMap(8).num_qubits == 3 + 4
    trained.load_state_dict(static.state_dict())
    scores = normal(3, 4, 4, dtype=torch.float32)
    assert torch.equal(trained(scores), static(scores))
    assert "shots=None" in repr(static)
    assert bool((static.theta.abs() <= 1).all())


def test_precision():
    circuit = CircuitMap(8, 1, 4)
    scores = normal(4, 3, 8, 8, dtype=torch.float32)
    found = circuit(scores)
    assert found.dtype == torch.float32
    close(found, circuit.double()(scores.double()).float(), 1e-5)
    circuit.float()
    half = circuit(scores.bfloat16())
    close(half, circuit(scores.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(circuit(scores), found)


def test_shots():
    torch.manual_seed(0)
    circuit = CircuitMap(4, 1, 2, dtype=torch.float64)
    scores = normal(5, 200, 4, 4).requires_grad_()
    exact = circuit(scores)
    circuit.shots = 500
    found = circuit(scores)
    counts = found.detach() * 500 / 4
    close(counts, counts.round(), 1e-6)
    close(counts.sum((-2, -1)), torch.full((200,), 500.0, dtype=torch.float64), 1e-6)
    # The variance of an entry is T P (1 - P / T) / shots.
    expected = (4 * exact.detach() * (1 - exact.detach() / 4) / 500).mean()
    assert 0.9 < float((found - exact).detach().square().mean() / expected) < 1.1
    weights = normal(6, 200, 4, 4)
    grads = [torch.autograd.grad((m * weights).sum(), scores)[0] for m in (found, exact)]
    close(*grads)
    certain = torch.eye(4, dtype=torch.float64)
    close(measured(certain, 7).diagonal().sum(), torch.tensor(4.0, dtype=torch.float64))


@pytest.mark.parametrize("parted", [False, True])
def test_pennylane_measures_the_same(parted):
    pytest.importorskip("pennylane")
    from attending.nn.quantum_pennylane import pennylane_map

    vectors = golden("n4_aux3")
    circuit = of_golden(vectors)
    close(pennylane_map(circuit, vectors["M"], parted=parted), vectors["P"])


def test_pennylane_with_shots_and_gradients():
    pytest.importorskip("pennylane")
    from attending.nn.quantum_pennylane import pennylane_map

    circuit = CircuitMap(2, 1, 1, dtype=torch.float64)
    scores = normal(7, 2, 2).requires_grad_()
    weights = normal(8, 2, 2)
    theirs, ours = pennylane_map(circuit, scores), circuit(scores)
    grads = [torch.autograd.grad((m * weights).sum(), scores)[0] for m in (theirs, ours)]
    close(*grads)
    counted = pennylane_map(circuit, scores.detach(), shots=4000)
    assert float((counted - ours.detach()).abs().max()) < 0.15


def test_wrong_arguments():
    circuit, scores = CircuitMap(4, 1, 1), torch.randn(2, 4, 4)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu()
    for match, call in {
        "num_tokens: expected a power of two": lambda: CircuitMap(6),
        "aux_qubits, num_layers": lambda: CircuitMap(4, -1),
        "mode: expected": lambda: CircuitMap(4, mode="mixed"),
        "shots: expected": lambda: CircuitMap(4, shots=0),
        r"theta: expected \[17\]": lambda: CircuitMap(4, 1, 1, theta=torch.ones(3)),
        "scores: expected 4 queries": lambda: circuit(torch.randn(8, 8)),
        "attn_mask: expected none that hides": lambda: circuit(scores, hidden),
        r"angles: expected \[\*batch, 17\]": lambda: circuit_unitary(torch.ones(3), 3, 1),
        "num_tokens: expected a divisor": lambda: unistochastic(torch.eye(4).cfloat(), 3),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    assert bool(circuit(scores, torch.ones(4, 4, dtype=torch.bool)).isfinite().all())
