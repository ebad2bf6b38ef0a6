"""Read converted models that `save_pretrained` wrote: put together anew, then their weights."""

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


def model_of_record(folder: str | Path, record: str, makers: str, model_class: Any) -> Any:
    """The standard model that a folder's config describes, its weights newly drawn.

    Args:
        folder: with the config of a converted model.
        record: the entry that the conversion left in it.
        makers: the names of the conversions that leave it, for the error.
        model_class: a class of transformers with `from_config` or `_from_config`; None for
            `AutoModelForCausalLM`.

    Raises:
        ValueError: if the config has no such entry.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, record, None) is None:
        raise ValueError(f"folder: expected a model of {makers}, got {str(folder)!r}.")
    maker = AutoModelForCausalLM if model_class is None else model_class
    return (getattr(maker, "from_config", None) or maker._from_config)(config)
