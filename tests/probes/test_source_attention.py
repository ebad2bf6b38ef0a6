"""Mass on the source and the source's influence: golden vectors, maps, and the exact derivative."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import attending as at
from attending.models.partial_attention_lm import PartialAttentionLM
from attending.nn.source_target_layout import source_target_layout
from attending.probes.source_attention import (
    source_attention_curve,
    source_mass_bounds,
    source_sensitivity,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "partial-attention-lm"


class OfLogits(nn.Module):
    """Attention whose logits are these: the rows of queries against keys that are unit vectors."""

    def forward(self, logits: Tensor) -> Tensor:
        tokens = logits.shape[-1]
        key = torch.eye(tokens, dtype=logits.dtype).expand(1, len(logits), -1, -1)
        query = logits.masked_fill(logits == -math.inf, 0.0)[None]
        return nn.functional.scaled_dot_product_attention(
            query, key, key, is_causal=True, scale=1.0
        )


def test_golden() -> None:
    with np.load(GOLDEN / "source_mass_case1.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    logits, length = data["logits"], int(data["source_len"])
    tokens = logits.shape[-1]
    source_mask = (torch.arange(tokens) < length)[None]
    mass = data["source_mass"]
    curve = source_attention_curve(OfLogits(), logits, source_mask)
    torch.testing.assert_close(curve.mass[0].double(), mass.mean(0), rtol=1e-6, atol=1e-6)
    uniform = data["source_mass_uniform"]
    torch.testing.assert_close(curve.uniform.double(), uniform, rtol=1e-6, atol=1e-6)
    ratio = mass.mean(0) / uniform
    torch.testing.assert_close(curve.ratio[0].double(), ratio, rtol=1e-6, atol=1e-6)
    exact = at.statistics.expected_features(
        logits.masked_fill(logits == -math.inf, 0.0)[None],
        torch.eye(tokens, dtype=torch.float64).expand(1, len(logits), -1, -1),
        source_mask[0, :, None].double(),
        is_causal=True,
        scale=1.0,
    )
    torch.testing.assert_close(exact[0, :, length:, 0], mass, rtol=1e-10, atol=1e-10)
    largest = logits.masked_fill(logits == -math.inf, 0.0).abs().amax(-1)[:, length:]
    low, high = source_mass_bounds(length, curve.steps, largest)
    torch.testing.assert_close(low, data["source_mass_lower"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(high, data["source_mass_upper"], rtol=1e-10, atol=1e-10)
    assert bool(((low <= mass) & (mass <= high)).all())
    low, high = source_mass_bounds(length, curve.steps, 0.0)
    torch.testing.assert_close(low, uniform)
    torch.testing.assert_close(high, uniform)


@torch.no_grad()
def test_a_padded_batch_of_a_llama_against_its_maps() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 20, (2, 9))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 7:] = 0
    source_mask = torch.arange(9) < torch.tensor([[3], [5]])
    inputs = {"input_ids": ids, "attention_mask": attention_mask}
    curve = source_attention_curve(model, inputs, source_mask)
    assert curve.steps.tolist() == [1, 2, 3, 4]
    assert curve.count.tolist() == [2, 2, 2, 2]
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True).attentions
    for layer, one in enumerate(maps):
        mass = (one * source_mask[:, None, None]).sum(-1).mean(1)
        expected = torch.stack([(mass[0, 3 + i] + mass[1, 5 + i]) / 2 for i in range(4)])
        torch.testing.assert_close(curve.mass[layer], expected, rtol=1e-4, atol=1e-5)
    expected = torch.tensor([(3 / (3 + i) + 5 / (5 + i)) / 2 for i in range(1, 5)])
    torch.testing.assert_close(curve.uniform, expected)
    assert curve.late_over_early().shape == (2,)
    assert "ratio" in str(curve)
    model.set_attn_implementation("sdpa")
    alone = source_attention_curve(model, ids[1:], source_mask[1:])
    assert alone.mass.shape == (2, 4)


def test_even_attention_fades_and_partial_attention_does_not() -> None:
    model = PartialAttentionLM(8, embed_dim=8).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q_proj.weight.zero_()
    layout = source_target_layout([4], 44)
    tokens = torch.randint(8, (1, 44))
    curve = source_attention_curve(model, (tokens, layout), layout.source_mask)
    torch.testing.assert_close(curve.mass, curve.uniform.expand_as(curve.mass))
    torch.testing.assert_close(curve.ratio, torch.ones_like(curve.ratio))
    assert len(curve.layers) == 2  # and not the partial path
    plain = PartialAttentionLM(8, embed_dim=8, partial=False).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    influence = [
        source_sensitivity(
            lambda x, one=one: one.run(x, layout), one.embed(tokens, layout), layout.source_mask
        )
        for one in (plain, model)
    ]
    assert influence[0].shape == (40,)
    late_over_early = [float(one[-8:].mean() / one[:2].mean()) for one in influence]
    assert late_over_early[0] < 0.3
    assert late_over_early[1] > 1.5 * late_over_early[0]


def test_sensitivity_is_that_of_the_jacobian() -> None:
    """One head: the derivative of the card, its bound, and what noise measures of it."""
    torch.manual_seed(0)
    dim, source, tokens = 6, 3, 8
    weights = [torch.randn(dim, dim, dtype=torch.float64) / dim**0.5 for _ in range(3)]
    hidden = torch.randn(1, tokens, dim, dtype=torch.float64)
    source_mask = (torch.arange(tokens) < source)[None]

    def run(x: Tensor) -> Tensor:
        query, key, value = ((x @ weight.T)[:, None] for weight in weights)
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0]

    query, key, value = (hidden[0] @ weight.T for weight in weights)
    scores = (query @ key.T / dim**0.5).masked_fill(
        ~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -math.inf
    )
    attention = scores.softmax(-1)
    output = attention @ value
    jacobian = torch.autograd.functional.jacobian(run, hidden)[0, :, :, 0]  # token out token in
    for i in range(source, tokens):
        mass, sizes = 0.0, 0.0
        for j in range(source):
            lead = torch.outer(value[j] - output[i], query[i] @ weights[1]) / dim**0.5
            expected = attention[i, j] * (weights[2] + lead)
            torch.testing.assert_close(jacobian[i, :, j], expected, rtol=1e-9, atol=1e-9)
            mass += float(attention[i, j])
            sizes += float(torch.linalg.matrix_norm(expected, 2))
        reach = max(float((value[j] - output[i]).norm()) for j in range(source))
        bound = (
            torch.linalg.matrix_norm(weights[2], 2)
            + reach * (query[i] @ weights[1]).norm() / dim**0.5
        )
        assert sizes <= mass * float(bound) + 1e-9
    generator = torch.Generator().manual_seed(3)
    found = source_sensitivity(run, hidden, source_mask, size=1e-6, generator=generator)
    generator = torch.Generator().manual_seed(3)
    expected = torch.zeros(tokens - source, dtype=torch.float64)
    for j in range(source):
        noise = torch.randn(1, dim, generator=generator, dtype=torch.float64)[0]
        moved = jacobian[source:, :, j] @ noise
        expected += moved.norm(dim=-1) / noise.norm() / source
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_refusals() -> None:
    model = OfLogits()
    logits = torch.zeros(2, 6, 6)
    mask = (torch.arange(6) < 2)[None]
    with pytest.raises(ValueError, match=r"source_mask: .*\[1, 5\], got calls of other sizes"):
        source_attention_curve(model, logits, mask[:, :5])
    with pytest.raises(ValueError, match=r"source_mask: expected samples with source and target"):
        source_attention_curve(model, logits, torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"target_mask: expected no token that is source"):
        source_attention_curve(model, logits, mask, mask)
    with pytest.raises(ValueError, match=r"source_mask, target_mask: .* got \[1, 6\] and \[1, 5\]"):
        source_attention_curve(model, logits, mask, mask[:, :5])
    with pytest.raises(ValueError, match=r"embeddings: expected \[batch, tokens, dim\]"):
        source_sensitivity(lambda x: x, torch.randn(1, 5, 2), mask)
    with pytest.raises(ValueError, match="source_length: expected at least 1, got 0"):
        source_mass_bounds(0, torch.tensor([1]), 1.0)
    with pytest.raises(ValueError, match="max_logit: expected at least 0, got -1"):
        source_mass_bounds(2, torch.tensor([1]), -1.0)
