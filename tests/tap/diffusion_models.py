"""Tiny models of diffusers, and what a tap has to see in each."""

import torch
from torch import nn

from tests.tap.models import Example, Seen, layers


def sd3() -> Example:
    """Joint attention: 4 patches and 5 words ask each other, which is self-attention over both."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32,
        pooled_projection_dim=16, out_channels=4, pos_embed_max_size=4,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3.0, 7.0]),
    }
    seen = layers("transformer_blocks.{}.attn", (2, 4, 9, 8))
    return Example(model, lambda: model(**inputs).sample, seen)


def flux() -> Example:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    seen = layers("transformer_blocks.{}.attn", (2, 2, 9, 16))
    seen += layers("single_transformer_blocks.{}.attn", (2, 2, 9, 16))
    return Example(model, lambda: model(**inputs).sample, seen)


def wan() -> Example:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 8, 16),  # 8 words, and 8 patches
    }
    seen = [
        Seen(f"blocks.{i}.attn{1 + cross}", i, bool(cross), (2, 2, 8, 16), (2, 2, 8, 16))
        for i in range(2)
        for cross in range(2)
    ]
    return Example(model, lambda: model(**inputs).sample, seen)


def unet_model() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def unet() -> Example:
    model = unet_model()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 16))
    # One attention layer down, one in the middle, two up; sides of 4. `attention_head_dim` is the
    # number of heads here: diffusers keeps that misnomer.
    places = [
        ("down_blocks.1.attentions.0", 1),
        ("mid_block.attentions.0", 0),
        ("up_blocks.0.attentions.0", 0),
        ("up_blocks.0.attentions.1", 0),
    ]
    seen = [
        Seen(f"{place}.transformer_blocks.0.attn{1 + cross}", layer, bool(cross), query, key)
        for place, layer in places
        for query in [(2, 2, 16, 16)]
        for cross, key in enumerate([query, (2, 2, 5, 16)])
    ]
    return Example(model, lambda: model(*inputs).sample, seen)


DIFFUSION = [sd3, flux, wan, unet]
