"""Numbers that each item of a batch has of its own."""

from jaxtyping import Float
from torch import Tensor


def along_batch(values: Float[Tensor, " batch"], sample: Float[Tensor, "batch *shape"]) -> Tensor:
    """One number for each item of a batch, shaped to be multiplied with it, in its dtype."""
    return values.to(sample.dtype).view(-1, *[1] * (sample.dim() - 1))
