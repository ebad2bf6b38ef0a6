"""How near a restored image is to the true one: PSNR and SSIM.

    psnr(restored, truth).mean(), ssim(restored, truth).mean()      # [images, channels, h, w]

Both give one number an image; papers report means over images. What they leave open changes the
third digit or more: RGB or brightness alone, clipping before (do clip), the window of SSIM. The
defaults here are those of Wang et al. 2004; `window="uniform"` is the default of scikit-image.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Window = Literal["gaussian", "uniform"]

_SIGMA, _RADIUS, _UNIFORM = 1.5, 5, 7
_K1, _K2 = 0.01, 0.03


def psnr(
    images: Float[Tensor, "images channels height width"],
    truth: Float[Tensor, "images channels height width"],
    *,
    data_range: float = 1.0,
) -> Float[Tensor, " images"]:
    """Peak signal to noise ratio, `10 log10(data_range^2 / mean squared error)`, in decibels.

    Args:
        images: as they came out.
        truth: as they should be.
        data_range: the largest possible difference, 1 for images in [0, 1].

    Returns:
        One number an image, at least float32; inf for equal images.

    Raises:
        ValueError: for shapes that differ or have no four dimensions, or no positive range.
    """
    images, truth = _checked(images, truth, data_range)
    error = (images - truth).square().mean((1, 2, 3))
    return 20 * math.log10(data_range) - 10 * error.log10()


def ssim(
    images: Float[Tensor, "images channels height width"],
    truth: Float[Tensor, "images channels height width"],
    *,
    data_range: float = 1.0,
    window: Window = "gaussian",
) -> Float[Tensor, " images"]:
    """Structural similarity: means, variances and covariance in windows, compared.

        SSIM = (2 m_a m_b + c_1) (2 s_ab + c_2) / ((m_a^2 + m_b^2 + c_1) (s_a^2 + s_b^2 + c_2))

    with c_1 = (0.01 data_range)^2 and c_2 = (0.03 data_range)^2, averaged over the windows that lie
    within the image, and over channels.

    Args:
        images: as they came out.
        truth: as they should be.
        data_range: the largest possible difference, 1 for images in [0, 1].
        window: "gaussian", 11 x 11 with sigma 1.5 and the variance of a population; or "uniform",
            7 x 7 with that of a sample.

    Returns:
        One number an image, at most 1, at least float32.

    Raises:
        ValueError: as `psnr`; for images smaller than the window, or an unknown one.
    """
    images, truth = _checked(images, truth, data_range)
    if window == "gaussian":
        offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=images.dtype, device=images.device)
        line = (-0.5 * (offsets / _SIGMA).square()).exp()
        correction = 1.0
    elif window == "uniform":
        line = images.new_ones(_UNIFORM)
        correction = _UNIFORM**2 / (_UNIFORM**2 - 1)
    else:
        raise ValueError(f"window: expected 'gaussian' or 'uniform', got {window!r}.")
    if min(images.shape[-2:]) < len(line):
        raise ValueError(
            f"images: expected at least {len(line)} x {len(line)} pixels, the size of the window, "
            f"got {list(images.shape)}."
        )
    line = line / line.sum()

    def mean(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)[:, None]
        rows = torch.nn.functional.conv2d(flat, line[None, None, :, None])
        both: Tensor = torch.nn.functional.conv2d(rows, line[None, None, None, :])
        return both

    mean_a, mean_b = mean(images), mean(truth)
    variance_a = correction * (mean(images.square()) - mean_a.square())
    variance_b = correction * (mean(truth.square()) - mean_b.square())
    covariance = correction * (mean(images * truth) - mean_a * mean_b)
    c_1, c_2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    similar = (2 * mean_a * mean_b + c_1) * (2 * covariance + c_2)
    similar = similar / (
        (mean_a.square() + mean_b.square() + c_1) * (variance_a + variance_b + c_2)
    )
    channels: Tensor = similar.mean((1, 2, 3)).unflatten(0, images.shape[:2])
    return channels.mean(1)


def _checked(images: Tensor, truth: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    if images.shape != truth.shape or images.dim() != 4 or not images.numel():
        raise ValueError(
            "images, truth: expected the same shape [images, channels, height, width], got "
            f"{list(images.shape)} and {list(truth.shape)}."
        )
    if not data_range > 0:
        raise ValueError(f"data_range: expected a positive number, got {data_range!r}.")
    dtype = torch.promote_types(torch.promote_types(images.dtype, truth.dtype), torch.float32)
    return images.to(dtype), truth.to(dtype)
