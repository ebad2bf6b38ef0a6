"""A doubly stochastic map from a quantum circuit, simulated exactly and differentiably in torch.

From "Quantum Doubly Stochastic Transformers" (QDSFormer, 2504.16275), whose circuit is that of
QontOT (2402.14991). The squared magnitudes of any unitary matrix form a doubly stochastic matrix.
The scores turn the angles of the gates of a circuit; its unitary U on `q = data + aux` qubits gives

    map[i, j] = 2^-aux * sum over a, b of |U[(i, a), (j, b)]|^2          i, j of 2^data tokens

On a quantum computer that is a circuit on 2 q qubits: q Bell pairs, U on one half, the data qubits
of both halves measured; `2^data * probability` is the map. Simulated, U alone is needed, as a
matrix of `2^q x 2^q`: q = 2 log2(tokens) + 1 in the paper, so 128 x 128 for 8 tokens and 512 x 512
for 16, for each head of each sequence. This is for maps of up to some 16 tokens.

What is certain and what is not. The paper describes its gates in words and its code is not public.
That the map is the block sum above is our reading, and the circuit is ours: it agrees with the
paper's description (two-qubit blocks of four angles in a checkerboard, the identity at zero) and
with the one parameter count that it gives. How the scores are repeated over the angles, and whether
they carry the factor `1 / sqrt(head_dim)`, the paper does not say either.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attending.nn.normalizers import check_scores
from attending.nn.quantum_gates import circuit_unitary, num_angles, unistochastic


class CircuitMap(nn.Module):
    """Scores to a map, by a circuit whose angles are `theta * scores`.

        angles = theta * (the scores, row after row, repeated until there is one for each angle)
        map    = unistochastic(circuit_unitary(angles))

    A normaliser for `attending.nn.doubly_stochastic_attention` in small encoders. Scores of 0 give
    the identity, not an even map. The map is periodic in the scores, does not follow permutations
    of the tokens, and with many qubits and layers its gradient vanishes.

    Where a layer has as many angles as there are scores, each score turns the same gate in every
    layer, and changes of sign that are a change of basis do nothing. So it is for 4 tokens with the
    default of 3 auxiliary qubits: 32 patterns of signs share each map. With 2 each has its own.

    Args:
        num_tokens: of queries, and of keys: a power of two.
        aux_qubits: qubits that are not measured; `log2(num_tokens) + 1` by default, as the paper.
        num_layers: layers of two-qubit blocks; the paper uses 16.
        mode: "static" keeps theta as it is, which the paper found as good as training it and uses
            for its results; "trainable" makes it a parameter.
        theta: the factors, [angles]. By default they are drawn evenly from (-1, 1), as in the
            paper's study of expressivity; those of its results are not published.
        shots: None is exact. A number measures the circuit as often, in training and in evaluation:
            the map is then a multiple of `num_tokens / shots`, its rows and columns sum to one on
            average only, and the gradient is that of the exact map. An error of eps in the entries
            takes about `num_tokens^2 / eps^2` shots.
        device, dtype: of theta.

    Raises:
        ValueError: for sizes that do not fit.
    """

    theta: Tensor

    def __init__(
        self,
        num_tokens: int,
        aux_qubits: int | None = None,
        num_layers: int = 16,
        mode: Literal["static", "trainable"] = "static",
        theta: Float[Tensor, " angles"] | None = None,
        shots: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_tokens < 2 or num_tokens & (num_tokens - 1):
            raise ValueError(
                f"num_tokens: expected a power of two, as qubits count so, got {num_tokens}. "
                "Choose another number of tokens; padding would take part in the sums."
            )
        data_qubits = num_tokens.bit_length() - 1
        aux_qubits = data_qubits + 1 if aux_qubits is None else aux_qubits
        if aux_qubits < 0 or num_layers < 0:
            raise ValueError(
                f"aux_qubits, num_layers: expected at least 0, got {aux_qubits} and {num_layers}."
            )
        if mode not in ("static", "trainable"):
            raise ValueError(f'mode: expected "static" or "trainable", got {mode!r}.')
        if shots is not None and shots < 1:
            raise ValueError(f"shots: expected None (exact) or at least 1, got {shots}.")
        self.num_tokens, self.num_layers, self.shots = num_tokens, num_layers, shots
        self.num_qubits = data_qubits + aux_qubits
        count = num_angles(self.num_qubits, num_layers)
        if theta is None:
            theta = torch.empty(count, device=device, dtype=dtype).uniform_(-1.0, 1.0)
        elif tuple(theta.shape) != (count,):
            raise ValueError(
                f"theta: expected [{count}] for {self.num_qubits} qubits and {num_layers} layers, "
                f"got {list(theta.shape)}."
            )
        theta = theta.detach().clone().to(device=device, dtype=dtype)
        if mode == "trainable":
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta)

    def extra_repr(self) -> str:
        """What `print` shows."""
        trained = isinstance(self.theta, nn.Parameter)
        return (
            f"num_tokens={self.num_tokens}, num_qubits={self.num_qubits}, "
            f"num_layers={self.num_layers}, mode={'trainable' if trained else 'static'!r}, "
            f"shots={self.shots}"
        )

    def angles(
        self, scores: Float[Tensor, "*batch tokens tokens"]
    ) -> Float[Tensor, "*batch angles"]:
        """The angles of the gates, at least in float32.

        Raises:
            ValueError: for scores of another size.
        """
        scores = check_scores(scores, None)
        if tuple(scores.shape[-2:]) != (self.num_tokens, self.num_tokens):
            raise ValueError(
                f"scores: expected {self.num_tokens} queries and keys, as the circuit was made "
                f"for, got {list(scores.shape)}."
            )
        flat = scores.flatten(-2)
        repeats = math.ceil(len(self.theta) / flat.shape[-1])
        repeated = torch.cat([flat] * repeats, -1)[..., : len(self.theta)]
        return self.theta.to(scores.dtype) * repeated

    def forward(
        self,
        scores: Float[Tensor, "*batch tokens tokens"],
        visible: Bool[Tensor, "*#batch tokens tokens"] | None = None,
    ) -> Float[Tensor, "*batch tokens tokens"]:
        """The map, in float32, or float64 of scores in float64.

        Raises:
            ValueError: for scores of another size, or any token that is hidden: all take part.
        """
        if visible is not None and not bool(visible.all()):
            raise ValueError(
                "attn_mask: expected none that hides, since all tokens of a circuit take part in "
                'it and one that were left out would break the sums. Use normalizer="sinkhorn", or '
                "sequences without padding."
            )
        # Complex matrices have no half precision, and autocast no idea of them.
        with torch.autocast(scores.device.type, enabled=False):
            unitary = circuit_unitary(self.angles(scores), self.num_qubits, self.num_layers)
            exact = unistochastic(unitary, self.num_tokens)
            if self.shots is None:
                return exact
            return exact + (measured(exact.detach(), self.shots) - exact.detach())


def measured(
    exact: Float[Tensor, "*batch tokens tokens"], shots: int
) -> Float[Tensor, "*batch tokens tokens"]:
    """The map as `shots` measurements give it: multinomial counts of the pairs (i, j)."""
    chances = exact.flatten(-2).double()
    left = torch.full(chances.shape[:-1], float(shots), dtype=torch.float64, device=exact.device)
    remaining = chances.flip(-1).cumsum(-1).flip(-1)
    counts = []
    for index in range(chances.shape[-1]):
        rest = remaining[..., index]
        share = (chances[..., index] / rest.clamp_min(1e-300)).clamp(0.0, 1.0)
        if index == chances.shape[-1] - 1:
            share = torch.ones_like(share)
        drawn = torch.binomial(left, share)
        left = left - drawn
        counts.append(drawn)
    found = torch.stack(counts, -1) * (exact.shape[-1] / shots)
    return found.view(exact.shape).to(exact.dtype)
