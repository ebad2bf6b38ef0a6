"""Masks of the foreground in tokens, and how far predictions move: the parts of a block profile."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def foreground_ratio(
    received: Float[Tensor, "*batch tokens"],
    foreground: Bool[Tensor, "*#batch tokens"],
    threshold: float,
    *,
    frames: int = 1,
) -> Float[Tensor, "*batch"]:
    """R of eq. 6: the share of the foreground that receives more attention than a threshold.

    Args:
        received: attention that each token receives.
        foreground: which tokens show it.
        threshold: of `received`; the uniform level is 1 / tokens.
        frames: R is the mean over those frames that have foreground.

    Returns:
        NaN where there is no foreground.
    """
    mask = foreground.expand(received.shape).unflatten(-1, (frames, -1))
    high = (received > threshold).unflatten(-1, (frames, -1))
    area = mask.sum(-1)
    ratio: Tensor = ((high & mask).sum(-1).double() / area).nanmean(-1)
    return ratio


def foreground_tokens(
    pixels: Bool[Tensor, "*batch frames height width"],
    patch: tuple[int, int, int],
    share: float = 0.5,
) -> Bool[Tensor, "*batch tokens"]:
    """Which tokens show the foreground, from a mask of pixels.

    Args:
        pixels: the mask.
        patch: frames, rows and columns of pixels that become one token. Behind a VAE, those of the
            transformer's patch times what the VAE shrinks.
        share: of a patch's pixels that have to be foreground.

    Returns:
        Frame by frame, in each row by row.

    Raises:
        ValueError: if the patch does not divide the video.
    """
    shape = tuple(pixels.shape[-3:])
    _check_patch(shape, patch)
    values = pixels.double().reshape(-1, 1, *shape)
    means = torch.nn.functional.avg_pool3d(values, patch)
    found: Tensor = means.reshape(*pixels.shape[:-3], -1) >= share
    return found


def step_moves(
    predictions: Sequence[Float[Tensor, "..."]],
) -> tuple[Float[Tensor, "moves"], Float[Tensor, "moves"]]:
    """How far the predicted noise moves from step to step: mean |eps[s] - eps[s-1]|.

    Args:
        predictions: of each step, all of one shape.

    Returns:
        One number for each step but the first; and the same by mean |eps[s-1]|.
    """
    moves = Moves()
    for step, prediction in enumerate(predictions):
        moves.add(step, 0, prediction)
    return moves.means()


class Moves:
    """Sums of how far outputs moved, by step; each branch of a sampler by itself."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, Tensor]] = {}
        self._moves: dict[int, list[tuple[float, float]]] = {}

    def add(self, step: int, branch: int, output: Tensor) -> None:
        """Take up the output of a step in a branch."""
        output = output.detach().double()
        before = self._before.get(branch)
        self._before[branch] = (step, output)
        if before is None or before[0] != step - 1 or before[1].shape != output.shape:
            return
        moved = float((output - before[1]).abs().mean())
        self._moves.setdefault(step, []).append((moved, moved / float(before[1].abs().mean())))

    def means(self) -> tuple[Tensor, Tensor]:
        """Of each step but the first, over branches: the move, and the relative move."""
        last = max(self._moves, default=0)
        found = [
            [mean_of(values[kind] for values in self._moves.get(step, ())) for kind in (0, 1)]
            for step in range(1, last + 1)
        ]
        both = torch.tensor(found, dtype=torch.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]


def mean_of(values: Iterable[float]) -> float:
    """The mean of those that are numbers; NaN if none is."""
    numbers = [value for value in values if value == value]
    return sum(numbers) / len(numbers) if numbers else float("nan")


def principal_foreground(
    prediction: Float[Tensor, "batch channels frames height width"],
    patch: tuple[int, int, int] = (1, 1, 1),
) -> Bool[Tensor, "batch tokens"]:
    """A guess of the foreground where no mask is known: what stands out in a prediction.

    Averages of patches are put on their first three principal components; the tokens that are far
    from the mean, by Otsu's threshold on the squared distance, are the foreground. The paper has
    SAM2 draw masks on such a picture of three components; this needs no other model, and is
    cruder. On clean clips of `zoo.shapes_motion` it agrees with the true masks at an intersection
    over union of 0.61.

    Args:
        prediction: what the model predicts. Of flow models, the predicted sample `x - s v` shows
            more than the velocity v, which holds the noise.
        patch: frames, rows and columns that become one token.

    Returns:
        For each sample on its own; frame by frame, in each row by row.

    Raises:
        ValueError: if the patch does not divide the prediction.
    """
    _check_patch(tuple(prediction.shape[-3:]), patch)
    means = torch.nn.functional.avg_pool3d(prediction.detach().double(), patch)
    features = means.flatten(2).transpose(1, 2)
    features = features - features.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(features, full_matrices=False)
    distance = (left * values[:, None])[..., :3].square().sum(-1)
    return torch.stack([row > _otsu(row) for row in distance])


def _otsu(values: Float[Tensor, "values"]) -> Tensor:
    """The threshold that splits values into the two classes that lie furthest apart."""
    ordered = values.sort().values
    count = torch.arange(1, len(ordered), dtype=ordered.dtype, device=ordered.device)
    sums = ordered.cumsum(0)
    below, above = sums[:-1] / count, (sums[-1] - sums[:-1]) / (len(ordered) - count)
    between = count * (len(ordered) - count) * (above - below).square()
    return ordered[int(between.argmax())] if len(between) else ordered[0]


def _check_patch(shape: tuple[int, ...], patch: tuple[int, int, int]) -> None:
    if any(size % part for size, part in zip(shape, patch, strict=True)):
        raise ValueError(
            f"patch: expected sizes that divide the video's {shape} (frames, height, width), got "
            f"{patch}."
        )
