"""The experiment of Combiner: handwritten digits, pixel by pixel, with and without summaries.

A causal model of the 64 pixels of scikit-learn's digits, each of 17 levels, row by row; the measure
is bits per pixel on images that it has not seen. Seven models differ in what a pixel may attend to
and in nothing else, weights included: everything (softmax), three sparse layouts, and these layouts
with a summary of what they leave out. None of the plans here has parameters of its own.

The sparse layouts are those of their own papers, so that they are no straw men: "fixed" sees its
row and the last pixel of each earlier row (Child et al. 2019), "logsparse" itself and the pixels
1, 2, 4, ... before it (Li et al. 2019), "axial" its row and its column.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from attending.nn.combiner import combiner_attention
from attending.nn.combiner_plans import AxialPlan, FixedPlan, LogsparsePlan, Plan

SIDE = 8
PIXELS = SIDE * SIDE
LEVELS = 17  # 0 to 16
PLANS: Mapping[str, Plan] = {
    "combiner_fixed": FixedPlan(SIDE),
    "combiner_logsparse": LogsparsePlan(),
    "combiner_axial": AxialPlan(SIDE, "rowmajor"),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sparse_mask(layout: str) -> Tensor:
    """What a pixel sees, boolean `[64, 64]`, True = visible."""
    i, j = torch.arange(PIXELS)[:, None], torch.arange(PIXELS)
    same_row, gap = i // SIDE == j // SIDE, i - j
    if layout == "fixed":
        seen = same_row | (j % SIDE == SIDE - 1)
    elif layout == "logsparse":
        seen = (gap == 0) | torch.isin(gap, 2 ** torch.arange(PIXELS.bit_length()))
    elif layout == "axial":
        seen = same_row | (i % SIDE == j % SIDE)
    else:
        raise ValueError(f"layout: expected fixed, logsparse or axial, got {layout!r}.")
    return seen & (gap >= 0)


def attention_of(variant: str) -> Attend:
    """The causal attention of a variant, on `[batch, heads, 64, dim]`."""
    if variant == "softmax":
        return lambda query, key, value: scaled_dot_product_attention(
            query, key, value, is_causal=True
        )
    if variant in PLANS:
        plan = PLANS[variant]
        return lambda query, key, value: combiner_attention(
            query, key, value, is_causal=True, plan=plan
        )
    mask = sparse_mask(variant)
    return lambda query, key, value: scaled_dot_product_attention(query, key, value, mask)


class Block(nn.Module):
    """A pre-norm transformer block with a given attention."""

    def __init__(self, dim: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.merge = nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """One update of the residual stream."""
        parts = self.project(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        hidden = hidden + self.merge(self.attend(query, key, value).transpose(1, 2).flatten(2))
        update: Tensor = self.down(nn.functional.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + update


class PixelModel(nn.Module):
    """Logits of each pixel, given those before it; positions by row and column."""

    def __init__(self, dim: int, heads: int, layers: int, attend: Attend) -> None:
        super().__init__()
        self.levels = nn.Embedding(LEVELS + 1, dim)  # the last is the start
        self.rows, self.columns = nn.Embedding(SIDE, dim), nn.Embedding(SIDE, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, attend) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, LEVELS)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[batch, 64]` levels to `[batch, 64, 17]` logits."""
        start = torch.full_like(pixels[:, :1], LEVELS)
        place = torch.arange(PIXELS)
        hidden = self.levels(torch.cat([start, pixels[:, :-1]], 1))
        hidden = hidden + self.rows(place // SIDE) + self.columns(place % SIDE)
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


@dataclass(frozen=True)
class Found:
    """What became of one variant: bits per pixel on new images, and on the way there."""

    bits: float
    curve: list[tuple[int, float]]


def run(
    variants: tuple[str, ...],
    seed: int,
    *,
    dim: int,
    heads: int,
    layers: int,
    batch: int,
    steps: int,
    learning_rate: float,
    test_images: int,
    looks: int,
) -> dict[str, Found]:
    """Train one model for each variant, on the same images in the same order."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = images[order[:test_images]], images[order[test_images:]]
    found = {}
    with torch.random.fork_rng(devices=[]):
        for variant in variants:
            torch.manual_seed(seed)
            model = PixelModel(dim, heads, layers, attention_of(variant))
            data = torch.Generator().manual_seed(seed + 1)
            found[variant] = _train(model, train, test, data, batch, steps, learning_rate, looks)
    return found


def _train(
    model: PixelModel,
    train: Tensor,
    test: Tensor,
    data: torch.Generator,
    batch: int,
    steps: int,
    learning_rate: float,
    looks: int,
) -> Found:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = max(steps // 20, 1)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    curve = []
    for step in range(steps):
        pixels = train[torch.randint(len(train), (batch,), generator=data)]
        loss = cross_entropy(model(pixels).flatten(0, 1), pixels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // looks, 1) == 0:
            curve.append((step + 1, _bits(model, test)))
    return Found(_bits(model, test), curve)


@torch.no_grad()
def _bits(model: PixelModel, images: Tensor) -> float:
    loss = cross_entropy(model(images).flatten(0, 1), images.flatten())
    return float(loss) / math.log(2)
