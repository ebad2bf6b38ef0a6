"""The circuit of `attending.nn.quantum_circuit` in PennyLane: for its simulators and hardware.

Needs the extra `quantum`. A device measures the map of one matrix of scores at a time, on
`2 * num_qubits` wires; `CircuitMap` is the same map, computed in torch for whole batches.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attending.nn.quantum_circuit import CircuitMap
from attending.nn.quantum_gates import qubit_pairs


def pennylane_map(
    circuit: CircuitMap,
    scores: Float[Tensor, "*batch tokens tokens"],
    device: str = "default.qubit",
    shots: int | None = None,
    parted: bool = False,
) -> Float[Tensor, "*batch tokens tokens"]:
    """The map of each matrix of scores, as a PennyLane device finds it.

    Args:
        circuit: its theta and its size are used; its own `shots` is not.
        scores: as for `CircuitMap`.
        device: a name that `pennylane.device` knows.
        shots: measurements for each matrix; None asks a simulator for exact probabilities.
        parted: put half of the layers on the other side of the Bell pairs, which halves the depth.

    Returns:
        The map, in float64 or as precise as the device is. It can be differentiated where the
        device can.

    Raises:
        ImportError: without PennyLane.
        ValueError: for scores of another size.
    """
    angles = circuit.angles(scores)
    node = bell_node(circuit, device, shots, parted)
    tokens = circuit.num_tokens
    maps = [torch.as_tensor(node(row)) * tokens for row in angles.reshape(-1, angles.shape[-1])]
    return torch.stack(maps).view(*scores.shape[:-2], tokens, tokens)


def bell_node(
    circuit: CircuitMap,
    device: str = "default.qubit",
    shots: int | None = None,
    parted: bool = False,
) -> Callable[[Float[Tensor, " angles"]], Any]:
    """A QNode from angles to the joint distribution of the data qubits of both halves.

    Its value times the number of tokens is the map, row after row. With a frame around it that
    makes the angles it is what `pennylane.qnn.TorchLayer` takes. Arguments as in `pennylane_map`.
    """
    qml = _pennylane()
    qubits, layers = circuit.num_qubits, circuit.num_layers
    data = circuit.num_tokens.bit_length() - 1
    near, far = list(range(qubits)), list(range(qubits, 2 * qubits))

    def run(angles: Tensor) -> Any:
        for first, second in zip(near, far, strict=True):
            qml.Hadamard(first)
            qml.CNOT([first, second])
        gates = _gates(angles, qubits, layers)
        # (A x 1)|Bell> = (1 x A transposed)|Bell>: what comes first in U may act on the other half.
        start = qubits * 3 + 6 * (qubits - 1) * (layers // 2) if parted else 0
        for name, wires, angle in reversed(gates[:start]):
            sign = -1 if name == "RY" else 1  # the other gates are symmetric matrices
            _place(qml, name, [far[wire] for wire in wires], angle, sign)
        for name, wires, angle in gates[start:]:
            _place(qml, name, [near[wire] for wire in wires], angle, 1)
        return qml.probs(wires=near[:data] + far[:data])

    node = qml.QNode(run, qml.device(device, wires=2 * qubits), interface="torch")
    if shots is not None:
        node = qml.set_shots(node, shots=shots)
    return node  # type: ignore[no-any-return]


_Gate = tuple[str, tuple[int, ...], Tensor | None]


def _gates(angles: Tensor, qubits: int, layers: int) -> list[_Gate]:
    turn = iter(angles.unbind(-1))
    gates: list[_Gate] = [
        (name, (wire,), next(turn)) for wire in range(qubits) for name in ("RZ", "RY", "RZ")
    ]
    for first in qubit_pairs(qubits) * layers:
        second = first + 1
        gates.append(("CNOT", (first, second), None))
        gates += [("RY", (first,), next(turn)), ("RZ", (first,), next(turn))]
        gates += [("RY", (second,), next(turn)), ("RX", (second,), next(turn))]
        gates.append(("CNOT", (first, second), None))
    return gates


def _place(qml: Any, name: str, wires: list[int], angle: Tensor | None, sign: int) -> None:
    if angle is None:
        qml.CNOT(wires)
    else:
        getattr(qml, name)(sign * angle, wires=wires)


def _pennylane() -> Any:
    try:
        import pennylane
    except ImportError as error:
        raise ImportError(
            "PennyLane is needed to run the circuit on its devices; install it with "
            'pip install "attending[quantum]". CircuitMap does not need it.'
        ) from error
    return pennylane
