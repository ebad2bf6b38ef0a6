"""Entropy against the number of keys: against maps that are built, and against the theory."""

import math

import pytest
import torch
import transformers
from torch import Tensor, nn

import attending as at
from attending.interventions.logit_scaling import LogitScaling
from attending.probes.entropy_curve import entropy_curve


class Gaussian(nn.Module):
    """Attention with Gaussian logits of variance 2."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        query = nn.functional.normalize(query, dim=-1) * 2**0.5
        return nn.functional.scaled_dot_product_attention(query, key, key, scale=1.0)


def gaussian(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, 2, tokens, 64, generator=generator)


def test_the_theory() -> None:
    model = Gaussian()
    inputs = {n: (gaussian(n + 1)[:, :, :300], gaussian(n)) for n in (512, 1024, 2048)}
    plain = entropy_curve(model, inputs)
    for n, nats in zip(plain.sizes, plain.entropy[:, 0], strict=True):
        assert float(nats) == pytest.approx(math.log(n) - 1, abs=0.03)
    assert float(plain.slope) == pytest.approx(1.0, abs=0.03)
    with LogitScaling(n_train=1024, minimum=0.0)(model):
        scaled = entropy_curve(model, inputs)
    share = 1 - 1 / math.log(1024)
    torch.testing.assert_close(
        scaled.normalized[:, 0], torch.full((3,), share), atol=4e-3, rtol=0.0
    )
    assert float(scaled.drift) < float(plain.drift) / 4
    assert float(scaled.slope) == pytest.approx(share, abs=0.05)
    torch.testing.assert_close(scaled.keys[:, 0], torch.tensor([512.0, 1024.0, 2048.0]))
    assert "512" in str(scaled)
    assert "slope" in str(scaled)


@torch.no_grad()
def test_against_maps_of_a_padded_encoder_and_a_decoder() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    ids = torch.randint(1, 20, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    for model in (bert, llama):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in name:
                    parameter.mul_(8.0)
        inputs = {"input_ids": ids, "attention_mask": mask}
        curve = entropy_curve(model, {"a": inputs, "b": [{"input_ids": ids[:, :4]}] * 2})
        model.set_attn_implementation("eager")
        maps = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        for layer, one in enumerate(maps):
            nats = -torch.xlogy(one, one).sum(-1)  # batch heads queries
            count = torch.tensor([6, 9])[:, None].expand(2, 9)
            if model is llama:
                count = torch.arange(1, 10).expand(2, 9)
            real = (mask > 0) & (count > 1)
            rows = nats.transpose(1, 2)[real]
            logs = count.double().log()[real][:, None].float()
            torch.testing.assert_close(curve.entropy[0, layer], rows.mean(), rtol=1e-4, atol=1e-5)
            expected = (rows / logs).mean()
            torch.testing.assert_close(curve.normalized[0, layer], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(curve.keys[0, layer], logs.mean().exp())
    last = entropy_curve(llama, {"all": inputs}, last=2)
    model.set_attn_implementation("eager")
    maps = llama(**inputs, output_attentions=True).attentions
    rows = torch.stack([maps[1][0, :, 4:6], maps[1][1, :, 7:9]])
    expected = -torch.xlogy(rows, rows).sum(-1).mean()
    torch.testing.assert_close(last.entropy[0, 1], expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_and_calls_without_heads() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    inputs = {"query": query, "key": key, "value": key, "need_weights": False}
    curve = entropy_curve(attention, {1: inputs}, cross=True)
    assert float(curve.keys) == pytest.approx(5)
    assert math.isnan(float(curve.slope))

    class Flat(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(
                hidden, hidden, hidden, is_causal=True
            )

    hidden = torch.randn(3, 6, 8)
    curve = entropy_curve(Flat(), {1: hidden})
    nats = at.statistics.entropy(hidden[:, None], hidden[:, None], is_causal=True)
    torch.testing.assert_close(curve.entropy[0, 0], nats[:, :, 1:].mean())


def test_refusals() -> None:
    model, pair = Gaussian(), (gaussian(8), gaussian(8))
    with pytest.raises(ValueError, match="inputs_by_size: expected inputs for at least one size"):
        entropy_curve(model, {})
    with pytest.raises(ValueError, match="last: expected at least 1 row, got 0"):
        entropy_curve(model, {1: pair}, last=0)
    with pytest.raises(ValueError, match="inputs_by_size: expected calls of cross-attention"):
        entropy_curve(model, {1: pair}, cross=True)
    with pytest.raises(at.TapError):
        entropy_curve(nn.Linear(8, 8), {1: torch.randn(2, 8)})
