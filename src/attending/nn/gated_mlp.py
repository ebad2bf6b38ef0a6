"""A gated MLP in the place of attention: what a model is without any mixing of tokens."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, three matrices without bias.

    The "MLP" variant of Xue et al. ("Deconstructing Attention", 2510.11602, equations 4-5), which
    takes the place of attention: every token is treated alone. The paper's sizes are equal in
    parameters; the width that this takes, `4 dim / 3` for the `4 dim^2` of multi-head attention, is
    our inference, see `matched_width`.

    Args:
        dim: of the tokens.
        hidden_dim: of the gate.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or hidden_dim < 1:
            raise ValueError(
                f"dim, hidden_dim: expected at least 1 each, got {dim} and {hidden_dim}."
            )
        self.gate = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The update of each token, which depends on that token alone."""
        update: Tensor = self.down(silu(self.gate(hidden)) * self.up(hidden))
        return update


def matched_width(num_parameters: int, dim: int) -> int:
    """The `hidden_dim` with which a `GatedMLP` of this dim has about so many parameters."""
    return max(1, round(num_parameters / (3 * dim)))
