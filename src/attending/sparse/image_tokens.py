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

TEXT_FIRST = {
    "CogVideoXTransformer3DModel": True,
    "FluxTransformer2DModel": True,
    "HunyuanVideoTransformer3DModel": False,
    "SD3Transformer2DModel": False,
}
"""Classes of diffusers whose sequence has text too, and whether it comes before the picture."""


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


def text_comes_first(model: nn.Module) -> bool | None:
    """Where a model of diffusers has its text; None if it has none, or is not known."""
    names = (one.__name__ for one in type(model).__mro__)
    return next((TEXT_FIRST[name] for name in names if name in TEXT_FIRST), None)


def read_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """The grid of what a model of diffusers is called on.

    | class | tokens | text |
    | --- | --- | --- |
    | `FluxTransformer2DModel` and others with `img_ids` | rows and columns of the ids | first |
    | `SD3Transformer2DModel` | patches of the latent image | last |
    | `HunyuanVideoTransformer3DModel` | patches of the latent video | last |
    | `CogVideoXTransformer3DModel` | patches of the latent video, frames before channels | first |
    | others with videos of 5 dimensions and a `patch_size` (Wan) | patches | none |
    | others with images of 4 dimensions and a `patch_size` (DiT, PixArt) | patches | none |
    | those that are told `num_frames`, `height` and `width` (LTX-Video) | as told | none |

    Args:
        model: the transformer.
        arguments: of its forward, by name.

    Raises:
        ValueError: for another model or other inputs; give the grid yourself then.
    """
    ids, hidden = arguments.get("img_ids"), arguments.get("hidden_states")
    if isinstance(ids, Tensor):
        return ImageTokens(_grid_of_ids(ids), True)
    told = [arguments.get(name) for name in ("num_frames", "height", "width")]
    sides = [size for size in told if isinstance(size, int)]
    if len(sides) == 3:
        return ImageTokens((sides[0], sides[1], sides[2]), None)
    config = getattr(model, "config", None)
    patch = getattr(config, "patch_size", None)
    first = text_comes_first(model)
    if isinstance(hidden, Tensor) and patch is not None:
        sizes = [int(size) for size in hidden.shape]
        if hidden.dim() == 5:
            if isinstance(patch, int):
                patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
            cog = any(one.__name__ == "CogVideoXTransformer3DModel" for one in type(model).__mro__)
            frames = sizes[1 if cog else 2]
            grid = (frames // patch[0], sizes[3] // patch[1], sizes[4] // patch[2])
            return ImageTokens(grid, first)
        if hidden.dim() == 4 and isinstance(patch, int):
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
