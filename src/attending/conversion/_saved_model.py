"""Read the weights that `save_pretrained` wrote into a model that was put together anew."""

from pathlib import Path
from typing import Any

from torch import Tensor


def load_weights(model: Any, folder: str | Path) -> None:
    """Load all safetensors of a folder, and tie what the model ties.

    Raises:
        ValueError: if weights are missing or too many.
    """
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if set(missing) - tied or unexpected:
        raise ValueError(
            f"folder: expected the weights of this model, but {sorted(set(missing) - tied)} are "
            f"missing and {unexpected} are too many in {str(folder)!r}."
        )
    if hasattr(model, "tie_weights"):  # not those of diffusers
        model.tie_weights()
