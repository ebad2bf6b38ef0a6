"""Scaling to the number of keys in real models: what is counted, caches, padding, no traces."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attending as at
from attending.interventions.intervention import Intervention, InterventionWarning
from attending.interventions.logit_scaling import LogitScaling
from attending.interventions.settings import load_settings, save_settings
from attending.nn.logit_scale import logit_scale

GOLDEN = Path(__file__).parents[1] / "golden" / "variable-size-attention-scaling"


class GoldenAttention(nn.Module):
    """The layer of the golden vectors."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        super().__init__()
        self.data, self.num_heads = data, int(data["num_heads"])

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            (x @ self.data[f"w_{name}"].T).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        output = nn.functional.scaled_dot_product_attention(query, key, value)
        return output.transpose(1, 2).flatten(2) @ self.data["w_out"].T


@pytest.mark.parametrize("case", ["scaled_attention_up", "scaled_attention_down"])
def test_golden(case: str) -> None:
    with np.load(GOLDEN / f"{case}.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    model = GoldenAttention(data)
    assert isinstance(LogitScaling(), Intervention)
    with LogitScaling(n_train=int(data["train_tokens"]))(model) as run:
        output = model(data["x"])
    torch.testing.assert_close(output, data["out"], rtol=1e-12, atol=1e-12)
    assert run.stats["edited_calls"] == 1
    assert run.stats["edited_rows"] == data["entropy"].numel()
    torch.testing.assert_close(model(data["x"]), data["out_default"], rtol=1e-12, atol=1e-12)
    as_trained = LogitScaling().calibrate(model, data["x"])
    assert as_trained.n_train == {"": data["x"].shape[1]}
    before = model(data["x"])
    with pytest.warns(InterventionWarning, match="no more and no fewer"), as_trained(model):
        assert torch.equal(model(data["x"]), before)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def noisy(height: int, width: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(batch, 7, 8, generator=generator),
    }


@torch.no_grad()
def test_unet_by_levels(unet: nn.Module) -> None:
    scaling = LogitScaling().calibrate(unet, noisy(16, 16))
    assert isinstance(scaling.n_train, dict)
    assert {name.split(".attn1")[1] for name in scaling.n_train} == {""}
    assert sorted(set(scaling.n_train.values())) == [16, 64, 256]
    factors = scaling.factors(unet, noisy(24, 40))  # odd at the bottom: 6 x 10 = 60 keys
    assert set(factors) == set(scaling.n_train)
    for name, n_train in scaling.n_train.items():
        n = {256: 24 * 40, 64: 12 * 20, 16: 6 * 10}[n_train]
        assert factors[name] == pytest.approx((logit_scale(n, n_train),) * 2)
    before = unet(**noisy(24, 40)).sample
    seen: list[tuple[str, float]] = []

    def look(call: at.AttentionCall, proceed: Any) -> Tensor:
        seen.append((call.name, call.softmax_scale * call.query.shape[-1] ** 0.5))
        return proceed(call)

    with scaling(unet) as run, at.tap(unet, look):
        within = unet(**noisy(24, 40)).sample
    for name, factor in seen:
        assert factor == pytest.approx(factors[name][0] if "attn1" in name else 1.0)
    assert run.edited_calls == len(factors)
    assert run.left_alone == {"it is cross-attention": len(factors)}
    assert not torch.allclose(within, before, atol=1e-4)
    assert torch.equal(unet(**noisy(24, 40)).sample, before)
    warned = pytest.warns(InterventionWarning, match=r"n_train: one number, 256, .* keys cannot")
    with warned, LogitScaling(n_train=256)(unet):
        unet(**noisy(24, 40))
    both = replace(scaling, cross=True).calibrate(unet, noisy(16, 16))
    assert len(both.n_train or ()) == 2 * len(factors)


@torch.no_grad()
def test_dit_and_sd3() -> None:
    diffusers = pytest.importorskip("diffusers")
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=12,
    ).eval()

    def inputs(side: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.ones(2, 4, side, side),
            "encoder_hidden_states": torch.ones(2, 5, 8),
            "pooled_projections": torch.ones(2, 8),
            "timestep": torch.tensor([3.0, 3.0]),
        }

    scaling = LogitScaling().calibrate(sd3, inputs(8))
    assert set(scaling.n_train.values()) == {8 * 8 + 5}  # joint attention: text and image
    assert all(
        ends == pytest.approx((logit_scale(105, 69),) * 2)
        for ends in scaling.factors(sd3, inputs(10)).values()
    )
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=2,
    ).eval()
    asked = {
        "hidden_states": torch.ones(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }
    scaling = LogitScaling(kind="constant").calibrate(dit, asked)
    assert set(scaling.n_train.values()) == {16}
    assert {len(heads) for heads in scaling.variance.values()} == {2}


def llama(**changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(20.0)
    return model


@pytest.mark.parametrize("kind", ["normalized", "constant"])
@torch.no_grad()
def test_llama_decodes_what_a_forward_gives(kind: str) -> None:
    model = llama()
    ids = torch.randint(1, 30, (2, 14), generator=torch.Generator().manual_seed(1))
    scaling = LogitScaling(kind=kind).calibrate(model, {"input_ids": ids[:, :6]})
    assert set(scaling.n_train.values()) == {6}
    plain = model(ids).logits
    with scaling(model) as run:
        whole = model(ids).logits
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(ids[:, :9], past_key_values=cache).logits]
        for token in range(9, 14):
            parts.append(model(ids[:, token : token + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    # Rows within the length of training are what they were; those beyond are not.
    torch.testing.assert_close(whole[:, :6], plain[:, :6], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[:, 6:], plain[:, 6:], atol=1e-2)
    assert run.edited_calls == 2 * 7
    with replace(scaling, minimum=0.0)(model):
        below = model(ids).logits
    assert not torch.allclose(below[:, 2:6], plain[:, 2:6], atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_counts_the_keys_of_each_sample(side: str) -> None:
    model = llama()
    scaling = LogitScaling(n_train=4)
    ids = torch.randint(1, 30, (2, 12), generator=torch.Generator().manual_seed(1))
    lengths, batch = (12, 7), torch.zeros(2, 12, dtype=torch.long)
    mask = torch.zeros(2, 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(12 - length, None) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[row, :length], 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with scaling(model):
        found = model(batch, attention_mask=mask, position_ids=positions).logits
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(found[row][mask[row] > 0], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_encoder_with_padding_and_vit_at_other_sizes() -> None:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    bert = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(8.0)
    ids = torch.randint(1, 20, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    scaling = LogitScaling().calibrate(bert, {"input_ids": ids[:, :5]})
    factors = scaling.factors(bert, {"input_ids": ids, "attention_mask": mask})
    expected = pytest.approx((logit_scale(3, 5), logit_scale(10, 5)))
    assert all(ends == expected for ends in factors.values())
    with scaling(bert):
        found = bert(ids, attention_mask=mask).last_hidden_state
        alone = bert(ids[1:, :3]).last_hidden_state
    torch.testing.assert_close(found[1:, :3], alone, rtol=1e-4, atol=1e-4)

    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
    ).eval()
    scaling = LogitScaling().calibrate(vit, torch.ones(1, 3, 16, 16))
    assert set(scaling.n_train.values()) == {17}  # with the class token
    image = {"pixel_values": torch.ones(1, 3, 8, 24), "interpolate_pos_encoding": True}
    expected = pytest.approx((logit_scale(13, 17),) * 2)
    assert all(ends == expected for ends in scaling.factors(vit, image).values())


@torch.no_grad()
def test_the_scale_that_a_model_or_another_block_has_already() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0

    attention = Attention(query_dim=8, heads=2, kv_heads=2, dim_head=4, bias=False, processor=None)
    attention.set_processor(Lumina2AttnProcessor2_0())
    hidden = torch.randn(1, 20, 8)
    model_arguments = {"encoder_hidden_states": hidden, "attention_mask": None}
    with LogitScaling(n_train=16)(attention):
        ours = attention(hidden, **model_arguments)
    theirs = attention(hidden, **model_arguments, base_sequence_length=16)
    torch.testing.assert_close(ours, theirs)
    warned = pytest.warns(InterventionWarning, match="scales already")
    with warned, LogitScaling(n_train=16)(attention):
        twice = attention(hidden, **model_arguments, base_sequence_length=16)
    with LogitScaling(n_train=16, kind="log")(attention):
        torch.testing.assert_close(attention(hidden, **model_arguments), twice)


@pytest.mark.parametrize("kind", ["T5", "GPT2", "OPT", "Granite"])
@torch.no_grad()
def test_other_models_of_transformers_are_not_suspected(kind: str) -> None:
    """Each has its own way to say what its scale is."""
    sizes = {
        "T5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
        "OPT": {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "Granite": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "attention_multiplier": 0.2,
        },
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=30, **sizes)
    model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    inputs = {"input_ids": torch.randint(1, 30, (2, 9))}
    if kind == "T5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :7]
    scaling = LogitScaling().calibrate(model, {name: ids[:, :5] for name, ids in inputs.items()})
    assert set(scaling.n_train.values()) == {5}
    with warnings.catch_warnings():
        warnings.simplefilter("error", InterventionWarning)
        with scaling(model) as run:
            model(**inputs)
    assert run.edited_calls == (2 if kind == "T5" else 1)


@torch.no_grad()
def test_blocks_nest_are_entered_again_and_leave_no_trace() -> None:
    model, ids = llama(), torch.randint(1, 30, (1, 12))
    before = model(ids).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = LogitScaling(n_train=4)(model)
    with block:
        once = model(ids).logits
    with block, block as inner:
        twice = model(ids).logits
    assert inner.edited_calls == 2
    with LogitScaling(n_train=4, kind="log")(model):
        torch.testing.assert_close(model(ids).logits, twice, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(once, twice, atol=1e-3)
    with pytest.raises(RuntimeError, match="within"), block:
        raise RuntimeError("within")
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_and_half_precision() -> None:
    model, ids = llama(), torch.randint(1, 30, (1, 12))
    with LogitScaling(n_train=4)(model):
        model(ids).logits.square().mean().backward()
        model.gradient_checkpointing_enable()
        plain = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
        model.zero_grad()
        model.train()(ids).logits.square().mean().backward()
    again = model.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)
    half = llama().bfloat16()
    with LogitScaling(n_train=4)(half), torch.no_grad():
        logits = half(ids).logits
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


class Bare(nn.Module):
    def forward(self, *arguments: Tensor, **options: Any) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*arguments, **options)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.booleans())
@torch.no_grad()
def test_each_row_by_its_visible_keys(
    queries: int, keys: int, n_train: int, seed: int, is_causal: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, queries, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, keys, 8, generator=generator, dtype=torch.float64)
    mask = None
    visible = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    else:
        mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.7
        visible = mask
    counts = visible.sum(-1, keepdim=True)
    scaled = query * logit_scale(counts.double(), n_train)
    expected = nn.functional.scaled_dot_product_attention(
        scaled, key, value, attn_mask=visible, enable_gqa=True
    )
    model = Bare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InterventionWarning)
        with LogitScaling(n_train=n_train, minimum=0.0)(model):
            found = model(query, key, value, mask, is_causal=is_causal, enable_gqa=True)
    real = (counts > 0).expand(2, 4, queries, 1).squeeze(-1)
    if queries == keys and mask is not None:  # rows at hidden keys count as padding
        real = real & mask.flatten(1, 2).any(1)[:, None]
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_without_a_dimension_of_heads_and_with_clamps() -> None:
    model = Bare()
    query = torch.randn(3, 6, 8)
    with LogitScaling(n_train=3)(model):
        flat = model(query, query, query, is_causal=True)
        heads = model(query[:, None], query[:, None], query[:, None], is_causal=True)
    torch.testing.assert_close(flat, heads[:, 0])
    with LogitScaling(n_train=3, maximum=1.1)(model):
        found = model(query, query, query)
    expected = nn.functional.scaled_dot_product_attention(query, query, query, scale=1.1 * 8**-0.5)
    torch.testing.assert_close(found, expected)


def test_settings_are_stored(tmp_path: Path) -> None:
    scaling = LogitScaling(
        kind="constant", n_train={"a": 4, "b": 5.5}, variance={"a": (1.0, 2.0), "b": (3.0, 0.5)}
    )
    path = save_settings(scaling, tmp_path / "scaling.json")
    assert load_settings(LogitScaling, path) == scaling


def test_refusals() -> None:
    model = llama()
    with pytest.raises(ValueError, match="kind: expected one of normalized, log, constant"):
        LogitScaling(kind="entropy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_train: expected counts of at least 1, got 0"):
        LogitScaling(n_train={"a": 0})
    with pytest.raises(ValueError, match=r"minimum, maximum: .* got 2.0 and 1.0"):
        LogitScaling(minimum=2.0, maximum=1.0)
    with pytest.raises(ValueError, match=r"n_train: expected numbers .* got None.*calibrate"):
        LogitScaling()(model)
    with pytest.raises(ValueError, match=r"variance: expected numbers .*calibrate"):
        LogitScaling(kind="constant", n_train=4)(model)
    with pytest.raises(ValueError, match=r"n_train: expected names .* got 'encoder'"):
        LogitScaling(n_train={"encoder": 4})(model)
    bare, tensor = Bare(), torch.randn(1, 2, 4, 8)
    warned = pytest.warns(InterventionWarning, match="1 time because its layer has no n_train")
    with warned, LogitScaling(n_train={})(bare):
        bare(tensor, tensor, tensor)
    with pytest.raises(at.TapError), LogitScaling(n_train=4)(nn.Linear(2, 2)):
        pass
