"""Hard routing: a learned router picks one of several projections or numbers for each token.

Forward it is an argmax, so the answer is exactly one entry of the bank; backward the router gets
the gradient of the softmax (straight-through). Nothing balances the load: an entry may die.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def hard_choice(logits: Float[Tensor, "*batch choices"]) -> Float[Tensor, "*batch choices"]:
    """One-hot of the largest logit, with the gradient of the softmax (straight-through).

    The values are exactly 0 and 1; the first of equal logits wins.
    """
    chosen = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return chosen
    soft = logits.softmax(-1)
    return chosen + (soft - soft.detach())


class RoutedProjection(nn.Module):
    """One of a bank of linear projections for each token: `x_i W[argmax(x_i R)]`.

    All projections of the bank are computed and one is taken: the gradient of the router needs
    what the others would have been.

    Args:
        dim: width in and out.
        count: projections in the bank.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        count: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.router = nn.Linear(dim, count, bias=False, **factory)
        self.bank = nn.Parameter(torch.empty(count, dim, dim, **factory))  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.router.weight)
        for weight in self.bank:
            nn.init.xavier_uniform_(weight)

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Project; the bank's weights are `[in, out]`."""
        chosen = hard_choice(self.router(hidden))
        projected = torch.einsum("...d,pde->...pe", hidden, self.bank)
        return (chosen[..., None] * projected).sum(-2)


class RoutedScalar(nn.Module):
    """One of a bank of learned numbers for each token: `values[argmax(x_i R)]`.

    Args:
        dim: width of what the router sees.
        values: the bank, a parameter that others may share.
    """

    def __init__(self, dim: int, values: nn.Parameter) -> None:
        super().__init__()
        self.values = values
        self.router = nn.Linear(
            dim, len(values), bias=False, device=values.device, dtype=values.dtype
        )
        nn.init.xavier_uniform_(self.router.weight)

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """The number of each token."""
        return hard_choice(self.router(hidden)) @ self.values
