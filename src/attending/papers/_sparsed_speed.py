"""What the attention of a whole denoising loop costs with SparseD, at lengths of one's choice."""

import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from attending.core.blocks import block_sparse_attention
from attending.interventions.sparsed import SparseD
from attending.sparse.sparsed import sparsed_plan

HEADS, DIM = 2, 64


@torch.no_grad()
def attention_seconds(
    seed: int, *, tokens: int, answer: int, steps: int, skip: float, select: float, block_size: int
) -> dict[str, float]:
    """Processor time of the attention of a loop with SparseD, over that of dense attention.

    Two heads of dim 64, random queries and keys. SparseD's time has its choice of blocks in it.

    Returns:
        `attention_seconds_ratio`, the mean of two rounds by turns; `attention_bound`, what it would
        be if the choice cost a dense call and sparse calls their density of one; and that
        `attention_density`.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, HEADS, tokens, DIM, generator=generator).unbind(0)
    first = SparseD(skip=skip).last_dense_step(steps) + 1

    def loop(dense_steps: int) -> tuple[float, float]:
        start, density = time.process_time(), 1.0
        for _ in range(dense_steps):
            scaled_dot_product_attention(query, key, value)
        if dense_steps < steps:
            plan = sparsed_plan(query, key, answer, select=select, block_size=block_size)
            density = plan.density
            for _ in range(steps - dense_steps):
                block_sparse_attention(query, key, value, plan)
        return time.process_time() - start, density

    ratios = []
    for _ in range(3):  # by turns, the first to warm up
        dense, (sparse, density) = loop(steps)[0], loop(first)
        ratios.append(sparse / dense)
    return {
        "attention_seconds_ratio": sum(ratios[1:]) / 2,
        "attention_bound": (first + 1 + (steps - first) * density) / steps,
        "attention_density": density,
    }
