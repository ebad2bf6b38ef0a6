"""The network that frozen-QK attention is compared with: two layers, the first random and frozen.

From "What can a Single Attention Layer Learn? A Study Through the Random Features Lens"
(2307.11353). It reads query and keys as one long vector, so it has to learn from data what
attention has built in: that the order of the keys does not matter.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.nn.ridge import ridge_solution


class RandomFeatureMLP(nn.Module):
    """`f = sum_m relu(<w_m, [x_0; x_1; ..; x_N; 1]>) v_m`, with `w_m` frozen.

    The first layer is Gaussian with variance `1 / (N + 2)`: for a query and keys of length 1 the
    pre-activation is then N(0, 1), as it is in `FrozenAttention`. For a fair comparison give it as
    many units as the other has values, `num_heads * (dim + 1)`: those are what is learned.

        network = RandomFeatureMLP(8, num_keys=8, num_units=1152)
        network.fit(query, key, targets, ridge=1e-4)

    Sets of another size than `num_keys` are refused; there is no mask. (The form is from memory of
    the paper; its scale is ours.)

    Attributes:
        weight: `[units, (num_keys + 1) dim + 1]`, a buffer.
        value: `[units]`, the only parameter, 0 until it is fitted.

    Args:
        dim: numbers in the query and in each key.
        num_keys: N.
        num_units: of the hidden layer.
        seed: where `weight` comes from; torch's own generator is not touched.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1.
    """

    weight: Float[Tensor, "units inputs"]

    def __init__(
        self,
        dim: int,
        num_keys: int,
        num_units: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(dim, num_keys, num_units) < 1:
            raise ValueError(
                "dim, num_keys, num_units: expected at least 1 of each, got "
                f"{dim}, {num_keys} and {num_units}."
            )
        self.dim, self.num_keys, self.num_units = dim, num_keys, num_units
        generator = torch.Generator().manual_seed(seed)
        inputs = (num_keys + 1) * dim + 1
        weight = torch.randn(num_units, inputs, dtype=torch.float64, generator=generator)
        weight /= (num_keys + 2) ** 0.5
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("weight", weight.to(device=device, dtype=dtype))
        self.value = nn.Parameter(torch.zeros(num_units, device=device, dtype=dtype))

    def features(
        self, query: Float[Tensor, "batch dim"], key: Float[Tensor, "batch keys dim"]
    ) -> Float[Tensor, "batch units"]:
        """The hidden layer.

        Raises:
            ValueError: the shapes or dtypes do not fit the network.
        """
        self._check(query, key)
        return self._hidden(query, key, self.weight)

    def forward(
        self, query: Float[Tensor, "batch dim"], key: Float[Tensor, "batch keys dim"]
    ) -> Float[Tensor, "batch"]:
        """One number for each set. Raises as `features` does."""
        return self.features(query, key) @ self.value

    @torch.no_grad()
    def fit(
        self,
        query: Float[Tensor, "batch dim"],
        key: Float[Tensor, "batch keys dim"],
        targets: Float[Tensor, "batch"],
        *,
        ridge: float = 1e-4,
    ) -> "RandomFeatureMLP":
        """Set `value` to the ridge solution, in float64, and return the network.

        Raises:
            ValueError: as `features` and `ridge_solution`.
        """
        self._check(query, key)
        if targets.shape != query.shape[:1]:
            raise ValueError(
                f"targets: expected one number for each set, {list(query.shape[:1])}, got "
                f"{list(targets.shape)}."
            )
        hidden = self._hidden(query.double(), key.double(), self.weight.double())
        self.value.copy_(ridge_solution(hidden, targets[:, None], [ridge])[0, :, 0])
        return self

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{self.dim}, num_keys={self.num_keys}, num_units={self.num_units}"

    def _hidden(self, query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        inputs = torch.cat([query, key.flatten(1), query.new_ones(len(query), 1)], 1)
        return (inputs @ weight.T).relu()

    def _check(self, query: Tensor, key: Tensor) -> None:
        if (
            query.dim() != 2
            or key.dim() != 3
            or len(query) != len(key)
            or query.shape[1:] != (self.dim,)
            or key.shape[1:] != (self.num_keys, self.dim)
        ):
            raise ValueError(
                f"query, key: expected [batch, {self.dim}] and [batch, {self.num_keys}, "
                f"{self.dim}], got {list(query.shape)} and {list(key.shape)}. The network has one "
                "input for each number of each key: the size of the sets is fixed."
            )
        if any(one.dtype != self.weight.dtype for one in (query, key)):
            raise ValueError(
                f"query, key: expected {self.weight.dtype} as the weights, got {query.dtype} and "
                f"{key.dtype}."
            )
