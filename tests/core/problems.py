"""Random attention problems: the inputs that every fast function is held to the reference on."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @property
    def call(self) -> dict:
        return {
            "attn_mask": self.attn_mask,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
        }


@st.composite
def problems(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    max_tokens: int = 130,
    masks: tuple[str, ...] = ("none", "causal", "bool", "float", "keys", "float_keys", "padded"),
    spreads: tuple[float, ...] = (0.01, 1.0, 30.0),
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    batch = draw(st.integers(1, 2))
    kv_heads = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    queries = draw(st.integers(1, max_tokens))
    keys = draw(st.one_of(st.just(queries), st.integers(1, max_tokens)))
    dim = draw(st.integers(1, 19))
    value_dim = draw(st.one_of(st.just(dim), st.integers(1, 23)))
    kind = draw(st.sampled_from(masks))
    spread = draw(st.sampled_from(spreads))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = normal(batch, kv_heads * groups, queries, dim) * math.sqrt(spread)
    key = (normal(batch, kv_heads, keys, dim) + normal(1, 1, 1, dim)) * math.sqrt(spread)
    value = normal(batch, kv_heads, keys, value_dim)
    mask: Tensor | None = None
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys, generator=generator) > 0.5
        mask[..., 0, :] = False
    elif kind == "float":
        mask = normal(kv_heads * groups, queries, keys)
        mask[:, -1] = -math.inf
        mask[torch.rand(mask.shape, generator=generator) > 0.8] = -math.inf
    elif kind == "keys":
        mask = torch.rand(batch, 1, 1, keys, generator=generator) > 0.3
    elif kind == "float_keys":
        mask = normal(1, kv_heads * groups, 1, keys) * 3
        mask[..., 0] = -math.inf
    elif kind == "padded":  # a causal mask and left padding, as transformers makes it
        start = torch.randint(0, keys, (batch, 1, 1, 1), generator=generator)
        row = torch.arange(queries)[:, None] + keys - queries
        mask = (torch.arange(keys) <= row) & (torch.arange(keys) >= start)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    return Problem(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        mask,
        kind == "causal",
        draw(st.sampled_from((None, 0.3))),
        groups > 1,
    )


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {
        torch.float64: {"rtol": 1e-10, "atol": 1e-10},
        torch.float32: {"rtol": 2e-4, "atol": 2e-4},
        torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
        torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    }[dtype]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), **tolerance(dtype))
