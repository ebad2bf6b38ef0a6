"""From scenes and prompts to the inputs of ``llava-shapes``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attending.zoo.shapes import Scene, render

IMAGE = "<image>"


@dataclass(frozen=True)
class ShapesProcessor:
    """Turns images and prompts into a batch that the model takes, padded on the left.

    >>> inputs = processor(scenes, ["Describe the image."] * len(scenes))
    >>> output = model.generate(**inputs, max_new_tokens=60)
    >>> texts = processor.decode_new(inputs, output)

    Attributes:
        tokenizer: Of the model.
        image_size: Pixels along each side of the images that the model takes.
        image_tokens: Tokens that stand for one image.
    """

    tokenizer: Any
    image_size: int
    image_tokens: int

    def __call__(
        self,
        images: Sequence[Scene] | Float[Tensor, "images 3 height width"],
        text: str | Sequence[str],
    ) -> dict[str, Tensor]:
        """Make the batch.

        Args:
            images: One scene, or one image with colours from 0 to 1, for each prompt.  Scenes are
                painted at the size that the model takes, whatever their own.
            text: One prompt for each image, or one for all.  ``<image>`` marks where the image
                goes; a prompt without it gets the image first.

        Returns:
            ``input_ids`` and ``attention_mask`` as ``[batch, tokens]``, ``pixel_values`` as
            ``[batch, 3, image_size, image_size]`` with colours from -1 to 1.
        """
        prompts = [text] * len(images) if isinstance(text, str) else list(text)
        if len(prompts) != len(images):
            raise ValueError(
                f"expected one prompt for each image, got {len(prompts)} prompts and {len(images)} "
                "images; repeat the image of which several things are asked"
            )
        if not prompts:
            raise ValueError("expected at least one image, got none")
        wanted = (3, self.image_size, self.image_size)
        if isinstance(images, Tensor):
            if tuple(images.shape[1:]) != wanted:
                raise ValueError(
                    f"expected images of shape [batch, {', '.join(map(str, wanted))}], got "
                    f"{list(images.shape)}; paint scenes with scene.image({self.image_size})"
                )
            painted = images
        else:
            painted = render(images, self.image_size)
        marked = [prompt if IMAGE in prompt else f"{IMAGE}{prompt}" for prompt in prompts]
        for prompt in marked:
            if prompt.count(IMAGE) != 1:
                raise ValueError(f"expected one {IMAGE} in a prompt, got {prompt!r}")
        expanded = [prompt.replace(IMAGE, IMAGE * self.image_tokens) for prompt in marked]
        encoded = self.tokenizer(
            expanded, padding=True, padding_side="left", return_tensors="pt", truncation=False
        )
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "pixel_values": 2 * painted - 1,
        }

    def decode_new(self, inputs: dict[str, Tensor], output: Tensor) -> list[str]:
        """What was generated after the prompts of ``inputs``, as text."""
        new = output[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts
