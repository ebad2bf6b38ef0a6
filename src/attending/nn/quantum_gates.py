"""The unitary of the circuit of `attending.nn.quantum_circuit`, simulated and differentiable.

Gates act on 2 of q qubits, so on a matrix of `2^q x 2^q` they are small matrix products; a whole
batch of circuits, each with its own angles, runs at once.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def num_angles(num_qubits: int, num_layers: int) -> int:
    """How many angles the circuit has: `3 q + 4 (q - 1) layers`."""
    return 3 * num_qubits + 4 * (num_qubits - 1) * num_layers


def qubit_pairs(num_qubits: int) -> list[int]:
    """The first wires of a layer's blocks, in order: (0,1), (2,3), ..., then (1,2), (3,4), ..."""
    return [*range(0, num_qubits - 1, 2), *range(1, num_qubits - 1, 2)]


def circuit_unitary(
    angles: Float[Tensor, "*batch angles"], num_qubits: int, num_layers: int
) -> Complex[Tensor, "*batch states states"]:
    """The unitary of the circuit; the identity where all angles are 0.

    First RZ, RY, RZ on each wire. Then in each layer, for each pair (i, i + 1) of `qubit_pairs`:
    CNOT with control i; RY, RZ on i and RY, RX on i + 1; CNOT. The angles are in that order; wire 0
    is the most significant bit of a state's number; `RX(t) = exp(-i t X / 2)`.

    The backward pass takes the gates back one by one, which a unitary allows, instead of keeping
    what each of them gave: its memory does not grow with the number of layers.

    Args:
        angles: in radians, `num_angles(num_qubits, num_layers)` of them. Half precision is computed
            in float32.
        num_qubits, num_layers: the size of the circuit, at least 1 and 0.

    Returns:
        `2^num_qubits` rows (outcomes) and columns (inputs), complex64, or complex128 of float64.

    Raises:
        ValueError: for another number of angles.
    """
    expected = num_angles(num_qubits, num_layers)
    if angles.dim() < 1 or angles.shape[-1] != expected:
        raise ValueError(
            f"angles: expected [*batch, {expected}] for {num_qubits} qubits and {num_layers} "
            f"layers, got {list(angles.shape)}."
        )
    states = 2**num_qubits
    flat = angles.to(torch.promote_types(angles.dtype, torch.float32)).reshape(-1, expected)
    first, rest = flat[:, : 3 * num_qubits], flat[:, 3 * num_qubits :]
    singles = _single(first.reshape(-1, num_qubits, 3))
    unitary = singles[:, 0]
    for wire in range(1, num_qubits):
        unitary = _kron(unitary, singles[:, wire])
    if rest.shape[1]:
        gates = _block(rest.reshape(len(flat), -1, 4))
        wires = tuple(qubit_pairs(num_qubits) * num_layers)
        unitary = _Evolution.apply(unitary, gates, wires)  # type: ignore[no-untyped-call]
    found: Tensor = unitary.reshape(*angles.shape[:-1], states, states)
    return found


def unistochastic(
    unitary: Complex[Tensor, "*batch states states"], num_tokens: int
) -> Float[Tensor, "*batch tokens tokens"]:
    """The map of a unitary: its squared magnitudes, summed in blocks and divided by their size.

    With as many tokens as states it is `|U|^2`. Rows and columns sum to 1 for any unitary.

    Raises:
        ValueError: if the states are no multiple of `num_tokens`.
    """
    states = unitary.shape[-1]
    if num_tokens < 1 or states % num_tokens:
        raise ValueError(
            f"num_tokens: expected a divisor of the {states} states of unitary, got {num_tokens}."
        )
    block = states // num_tokens
    squares = unitary.real.square() + unitary.imag.square()
    split = squares.unflatten(-1, (num_tokens, block)).unflatten(-3, (num_tokens, block))
    summed: Tensor = split.sum((-3, -1)) / block
    return summed


def _single(angles: Tensor) -> Tensor:
    """[..., 2, 2] of RZ(a), then RY(b), then RZ(c)."""
    a, b, c = angles.unbind(-1)
    zero, half, plus, minus = torch.zeros_like(a), b / 2, (a + c) / 2, (a - c) / 2
    cos, sin = torch.complex(half.cos(), zero), torch.complex(half.sin(), zero)
    plus_phase, minus_phase = _phase(plus), _phase(minus)
    top = torch.stack([plus_phase.conj() * cos, -minus_phase * sin], -1)
    bottom = torch.stack([minus_phase.conj() * sin, plus_phase * cos], -1)
    return torch.stack([top, bottom], -2)


def _block(angles: Tensor) -> Tensor:
    """[..., 4, 4] of CNOT, RY(t0) RZ(t1) on the control and RY(t2) RX(t3) on the other, CNOT."""
    t0, t1, t2, t3 = angles.unbind(-1)
    zero = torch.zeros_like(t0)
    control = _single(torch.stack([zero, t0, t1], -1))
    # RX(t) = RZ(-pi/2) RY(t) RZ(pi/2), written out as [[cos, -i sin], [-i sin, cos]].
    cos, sin = torch.complex((t3 / 2).cos(), zero), torch.complex(zero, -(t3 / 2).sin())
    rx = torch.stack([torch.stack([cos, sin], -1), torch.stack([sin, cos], -1)], -2)
    other = rx @ _single(torch.stack([zero, t2, zero], -1))
    swapped = torch.tensor([0, 1, 3, 2], device=angles.device)
    return _kron(control, other)[..., swapped, :][..., swapped]


def _phase(angle: Tensor) -> Tensor:
    return torch.complex(angle.cos(), angle.sin())


def _kron(left: Tensor, right: Tensor) -> Tensor:
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)


def _apply(gate: Tensor, states: Tensor, wire: int) -> Tensor:
    """The 4 x 4 gate on wires (wire, wire + 1) of the rows of `states`."""
    split = states.reshape(len(states), 2**wire, 4, -1)
    return (gate[:, None] @ split).view(states.shape)


class _Evolution(torch.autograd.Function):
    """Gates [batch, gates, 4, 4] in turn on [batch, states, columns]; `wires` says where."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        states: Tensor,
        gates: Tensor,
        wires: tuple[int, ...],
    ) -> Tensor:
        for index, wire in enumerate(wires):
            states = _apply(gates[:, index], states, wire)
        ctx.save_for_backward(gates, states)
        ctx.wires = wires  # type: ignore[attr-defined]
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gates, states = ctx.saved_tensors
        grad_gates = torch.empty_like(gates)
        for index in reversed(range(len(ctx.wires))):
            wire, back = ctx.wires[index], gates[:, index].mH
            states = _apply(back, states, wire)  # what they were before the gate
            after = grad.reshape(len(grad), 2**wire, 4, -1)
            before = states.reshape(len(grad), 2**wire, 4, -1)
            grad_gates[:, index] = (after @ before.mH).sum(1)
            grad = _apply(back, grad, wire)
        return grad, grad_gates, None
