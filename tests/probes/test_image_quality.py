"""PSNR and SSIM, against golden vectors and on images of which they are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from attending.probes.image_quality import psnr, ssim

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding-metrics" / "image_quality.npz"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_golden(dtype, atol):
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    a, b = (golden[name].to(dtype).movedim(-1, 0)[None] for name in "ab")
    assert float(psnr(a, b)) == pytest.approx(float(golden["psnr"]), abs=10 * atol)
    assert float(ssim(a, b)) == pytest.approx(float(golden["ssim_gaussian"]), abs=atol)
    uniform = ssim(a, b, window="uniform")
    assert float(uniform) == pytest.approx(float(golden["ssim_uniform7"]), abs=atol)


def test_equal_images_order_and_range():
    a, b = torch.rand(2, 3, 1, 13, 17, dtype=torch.float64)
    assert psnr(a, a).tolist() == [math.inf] * 3
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(psnr(a, a + 0.1), torch.full((3,), 20.0, dtype=torch.float64))
    for measure in (psnr, ssim):
        torch.testing.assert_close(measure(a, b), measure(b, a))
        wide = measure(255 * a, 255 * b, data_range=255)
        torch.testing.assert_close(wide, measure(a, b))
        torch.testing.assert_close(measure(a, b)[1:2], measure(a[1:2], b[1:2]))
        assert measure(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_wrong_arguments():
    a = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match="images, truth: expected the same shape"):
        psnr(a, a[0])
    with pytest.raises(ValueError, match="data_range: expected a positive number"):
        ssim(a, a, data_range=0)
    with pytest.raises(ValueError, match="images: expected at least 11 x 11"):
        ssim(a, a)
    with pytest.raises(ValueError, match="window: expected"):
        ssim(a, a, window="square")
