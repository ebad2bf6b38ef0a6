"""Small denoisers for the tests of caches."""

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """h + tanh(h W^T + b (1 + drift t)): what it adds depends on the step as far as drift says."""

    def __init__(self, weight: Tensor, bias: Tensor, drift: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.drift = drift
        self.calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        return hidden_states + torch.tanh(
            hidden_states @ self.weight.T + self.bias * (1 + self.drift * timestep.double())
        )


class Toy(nn.Module):
    """The denoiser of the golden vectors: step s has the timestep s."""

    def __init__(self, weight: Tensor, bias: Tensor, drift: float = 0.05) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(w, b, drift) for w, b in zip(weight, bias, strict=True)])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep)
        return hidden_states

    @property
    def block_calls(self) -> int:
        return sum(block.calls for block in self.blocks)


class Constant(nn.Module):
    """A block that adds the same at every step."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.added = nn.Parameter(torch.randn(dim, dtype=torch.float64, generator=generator))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.added


class Steady(nn.Module):
    """A denoiser whose residuals do not depend on the step."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Constant(dim, seed) for seed in range(count)])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Twin(nn.Module):
    """A block of two streams that returns them the other way round, as SD3's does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.tanh(image + text + time)
        return text + self.text(both), image + self.image(both)


class TwinDenoiser(nn.Module):
    """Two streams of the same shape, in blocks that nobody knows."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Twin(dim) for _ in range(count)])

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            text, hidden_states = block(hidden_states, text, timestep)
        return hidden_states - text


def wan(layers: int = 3, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny WanTransformer3DModel with random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": layers,
    }
    return WanTransformer3DModel(**settings | changes).eval()


def wan_inputs(timestep: float, seed: int = 0, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 3, 2, 4, 4, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator),
    }


def sd3(layers: int = 3, seed: int = 0) -> nn.Module:
    """A tiny SD3Transformer2DModel: two streams, and a last block that drops the text."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def sd3_inputs(timestep: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "timestep": torch.full((1,), timestep),
    }


def flux(double: int = 2, single: int = 3, seed: int = 0) -> nn.Module:
    """A tiny FluxTransformer2DModel: blocks of two streams, in two lists."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def flux_inputs(timestep: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 6, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "timestep": torch.full((1,), timestep / 1000),  # Flux takes it in [0, 1]
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def hunyuan(double: int = 2, single: int = 3, seed: int = 0) -> nn.Module:
    """A tiny HunyuanVideoTransformer3DModel: two lists of blocks, and one that refines the text."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(seed)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=double,
        num_single_layers=single,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()


def hunyuan_inputs(timestep: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 4, 2, 3, 3, generator=generator),
        "timestep": torch.full((1,), timestep),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=generator),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "guidance": torch.full((1,), 6000.0),
    }


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a cache might leave behind: instance attributes, hooks, and whose forward it is."""
    return {
        name: (
            sorted(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            "forward" in module.__dict__,
        )
        for name, module in model.named_modules()
    }
