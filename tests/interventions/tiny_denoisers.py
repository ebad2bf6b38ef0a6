"""Denoisers of diffusers, as small as they get, with random weights, and inputs for them."""

import torch
from torch import Tensor, nn

from tests.interventions.denoisers import wan


def tiny_flux(single_layers: int = 2) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def flux_inputs(height: int = 5, width: int = 6, text: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return {
        "hidden_states": torch.randn(1, height * width, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 8, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def tiny_sd3(dual: bool = False) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if dual else (),
    ).eval()


def sd3_inputs(height: int = 10, width: int = 12, text: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 8, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
    }


def tiny_wan() -> nn.Module:
    return wan(layers=2)


def wan_inputs(frames: int = 3, height: int = 10, width: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 3, frames, height, width, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 8, generator=generator),
    }
