"""How the tokens of a diffusion transformer lie in the image or video: read from its inputs.

A model's attention sees a row of tokens. Which of them are image tokens, and how many rows and
columns they form, depends on the size of what is generated, so it is read anew in every forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attending.sparse._grid_window import Grid


@dataclass(frozen=True)
class ImageTokens:
    """Where the image tokens of a sequence are.

    Attributes:
        grid: `(height, width)` or `(frames, height, width)` in tokens, row by row.
        text_first: whether text tokens come before them; None if no text is in the sequence.
    """

    grid: Grid
    text_first: bool | None

    def text_length(self, tokens: int) -> int:
        """How many of the tokens of a sequence are text; negative if the grid is no part of it."""
        count = 1
        for size in self.grid:
            count *= size
        return tokens - count


def read_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """The grid of what a model of diffusers is called on.

    | class | tokens | text |
    | --- | --- | --- |
    | `FluxTransformer2DModel` and others with `img_ids` | rows and columns of the ids | first |
    | `SD3Transformer2DModel` | patches of the latent image | last |
    | `WanTransformer3DModel` | patches of the latent video | none in the sequence |
    | others with images of 4 dimensions and a `patch_size` (DiT, PixArt) | patches | none |

    Args:
        model: the transformer.
        arguments: of its forward, by name.

    Raises:
        ValueError: for another model or other inputs; give the grid yourself then.
    """
    ids, hidden = arguments.get("img_ids"), arguments.get("hidden_states")
    if isinstance(ids, Tensor):
        return ImageTokens(_grid_of_ids(ids), True)
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    classes = {one.__name__ for one in type(model).__mro__}
    if isinstance(hidden, Tensor) and patch is not None:
        sizes = [int(size) for size in hidden.shape]
        if "WanTransformer3DModel" in classes and hidden.dim() == 5:
            frames, height, width = (
                size // part for size, part in zip(sizes[2:], patch, strict=True)
            )
            return ImageTokens((frames, height, width), None)
        if hidden.dim() == 4 and isinstance(patch, int):
            first = False if "SD3Transformer2DModel" in classes else None
            return ImageTokens((sizes[2] // patch, sizes[3] // patch), first)
    raise ValueError(
        "grid: expected (height, width) or (frames, height, width) in tokens for a "
        f"{type(model).__name__}, as it cannot be read from its inputs; got None."
    )


def _grid_of_ids(ids: Tensor) -> Grid:
    """From `[tokens, 3]`: picture, row and column of each token, as the pipelines of FLUX make."""
    rows, columns = (ids.reshape(-1, ids.shape[-1])[:, axis].long() for axis in (-2, -1))
    if ids.dim() == 3:
        rows, columns = rows[: ids.shape[1]], columns[: ids.shape[1]]
    height, width = len(rows.unique()), len(columns.unique())
    expected = torch.arange(len(rows), device=ids.device)
    in_rows = len(rows) == height * width and torch.equal(
        (rows - rows.min()) * width + columns - columns.min(), expected
    )
    if not in_rows:
        raise ValueError(
            "img_ids: expected those of one image, row by row, got "
            f"{len(rows)} tokens in {height} rows and {width} columns. Give the grid yourself."
        )
    return height, width
