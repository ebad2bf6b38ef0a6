"""The indicators of a map, against golden vectors and maps of which they are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from attending.probes.map_indicators import map_indicators

GOLDEN = Path(__file__).parents[1] / "golden" / "deconstructing-attention" / "variants.npz"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden(dtype, atol):
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(arrays[name]).to(dtype) for name in arrays}
    attention = golden["standard_attn"]
    found = map_indicators(attention)
    sample = map_indicators(attention, unbiased=True)
    for ours, name in (
        (found.entropy, "entropy"),
        (found.concentration, "concentration"),
        (found.sink, "sink"),
        (found.local_focus, "locfoc"),
        (found.head_diversity, "head_diversity_pop"),
        (sample.head_diversity, "head_diversity_sample"),
    ):
        torch.testing.assert_close(ours[0], golden[f"ind_{name}"], atol=atol, rtol=atol)


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_even_and_sharp_maps(tokens):
    even = torch.ones(tokens, tokens).tril()
    even = even / even.sum(-1, keepdim=True)
    maps = torch.stack([even, torch.eye(tokens)])
    found = map_indicators(maps, offsets=range(tokens))
    expected = sum(math.log(row) for row in range(1, tokens + 1))
    torch.testing.assert_close(found.entropy, torch.tensor([expected, 0.0]))
    assert float(found.concentration[1]) == pytest.approx(math.sqrt(tokens))
    assert float(found.sink[1]) == pytest.approx(1 / tokens)
    torch.testing.assert_close(found.local_focus[1], torch.eye(tokens)[0])
    assert float(map_indicators(maps[:1].expand(3, -1, -1), offsets=[0]).head_diversity) < 1e-6


def test_wrong_arguments():
    with pytest.raises(ValueError, match="attention: expected"):
        map_indicators(torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match=r"offsets: expected some, from 0 to 2, got \[0, 3\]"):
        map_indicators(torch.rand(2, 3, 3), offsets=[0, 3])
