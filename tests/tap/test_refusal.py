"""What a tap cannot see it refuses, and the advice, when followed, helps."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.taps import TapError, TapWarning, tap
from tests.tap.diffusion_models import flux, unet_model
from tests.tap.models import SIZES, clip, llama_model, t5_model, tokens, whisper_model
from tests.tap.probes import Toy, hidden, identity, left_as_it_was

SDPA = "torch.nn.functional.scaled_dot_product_attention"


def refused(model: nn.Module, message: str) -> None:
    """On entry, with all of this message, and without a trace."""
    with left_as_it_was(model), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tap(model, identity).__enter__()


def unseen(model: nn.Module, forward: Callable[[], Any], message: str) -> None:
    """On exit."""
    with left_as_it_was(model), pytest.raises(TapError, match=f"^{re.escape(message)}$"):
        run_tapped(model, forward)


def run_tapped(model: nn.Module, forward: Callable[[], Any]) -> int:
    with tap(model) as calls:
        forward()
    return len(calls)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "flex_attention", "paged|eager"])
def test_other_implementations_of_transformers(name: str) -> None:
    model = llama_model()
    model.config._attn_implementation = name  # as from_pretrained does where the package is there
    refused(
        model,
        f'LlamaForCausalLM runs with attn_implementation="{name}" in model.layers.0.self_attn '
        f'(LlamaAttention), which never calls {SDPA}; call model.set_attn_implementation("sdpa") '
        "first",
    )
    model.set_attn_implementation("sdpa")
    assert run_tapped(model, lambda: model(tokens())) == 2


def test_one_part_of_a_model_with_another_implementation() -> None:
    example = clip()
    example.model.vision_model.set_attn_implementation("eager")
    with pytest.raises(
        ValueError, match=r"in vision_model.encoder.layers.0.self_attn \(CLIPAttent"
    ):
        tap(example.model).__enter__()
    example.model.set_attn_implementation("sdpa")
    assert run_tapped(example.model, example.forward) == 4


def test_a_layer_of_an_eager_model_cannot_be_asked_before_but_says_so_after() -> None:
    model = llama_model()
    model.set_attn_implementation("eager")
    unseen(
        model.model.layers[0],
        lambda: model(tokens()),
        f"the tap saw no attention call: LlamaDecoderLayer ran, but never called {SDPA}. "
        'Call model.set_attn_implementation("sdpa").',
    )


@pytest.mark.parametrize("build", [t5_model, whisper_model])
def test_encoder_decoders_have_this_path_and_eager_is_refused(build: Any) -> None:
    """This version of transformers has an sdpa path for T5, too, its position bias as the mask."""
    model = build()
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r'call model.set_attn_implementation\("sdpa"\) first$'):
        tap(model).__enter__()


def test_a_model_that_has_only_eager_attention() -> None:
    import transformers

    config = transformers.DebertaV2Config(vocab_size=40, intermediate_size=48, **SIZES)
    model = transformers.DebertaV2Model(config)
    assert not model._supports_sdpa
    refused(
        model,
        "DebertaV2Attention (encoder.layer.0.attention) of DebertaV2Model has only an "
        f'"eager" implementation in transformers {transformers.__version__}, which never calls '
        f"{SDPA}; no setting changes that, and a tap cannot see it",
    )


def test_a_model_without_attention() -> None:
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1)).eval()
    with pytest.raises(TapError, match="Only attention that calls this function can be tapped"):
        run_tapped(model, lambda: model(tokens()))
    plain = nn.Sequential(nn.Linear(8, 8))
    unseen(
        plain,
        lambda: plain(hidden()),
        f"the tap saw no attention call: Sequential ran, but never called {SDPA}. Only attention "
        "that calls this function can be tapped.",
    )


def test_no_forward_at_all() -> None:
    unseen(
        Toy(),
        lambda: None,
        "the tap saw no attention call: no forward of Toy ran inside the `with` block",
    )


def test_an_own_implementation_that_never_calls_the_function() -> None:
    """By a name of its own, of which nothing is known beforehand."""
    from transformers import AttentionInterface

    def uniform(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        mean = value.mean(dim=2, keepdim=True).repeat_interleave(2, dim=1)
        return mean.expand_as(query).transpose(1, 2), None

    model = llama_model()
    AttentionInterface.register("tests_uniform", uniform)
    try:
        model.set_attn_implementation("tests_uniform")
        unseen(
            model,
            lambda: model(tokens()),
            f"the tap saw no attention call: LlamaForCausalLM ran, but never called {SDPA} "
            '(config._attn_implementation is "tests_uniform"). '
            'Call model.set_attn_implementation("sdpa").',
        )
    finally:
        del AttentionInterface._global_mapping["tests_uniform"]


def test_some_attention_that_never_calls_the_function_warns_once_per_block() -> None:
    class HandmadeAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    model = nn.Sequential(Toy(1), HandmadeAttention(), HandmadeAttention())
    message = (
        "the tap did not see all of Sequential: 1 (HandmadeAttention), 2 (HandmadeAttention) ran "
        f"without a call of {SDPA}. Only attention that calls this function can be tapped."
    )
    with left_as_it_was(model), pytest.warns(TapWarning) as caught:
        run_tapped(model, lambda: model(model(hidden())))
    assert [str(warning.message) for warning in caught] == [message]
    assert caught[0].filename == __file__


ORIGINAL = "tap and run the original, which it keeps as `_orig_mod`"
BEFORE = "tap the model before it is compiled, or a copy that was not"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("whole", f"OptimizedModule was compiled by torch.compile, and .* code; {ORIGINAL}"),
        ("part", f"layers.1 of Toy was compiled by torch.compile, and .* code; {ORIGINAL}"),
        ("in place", f"Toy was compiled in place, and .* code; {BEFORE}"),
        ("part in place", f"layers.1 of Toy was compiled in place, and .* code; {BEFORE}"),
        ("forward", f"layers.1 of Toy was compiled in place, and .* code; {BEFORE}"),
    ],
)
def test_compiled_modules(how: str, message: str) -> None:
    model: Any = Toy()
    layer = model.layers[1]
    if how == "whole":
        model = torch.compile(model, backend="eager")
    elif how == "part":
        model.layers[1] = torch.compile(layer, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "part in place":
        layer.compile(backend="eager")
    else:
        layer.forward = torch.compile(layer.forward, backend="eager")
    with left_as_it_was(model), pytest.raises(ValueError, match=f"^{message}$"):
        tap(model).__enter__()
    if how == "whole":
        original = model._orig_mod
        assert run_tapped(original, lambda: original(hidden())) == 2


def test_torchscript() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        model = torch.jit.trace(nn.Linear(8, 8), hidden())
    with pytest.raises(ValueError, match=r"is TorchScript, .* tap the model from which it"):
        tap(model).__enter__()


@pytest.mark.parametrize("name", ["AttnProcessor", "SlicedAttnProcessor"])
def test_processors_of_diffusers(name: str) -> None:
    from diffusers.models import attention_processor

    model: Any = unet_model()
    processor = getattr(attention_processor, name)
    model.set_attn_processor(processor(1) if name.startswith("Sliced") else processor())
    refused(
        model,
        f"down_blocks.1.attentions.0.transformer_blocks.0.attn1 of UNet2DConditionModel uses {name}"
        f", which never calls {SDPA}; call model.set_attn_processor(AttnProcessor2_0()) first",
    )
    model.set_attn_processor(attention_processor.AttnProcessor2_0())
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 16))
    assert run_tapped(model, lambda: model(*inputs)) == 8


def test_attention_backends_of_diffusers() -> None:
    example = flux()
    model: Any = example.model
    try:
        model.set_attention_backend("flex")
        refused(
            model,
            "transformer_blocks.0.attn of FluxTransformer2DModel uses the attention backend "
            f'"flex", which never calls {SDPA}; call model.set_attention_backend("native") first',
        )
        for native in ("_native_math", "native"):
            model.set_attention_backend(native)
            assert run_tapped(model, example.forward) == 4
    finally:
        model.set_attention_backend("native")  # diffusers sets it for all models, too


@torch.no_grad()
def test_a_backend_that_is_set_for_all_models() -> None:
    from diffusers import attention_backend

    example = flux()
    message = r'Call model.set_attn_processor.*, or model.set_attention_backend\("native"\)\.$'
    with attention_backend("flex"), pytest.raises(TapError, match=message):
        run_tapped(example.model, example.forward)
