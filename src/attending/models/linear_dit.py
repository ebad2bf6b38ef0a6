"""A small diffusion transformer whose attention may be linear, for images of one size.

The backbone of DiT (2212.09748): patches, positions, blocks that time and class modulate (adaLN-
Zero), an output of the shape of the image. With `attention="dydila"` it is what the abstract of
"DyDi-LiT" (2601.13683) describes: a DiT whose softmax attention is replaced by DyDiLA; the rest of
that model is reconstructed [inferred], see `attending.nn.dydila`.

What the output means is the training's business: a velocity (flow matching), noise, or an image.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.nn.dydila import DyDiLA, image_grid
from attending.nn.focused_attention import focused_linear_attention

Attention = Literal["softmax", "relu", "focused", "dydila", "dydila_undifferenced"]


class ImageAttention(nn.Module):
    """Self-attention over the tokens of an image, without biases: softmax, or a static kernel.

    What DyDiLA is compared with. The linear ones have the depth-wise convolution of the values, as
    LiT and FLatten have; softmax has none, as DiT has none.

    Args:
        embed_dim: width in and out.
        num_heads: heads.
        power: None for softmax; of the focused kernel, 1.0 for plain ReLU.
    """

    def __init__(self, embed_dim: int, num_heads: int, power: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.power = num_heads, power
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(4)
        )
        self.convolution: nn.Conv2d | None = None
        if power is not None:
            self.convolution = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim)

    def forward(
        self, hidden: Float[Tensor, "batch tokens dim"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend; `grid` is as in `DyDiLA`."""
        query, key, value = self.project(hidden)
        if self.power is None:
            output = scaled_dot_product_attention(query, key, value)
        else:
            output = focused_linear_attention(query, key, value, power=self.power)
        output = output.transpose(1, 2).flatten(2)
        if self.convolution is not None:
            channels = value.transpose(2, 3).flatten(1, 2)
            image = channels.unflatten(2, image_grid(hidden.shape[1], grid))
            output = output + self.convolution(image).flatten(2).transpose(1, 2)
        return self.out_proj(output)  # type: ignore[no-any-return]

    def project(self, hidden: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `[batch, heads, tokens, head_dim]`."""
        query, key, value = (
            layer(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value


class LinearDiT(nn.Module):
    """A diffusion transformer over images `[batch, channels, image_size, image_size]`.

        model = LinearDiT(image_size=8, channels=1, num_classes=10, attention="dydila")
        velocity = model(noisy, time, labels)

    Starts as a function that is 0 everywhere (adaLN-Zero, output layer at 0).

    Args:
        image_size: height and width.
        channels: of the image.
        num_classes: classes that it can be conditioned on. Label `num_classes` means none, for
            classifier-free guidance.
        patch_size: a token is a patch of `patch_size * patch_size`.
        embed_dim: width.
        depth: blocks.
        num_heads: heads.
        attention: "softmax" (DiT); "relu" and "focused" (plain linear attention with a kernel of
            power 1 and 3); "dydila"; "dydila_undifferenced", which is DyDiLA with the lambdas kept
            at 0.
        mlp_ratio: width of the feed-forward layers over `embed_dim`. DyDiLA has 6 `embed_dim^2`
            parameters per block more than the others (and its routers); 7 for those against 4 for
            it makes them even.

    Raises:
        ValueError: for sizes that do not fit or an unknown `attention`.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int,
        patch_size: int = 1,
        embed_dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        attention: Attention = "dydila",
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        if image_size < 1 or patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of image_size {image_size}, got {patch_size}."
            )
        if num_heads < 1 or embed_dim % (2 * num_heads):
            raise ValueError(
                f"num_heads: expected a divisor of half of embed_dim {embed_dim}, got {num_heads}."
            )
        if attention not in get_args(Attention):
            raise ValueError(
                f"attention: expected one of {get_args(Attention)}, got {attention!r}."
            )
        self.patch_size, self.channels, self.num_classes = patch_size, channels, num_classes
        self.side = image_size // patch_size
        self.patches = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn(self.side**2, embed_dim) * 0.02)
        self.classes = nn.Embedding(num_classes + 1, embed_dim)
        self.time = nn.Sequential(
            nn.Linear(embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        self.blocks = nn.ModuleList(
            _Block(embed_dim, _attention(attention, embed_dim, num_heads), mlp_ratio)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(embed_dim, 2 * embed_dim))
        self.out = _zero(nn.Linear(embed_dim, patch_size**2 * channels))

    def forward(
        self,
        image: Float[Tensor, "batch channels height width"],
        time: Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The output for noisy images at a time in [0, 1], of the shape of the images.

        Raises:
            ValueError: for images of another size than the model is for.
        """
        size = self.side * self.patch_size
        if tuple(image.shape[1:]) != (self.channels, size, size):
            raise ValueError(
                f"image: expected [batch, {self.channels}, {size}, {size}], got "
                f"{list(image.shape)}."
            )
        hidden = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(time_features(time, hidden.shape[-1])) + self.classes(labels)
        condition = nn.functional.silu(condition)
        for block in self.blocks:
            hidden = block(hidden, condition, (self.side, self.side))
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        pixels = self.out(self.norm(hidden) * (1 + scale) + shift)
        squares = pixels.unflatten(-1, (self.channels, self.patch_size, self.patch_size))
        squares = squares.unflatten(1, (self.side, self.side))  # [b, y, x, c, py, px]
        made: Tensor = squares.permute(0, 3, 1, 4, 2, 5).reshape(image.shape)
        return made


class _Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim)
        )
        self.modulation = _zero(nn.Linear(dim, 6 * dim))

    def forward(self, hidden: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """One update of the residual stream."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition)[
            :, None
        ].chunk(6, -1)
        attended = self.attention(self.attention_norm(hidden) * (1 + scale) + shift, grid)
        hidden = hidden + gate * attended
        update = self.mlp(self.mlp_norm(hidden) * (1 + mlp_scale) + mlp_shift)
        moved: Tensor = hidden + mlp_gate * update
        return moved


def time_features(time: Float[Tensor, " batch"], dim: int) -> Float[Tensor, "batch dim"]:
    """Cosines and sines of times in [0, 1], at wave lengths from 2 pi / 1000 to 20 pi."""
    half = dim // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32) / half
    angles = 1000 * time.float()[:, None] * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angles.cos(), angles.sin()], -1).to(time.dtype)


def _attention(kind: Attention, dim: int, heads: int) -> nn.Module:
    if kind == "dydila":
        return DyDiLA(dim, heads)
    if kind == "dydila_undifferenced":
        made = DyDiLA(dim, heads, difference_init=0.0)
        made.query_difference.values.requires_grad_(False)  # shared with those of the keys
        return made
    return ImageAttention(dim, heads, {"softmax": None, "relu": 1.0, "focused": 3.0}[kind])


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
