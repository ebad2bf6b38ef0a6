"""What a visual token pruning counts, and the model that it can prune."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from attending.interventions.intervention import Run


@dataclass(eq=False)
class PruningRun(Run):
    """What a pruning did within one `with` block.

    Attributes:
        image_tokens: of all forwards with images.
        kept_image_tokens: those that a layer of the language model got, on average over its layers.
        kept: of each image that was pruned before the language model, which tokens; -1 for one in
            which many are merged.
    """

    image_tokens: int = 0
    kept_image_tokens: float = 0.0
    kept: list[Int[Tensor, "kept"]] = field(default_factory=list)

    @property
    def stats(self) -> dict[str, int]:
        """The counts, as a plain dictionary."""
        return {
            "pruned_forwards": self.edited_calls,
            "image_tokens": self.image_tokens,
            "kept_image_tokens": round(self.kept_image_tokens),
        }

    def pruned(self, before: int, after: float) -> None:
        """Count a forward with images."""
        self.image_tokens += before
        self.kept_image_tokens += after
        if after < before:
            self.edited()
        else:
            self.left(None, "no image had more tokens than are kept")

    def __str__(self) -> str:
        """In one line."""
        return (
            f"{self.name}: kept {self.kept_image_tokens:.0f} of {self.image_tokens} image tokens "
            f"in {self.edited_calls} of {self.calls} forwards"
        )


def llava_model(model: nn.Module) -> Any:
    """The one `LlavaModel` of transformers in a module.

    Raises:
        ValueError: if there is none, or more than one.
    """
    from transformers.models.llava.modeling_llava import LlavaModel

    found = [module for module in model.modules() if isinstance(module, LlavaModel)]
    if len(found) != 1:
        raise ValueError(
            "model: expected transformers' LlavaForConditionalGeneration or LlavaModel (or a "
            f"module around one), found {len(found)} in {type(model).__name__}. It has to be known "
            "where image features come from (get_image_features), how they enter the language "
            "model (a token of the prompt for each), and which attention belongs to them. "
            "In other models call attending.sparse.visual_tokens.select_tokens between projector "
            "and language model."
        )
    return found[0]
