"""Frames, height and width of the tokens of a running image or video transformer.

Attention gets one row of tokens, and methods that cut it into boxes have to know its shape. Models
make tokens in few ways, and each of them tells:

- a convolution whose stride is its kernel makes patches (Wan, HunyuanVideo, SD3, CogVideoX);
- `forward` is given the places of the tokens as `img_ids` (Flux);
- `forward` is given `num_frames`, `height` and `width` (LTX-Video).

    with GridWatch(model) as watch:
        model(...)                    # meanwhile: watch.grid(batch)
"""

import inspect
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Grid = tuple[int, int, int]
"""Tokens along time, height and width."""


class GridWatch(AbstractContextManager["GridWatch"]):
    """Watches a model make tokens, through hooks that are gone afterwards.

    Args:
        model: the transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._hooks: list[RemovableHandle] = []
        self._patches: tuple[int, ...] | None = None  # the shape of what a convolution made
        self._told: Grid | None = None  # what the arguments of forward say

    def grid(self, batch: int) -> Grid | None:
        """The grid of the call of the model that is running; None if it was not seen.

        Args:
            batch: sequences that attention gets, to tell frames from items of the batch where each
                frame is cut into patches like an image of its own (CogVideoX).
        """
        if self._told is not None or self._patches is None:
            return self._told
        if len(self._patches) == 5:
            return self._patches[2], self._patches[3], self._patches[4]
        images, _, height, width = self._patches
        return max(images // max(batch, 1), 1), height, width

    def __enter__(self) -> "GridWatch":
        if self._hooks:
            raise RuntimeError("this watch is open already; make one for each block")
        parameters = inspect.signature(self.model.forward).parameters

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            self._patches, self._told = None, _told_grid(given)

        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._patches = tuple(output.shape)

        self._hooks = [self.model.register_forward_pre_hook(read, with_kwargs=True)]
        self._hooks += [
            module.register_forward_hook(see)
            for module in self.model.modules()
            if isinstance(module, nn.Conv2d | nn.Conv3d) and module.stride == module.kernel_size
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _told_grid(given: dict[str, Any]) -> Grid | None:
    sides = [given.get(name) for name in ("num_frames", "height", "width")]
    numbers = [side for side in sides if isinstance(side, int)]
    if len(numbers) == 3:
        return numbers[0], numbers[1], numbers[2]
    places = given.get("img_ids")
    if isinstance(places, Tensor) and places.dim() in (2, 3) and places.shape[-1] == 3:
        places = places if places.dim() == 2 else places[0]
        if len(places):
            low, high = places.amin(0), places.amax(0)
            frames, height, width = (int(side) for side in (high - low + 1).tolist())
            if frames * height * width == len(places):
                return frames, height, width
    return None
