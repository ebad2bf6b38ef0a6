"""Calibrating PAROAttention: the order of each head, and the blocks that it needs.

    calibration = PAROCalibration(grid=(13, 30, 45), steps=50, text_tokens=226)
    ...                              # a sampling, with calibration.see(layer, step, query, key)
    calibration.choose_orders()
    ...                              # the same sampling, seen once more
    plan = calibration.plan(density=0.3)

`attending.interventions.PAROAttention.calibrate` does that with a running model. What a head looks
at hardly depends on the prompt (the paper finds similarities of at least 0.99), so one or two
samplings are enough; use other prompts than those that you report.

Source: PAROAttention (Zhao et al., arXiv 2506.16054). The authors' calibration is not published as
code. The scores of the orders are those of the paper's source as others read it [3rd]; that a
threshold for each head meets a target of density is [inferred], and so are the mean over time of
the scores and the middle step of each part of the sampling.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.sparse.axis_order import (
    axis_orders,
    head_token_index,
    permute_key_bias,
    permute_tokens,
)
from attending.sparse.block_scores import block_probabilities
from attending.sparse.order_scores import combined_score, order_statistics
from attending.sparse.paro import PAROPlan, pack_masks
from attending.sparse.static_mask import always_kept, static_block_mask

Criterion = Literal["corrected", "literal", "mass"]


class PAROCalibration:
    """Chooses orders and blocks from queries and keys that it is shown, twice.

    Every call of self-attention of a sampling is shown with `see`; then `choose_orders`; then the
    same sampling once more; then `plan`. Of each part of the sampling only the middle step is
    looked at (`wants`). Two runs, as the block sums of all six orders would not fit in memory for a
    large model.

    Args:
        grid: tokens along each axis, as (frames, height, width) or (height, width).
        steps: of the sampling.
        block_size: tokens along each side of a block.
        eps, sigma: a block is empty if a share sigma of it is under eps, see `order_statistics`.
        criterion: what an order is chosen by: "corrected" or "literal", see `combined_score`; or
            "mass", the attention in the fullest blocks, see `OrderStatistics.kept_mass`.
        alpha: of the combined score.
        density: kept blocks over all blocks of a map, for `plan` and for "mass".
        timestep_bins: equal parts of the sampling, at most as many as there are steps.
        shared_from: parts from this share of the sampling on have one mask together.
        candidates: which orders may be chosen; by default all that the grid has.
        keep_last: always keep the last row and column of blocks, as the authors' plans do.
        text_tokens, text_first: tokens outside the grid, see `axis_order.token_index`. Their blocks
            are always kept.

    Raises:
        ValueError: for arguments out of their range; the message names the argument.
    """

    def __init__(
        self,
        grid: Sequence[int],
        *,
        steps: int,
        block_size: int = 64,
        eps: float = 1e-3,
        sigma: float = 0.9,
        alpha: float = 0.5,
        criterion: Criterion = "corrected",
        density: float = 0.3,
        timestep_bins: int = 10,
        shared_from: float = 0.5,
        candidates: Sequence[str] | None = None,
        keep_last: bool = True,
        text_tokens: int = 0,
        text_first: bool = True,
    ) -> None:
        known = axis_orders(grid)
        wanted = known if candidates is None else tuple(candidates)
        if not wanted or not set(wanted) <= set(known):
            raise ValueError(f"candidates: expected some of {known}, got {candidates!r}.")
        if steps < 1 or timestep_bins < 1:
            raise ValueError(
                "steps, timestep_bins: expected at least 1 of both, got "
                f"{steps} and {timestep_bins}."
            )
        if not 0 <= shared_from <= 1:
            raise ValueError(f"shared_from: expected a share from 0 to 1, got {shared_from}.")
        if criterion not in get_args(Criterion):
            raise ValueError(f"criterion: expected one of {get_args(Criterion)}, got {criterion!r}")
        combined_score(torch.ones(1), torch.ones(1), alpha=alpha)  # raises if it must
        static_block_mask(torch.ones(1, 1), density)  # and so does this
        self.grid, self.steps, self.block_size = tuple(grid), steps, block_size
        self.eps, self.sigma, self.alpha = eps, sigma, alpha
        self.criterion, self.density = criterion, density
        self.bins = min(timestep_bins, steps)
        self.masks = min(int(self.bins * shared_from) + 1, self.bins)
        self.candidates = [known.index(name) for name in wanted]
        self.keep_last, self.text_tokens, self.text_first = keep_last, text_tokens, text_first
        self.orders: dict[str, Int[Tensor, " heads"]] | None = None
        self._scores: dict[str, list[Tensor]] = defaultdict(list)
        self._sums: dict[str, list[Tensor | None]] = {}

    @property
    def tokens(self) -> int:
        """Tokens of the grid and of the text."""
        return prod(self.grid) + self.text_tokens

    def wants(self, step: int) -> bool:
        """Whether this step is looked at: the middle one of its part of the sampling."""
        part = min(step, self.steps - 1) * self.bins // self.steps
        first = -(-part * self.steps // self.bins)
        last = -(-(part + 1) * self.steps // self.bins) - 1
        return step == (first + last) // 2

    def see(
        self,
        layer: str,
        step: int,
        query: Float[Tensor, "batch heads tokens dim"],
        key: Float[Tensor, "batch kv_heads tokens dim"],
        *,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Look at a call, if its step is wanted.

        Args:
            layer: its name.
            step: of the sampling, from 0.
            query, key: with positions in them, in the order of the model.
            bias: of keys, boolean or float, `[batch, heads, 1, tokens]`.
            scale: of the scores; `dim ** -0.5` by default.
        """
        if not self.wants(step):
            return
        if self.orders is not None:
            self._see_sums(layer, step, query, key, bias, scale)
            return
        if len(self.candidates) == 1:
            self._scores[layer].append(torch.zeros(3, query.shape[1], len(axis_orders(self.grid))))
            return
        found = order_statistics(
            query,
            key,
            self.grid,
            block_size=self.block_size,
            eps=self.eps,
            text_tokens=self.text_tokens,
            text_first=self.text_first,
            bias=bias,
            scale=scale,
        )
        scores = found.sparsity(self.sigma), found.quantisation(), found.kept_mass(self.density)
        self._scores[layer].append(torch.stack(scores).double().mean(1).cpu())  # over the batch

    def choose_orders(self) -> dict[str, Int[Tensor, " heads"]]:
        """The order of each head, by the mean of its scores over all that was seen."""
        if not self._scores:
            raise ValueError(
                f"calibration: expected to see queries and keys at the middle of {self.bins} parts "
                f"of {self.steps} steps, and saw none. Is `steps` that of the sampling?"
            )
        self.orders = {}
        for layer, seen in self._scores.items():
            means = torch.stack(seen).mean(0)[..., self.candidates]
            sparsity, quantisation, mass = means.unbind(0)
            literal = self.criterion == "literal"
            score = combined_score(sparsity, quantisation, alpha=self.alpha, literal=literal)
            best = (-mass if self.criterion == "mass" else score).argmin(-1)
            self.orders[layer] = torch.tensor(self.candidates)[best]
        return self.orders

    def _see_sums(
        self,
        layer: str,
        step: int,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        scale: float | None,
    ) -> None:
        if self.orders is None or layer not in self.orders:
            raise ValueError(f"layer: expected one that the first run had, got {layer!r}.")
        index = head_token_index(
            self.grid,
            self.orders[layer].tolist(),
            text_tokens=self.text_tokens,
            text_first=self.text_first,
            device=query.device,
        )
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        query, key = permute_tokens(query, index), permute_tokens(key, index)
        bias = None if bias is None else permute_key_bias(bias, index)
        found = block_probabilities(query, key, self.block_size, attn_mask=bias, scale=scale)
        mass = found.mean(0).cpu()  # over the batch
        sums = self._sums.setdefault(layer, [None] * self.masks)
        number = min(step * self.bins // self.steps, self.masks - 1)
        before = sums[number]
        sums[number] = mass if before is None else before + mass

    def plan(self, density: float | None = None) -> PAROPlan:
        """The plan that keeps a share of all blocks of every map. Ask for several if you like.

        Args:
            density: kept blocks over all blocks, if not that of the calibration; those with text
                and the last ones, which are always kept, count. Where these alone are more, the
                plan has more.

        Raises:
            ValueError: for a density out of its range, or if the second run was not seen whole.
        """
        if self.orders is None or set(self._sums) != set(self.orders):
            raise ValueError(
                "calibration: expected choose_orders and then the whole sampling once more, got "
                f"{len(self._sums)} of {len(self.orders or {})} layers."
            )
        density = self.density if density is None else density
        layers = tuple(self.orders)
        heads = {layer: len(order) for layer, order in self.orders.items()}
        if len(set(heads.values())) > 1:
            raise ValueError(f"model: expected as many heads in every layer, got {heads}.")
        always = always_kept(
            self.tokens,
            self.block_size,
            text_tokens=self.text_tokens,
            text_first=self.text_first,
            keep_last=self.keep_last,
        )
        rows = []
        for layer in layers:
            missing = [number for number, sums in enumerate(self._sums[layer]) if sums is None]
            if missing:
                raise ValueError(
                    f"calibration: expected {layer} at the middle of every part of {self.steps} "
                    f"steps in the second run, missed those of masks {missing}."
                )
            sums = torch.stack([sums for sums in self._sums[layer] if sums is not None])
            rows.append(pack_masks(static_block_mask(sums, density, always=always)))
        return PAROPlan(
            grid=self.grid,
            layers=layers,
            orders=torch.stack([self.orders[layer] for layer in layers]),
            packed_masks=torch.stack(rows, 1),
            block_size=self.block_size,
            steps=self.steps,
            timestep_bins=self.bins,
            text_tokens=self.text_tokens,
            text_first=self.text_first,
        )
