"""Doubly stochastic maps written down plainly, in float64 and loops where that is plainest."""

import math

import torch
from torch import Tensor


def sinkhorn(scores: Tensor, half_steps: int, visible: Tensor | None = None) -> Tensor:
    """One matrix: exponentials, divided by row sums and column sums in turn, not in logs."""
    scores = scores.double()
    weights = torch.exp(scores - scores.max())
    if visible is not None:
        weights = weights * visible
    rows = float((weights.sum(1) > 0).sum())
    columns = float((weights.sum(0) > 0).sum())
    for step in range(half_steps):
        sums = weights.sum(1, keepdim=True) if step % 2 == 0 else weights.sum(0, keepdim=True)
        target = 1.0 if step % 2 == 0 else rows / columns
        weights = target * weights / torch.where(sums > 0, sums, 1.0)
    return weights


def gram_schmidt(scores: Tensor) -> Tensor:
    """Squares of the columns, made orthogonal from left to right."""
    done: list[Tensor] = []
    for column in scores.double().T:
        for other in done:
            column = column - (column @ other) * other
        done.append(column / column.norm())
    return torch.stack(done, 1).square()


def dykstra(scores: Tensor, rounds: int = 20_000) -> Tensor:
    """The nearest doubly stochastic matrix, by alternating projections with corrections."""
    size = len(scores)
    found, correction = scores.double(), torch.zeros(size, size, dtype=torch.float64)
    for _ in range(rounds):
        wrong_rows = (found.sum(1, keepdim=True) - 1) / size
        flat = found - wrong_rows
        flat = flat - (flat.sum(0, keepdim=True) - 1) / size
        positive = (flat + correction).clamp_min(0.0)
        correction = flat + correction - positive
        found = positive
    return found


def norm_softmax(raw: Tensor, cap: float, statistic: str) -> Tensor:
    """Row by row, with the variance and the standard deviation of torch."""
    rows = []
    for row in raw.double():
        spread = row.var(correction=0) if statistic == "variance" else row.std(correction=1)
        rows.append(torch.softmax(row / min(cap, float(spread)), 0))
    return torch.stack(rows)


def circuit_unitary(angles: Tensor, qubits: int, layers: int) -> Tensor:
    """Every gate as a matrix of the full size, by Kronecker products with identities."""
    turn = iter(angles.tolist())
    cnot = torch.eye(4, dtype=torch.complex128)[[0, 1, 3, 2]]

    def on_wire(gate: Tensor, wire: int, width: int) -> Tensor:
        before = torch.eye(2**wire, dtype=torch.complex128)
        after = torch.eye(2 ** (qubits - wire - width), dtype=torch.complex128)
        return torch.kron(torch.kron(before, gate), after)

    unitary = torch.eye(2**qubits, dtype=torch.complex128)
    for wire in range(qubits):
        for axis in "zyz":
            unitary = on_wire(rotation(axis, next(turn)), wire, 1) @ unitary
    for _ in range(layers):
        for first in [*range(0, qubits - 1, 2), *range(1, qubits - 1, 2)]:
            unitary = on_wire(cnot, first, 2) @ unitary
            for axis, wire in (("y", first), ("z", first), ("y", first + 1), ("x", first + 1)):
                unitary = on_wire(rotation(axis, next(turn)), wire, 1) @ unitary
            unitary = on_wire(cnot, first, 2) @ unitary
    return unitary


def rotation(axis: str, angle: float) -> Tensor:
    """exp(-i angle sigma / 2)."""
    sigma = {
        "x": [[0, 1], [1, 0]],
        "y": [[0, -1j], [1j, 0]],
        "z": [[1, 0], [0, -1]],
    }[axis]
    return torch.linalg.matrix_exp(-0.5j * angle * torch.tensor(sigma, dtype=torch.complex128))


def default_scale(query: Tensor) -> float:
    """That of `scaled_dot_product_attention`."""
    return 1 / math.sqrt(query.shape[-1])
