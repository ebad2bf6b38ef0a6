"""What is measured of layers, against the definitions on the map in float64."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import attending as at
from attending.monitor import LayerMeasurement, Limits
from tests.monitor.models import Dense, dense, llama, padded_probe, probe_calls, text
from tests.tap.models import t5_model


def quiet(model: nn.Module, probe: Any) -> at.AttentionMonitor:
    """Without warnings: the models here are sharp on purpose."""
    limits = Limits(entropy=0.0, logit=math.inf, growth=math.inf)
    return at.AttentionMonitor(model, probe, limits=limits)


def check(found: LayerMeasurement, expected: Dense, tolerance: float = 2e-6) -> None:
    pairs = {
        "entropy": (expected.entropy, "min mean max"),
        "normalized_entropy": (expected.normalized, "min mean max"),
        "sink": (expected.sink, "mean max"),
        "first_token": (expected.first, "mean max"),
        "logit": (expected.logit, "max"),
    }
    for name, (values, ends) in pairs.items():
        for end in ends.split():
            want = float(getattr(values, end)())
            assert getattr(found, f"{name}_{end}") == pytest.approx(want, abs=tolerance, rel=2e-6)
    assert found.entropy_min_head == int(expected.entropy.argmin())
    assert found.logit_max_head == int(expected.logit.argmax())


def sharpened(model: nn.Module) -> Any:
    """At the start all heads are alike, and a mistake in one would hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model


def test_a_padded_batch_with_shared_keys() -> None:
    model, probe = sharpened(llama()), padded_probe()
    found = quiet(model, probe).measure()
    tokens = [row.nonzero().flatten().tolist() for row in probe["attention_mask"]]
    assert [layer.name for layer in found.layers] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    for layer, call in zip(found.layers, probe_calls(model, probe), strict=True):
        assert (layer.layer, layer.kind) == (call.layer, "self")
        check(layer, dense(call, tokens, tokens))


def test_a_whole_batch_causal_without_a_mask() -> None:
    model, probe = sharpened(llama()), {"input_ids": text(5)}
    found = quiet(model, probe).measure()
    for layer, call in zip(found.layers, probe_calls(model, probe), strict=True):
        assert call.is_causal
        check(layer, dense(call, None, None))


def test_encoder_decoder_with_a_bias_and_cross_attention() -> None:
    model = sharpened(t5_model())
    source = padded_probe()
    probe = {**source, "decoder_input_ids": text(1, 3, 5)}
    found = quiet(model, probe).measure()
    tokens = [row.nonzero().flatten().tolist() for row in source["attention_mask"]]
    kinds = []
    for layer, call in zip(found.layers, probe_calls(model, probe), strict=True):
        encoder = layer.name.startswith("encoder")
        kinds.append(layer.kind)
        check(
            layer,
            dense(call, tokens if encoder else None, tokens if encoder or call.is_cross else None),
        )
    assert kinds == ["self", "self", "self", "cross", "self", "cross"]


def test_plain_pytorch_attention() -> None:
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.1)
    model = sharpened(nn.TransformerEncoder(block, 2))
    states = torch.randn(2, 6, 16)
    found = quiet(model, states).measure()
    with at.tap(model) as calls, torch.no_grad():
        model.eval()(states)
    for layer, call in zip(found.layers, calls, strict=True):
        check(layer, dense(call, None, None))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gives_statistics_of_what_the_model_computed(autocast: bool) -> None:
    """The kernel gets bfloat16, after autocast too; statistics of that are exact to float32."""
    model = sharpened(llama())
    model = model if autocast else model.to(torch.bfloat16)
    probe = {"input_ids": text(5)}
    monitor = quiet(model, probe)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = monitor.measure()
        calls = probe_calls(model, probe)
    for layer, call in zip(found.layers, calls, strict=True):
        assert call.query.dtype == (torch.float32 if autocast else torch.bfloat16)
        rounded = dataclasses.replace(call, query=call.query.bfloat16(), key=call.key.bfloat16())
        check(layer, dense(rounded, None, None), 1e-5)


def test_a_module_that_attends_twice_and_one_token() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.attention(x, x, x, need_weights=False)[0]

    found = at.AttentionMonitor(Twice(), torch.randn(2, 1, 8)).measure()
    assert [layer.name for layer in found.layers] == ["attention", "attention#2"]
    assert found.layers[0].entropy_max == 0.0
    assert found.layers[0].normalized_entropy_min == 1.0  # no alarm: there is no choice
    assert found.layers[0].sink_max == pytest.approx(1.0)


def test_scalars_are_named_and_summed_up_over_layers() -> None:
    found = quiet(sharpened(llama()), padded_probe()).measure()
    scalars = found.scalars()
    for name, take in (("entropy_min", min), ("logit_max", max), ("sink_max", max)):
        values = [getattr(layer, name) for layer in found.layers]
        assert values[0] != values[1]
        assert scalars[f"attention/{name}"] == take(values)
        for layer, value in zip(found.layers, values, strict=True):
            assert scalars[f"attention/{layer.name}/{name}"] == value
    means = [layer.entropy_mean for layer in found.layers]
    assert scalars["attention/entropy_mean"] == pytest.approx(sum(means) / 2)
    assert scalars["attention/weight_norm_max"] == max(w.norm for w in found.weights)
    assert "attention/model.layers.1.self_attn.v_proj.weight/norm" in scalars
    short = found.scalars(per_layer=False)
    assert all(name.count("/") == 1 for name in short)
    assert short.items() <= scalars.items()


def _without_attention() -> tuple[nn.Module, Any, str]:
    return nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), "saw no attention call"


def _eager() -> tuple[nn.Module, Any, str]:
    model = llama()
    model.set_attn_implementation("eager")
    return model, padded_probe(), r'set_attn_implementation\("sdpa"\)'


def _compiled() -> tuple[nn.Module, Any, str]:
    return torch.compile(llama()), padded_probe(), "_orig_mod"


def _compiled_in_place() -> tuple[nn.Module, Any, str]:
    model = llama()
    model.compile()
    return model, padded_probe(), "compiled in place"


@pytest.mark.parametrize("make", [_without_attention, _eager, _compiled, _compiled_in_place])
def test_what_cannot_be_seen_is_refused_with_what_to_do(
    make: Callable[[], tuple[nn.Module, Any, str]],
) -> None:
    model, probe, message = make()
    with pytest.raises((ValueError, at.TapError), match=message):
        quiet(model, probe).measure()


def test_the_original_of_a_compiled_model_is_watched() -> None:
    """`torch.compile` shares the weights with the model that it was given."""
    model = llama()
    compiled = torch.compile(model, backend="eager")
    monitor = at.AttentionMonitor(model, padded_probe(), every=1)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    batch = text(0)
    for _ in range(2):
        compiled(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found = monitor.step()
    assert found is not None
    assert all(weight.update_ratio for weight in found.weights)
