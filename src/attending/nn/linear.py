"""One view of linear layers: `nn.Linear`, and transformers' `Conv1D`, whose weight is turned."""

import re
from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn

_ATTENTION = re.compile("Attention|Attn")


def linear_weight(module: nn.Module) -> Float[Tensor, "out_features in_features"] | None:
    """The float weight of a linear layer in the layout of `nn.Linear`, a view; None for others.

    GPT-2 and its relatives use `Conv1D`, a linear layer with a weight `[in_features,
    out_features]`. Quantised layers, whose weights are integers, count as others.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return weight
    return weight.transpose(0, 1) if type(module).__name__ == "Conv1D" else None


def linear_layers(
    model: nn.Module, outside_attention: bool = False
) -> Iterator[tuple[str, nn.Module, Float[Tensor, "out_features in_features"]]]:
    """The linear layers of a model: name, module, and weight as `linear_weight` gives it.

    Args:
        model: any module.
        outside_attention: leave out layers that lie in a module of the model whose class is named
            after attention.
    """
    attention = [
        name
        for name, module in model.named_modules()
        if name and outside_attention and _ATTENTION.search(type(module).__name__)
    ]
    for name, module in model.named_modules():
        weight = linear_weight(module)
        inside = any(name == one or name.startswith(f"{one}.") for one in attention)
        if weight is not None and not inside:
            yield name, module, weight
