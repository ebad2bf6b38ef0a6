"""Where a model has activations, weights and attention that are orders of magnitude too large.

For whoever quantises, prunes or debugs a model. An et al. ("Systematic Outliers in Large Language
Models", ICLR 2025, 2502.06415) describe three kinds, which cause one another: a few large weights
in an early down-projection write huge values into fixed channels of the residual stream at the
first token and at weak delimiters; the norm turns such a token into a constant direction; and every
later layer looks at it, as a sink.

    report = find_outliers(model, tokenizer(text, return_tensors="pt"), criterion="median")
    print(report)

The rules by themselves, on tensors, are in `attending.probes.outlier_rules`. What stops a model in
training from growing outliers is in `attending.nn.context_scale`.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attending.nn.linear import linear_layers
from attending.probes._outlier_collector import Collector
from attending.probes.hidden import watch_blocks
from attending.probes.outlier_report import OutlierReport, WeightRecord
from attending.probes.outlier_rules import (
    Criterion,
    check_criterion,
    check_share,
    weight_outlier_ratios,
)
from attending.taps import tap
from attending.taps.blocks import blocks_of, outermost
from attending.taps.running import as_batches, evaluating, run_model


def find_outliers(
    model: nn.Module,
    batches: Any,
    *,
    criterion: Criterion = "mean",
    tau: float = 1000.0,
    attention_share: float = 0.1,
    weight_factor: float = 5.0,
) -> OutlierReport:
    """Run a model and report the outliers of its activations, weights and attention.

    Looks at the output of every block and the input of every down-projection (a linear layer
    outside attention that narrows to the width of the block), at every linear layer in the blocks,
    and at the attention that keys receive, without a map. Works on models of transformers, timm and
    diffusers, and on any that keep their blocks in an `nn.ModuleList` or `nn.Sequential` and end in
    `scaled_dot_product_attention`. The model runs in eval mode without gradients, and is left as it
    was. Each sequence is judged by itself; padding, told by `attention_mask`, is left out.

    Args:
        model: the model.
        batches: what to run it on: a mapping of keyword arguments such as a tokenizer returns, a
            tensor, a tuple of positional arguments, or an iterable of those.
        criterion: of activations: "mean" (the paper), "median" (Sun et al.) or "magnitude"
            (LLM.int8); see `activation_outliers`. "mean" needs far more than `tau` values in a
            sequence.
        tau: the factor of "mean" and "median".
        attention_share: a key is an outlier when it receives this share of all attention,
            `R >= share * T`.
        weight_factor: a row or column of a weight is an outlier when `max |w| / mean |w|` exceeds
            this multiple of the layer's median over rows or columns. The paper gives no figure; 5
            is ours: normally distributed weights stay below 2.

    Raises:
        ValueError: for an argument out of range, no batches, or attention that no tap can see.
        TapError: if the model made no attention call.
    """
    check_criterion(criterion, tau)
    check_share(attention_share)
    if not weight_factor > 1:
        raise ValueError(f"weight_factor: expected a number above 1, got {weight_factor}.")
    collector = Collector(criterion, tau, attention_share)
    ran = False
    with evaluating(model), torch.no_grad(), ExitStack() as watching:
        watching.enter_context(tap(model, collector.attention_call))
        watching.enter_context(watch_blocks(model, collector.block))
        _watch_inputs(model, collector.down_projection, watching)
        for batch in as_batches(batches):
            ran = True
            collector.begin(batch)
            run_model(model, batch)
            collector.finish()
        if not ran:
            raise ValueError("batches: expected at least one, got none.")
    return collector.report(_weights(model, weight_factor), weight_factor)


def _watch_inputs(
    model: nn.Module, handler: Callable[[str, Tensor], None], stack: ExitStack
) -> None:
    """Show the input of every linear layer of the blocks that narrows, outside attention."""

    def hook(name: str) -> Callable[..., None]:
        def show(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim() == 3:
                handler(name, args[0])

        return show

    for name, module, _ in _down_projections(model):
        stack.callback(module.register_forward_pre_hook(hook(name)).remove)


def _down_projections(model: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """Linear layers in blocks that narrow to the widest of the narrow widths of their block.

    The condition leaves out the low-rank factors of adapters.
    """
    blocks = outermost(list(blocks_of(model)))
    narrowing: dict[str, list[tuple[str, nn.Module, Tensor]]] = {block: [] for block in blocks}
    for name, module, weight in linear_layers(model, outside_attention=True):
        block = next((one for one in blocks if name.startswith(f"{one}.")), None)
        if block is not None and weight.shape[1] > weight.shape[0]:
            narrowing[block].append((name, module, weight))
    return [
        one
        for found in narrowing.values()
        for one in found
        if one[2].shape[0] == max(other[2].shape[0] for other in found)
    ]


def _weights(model: nn.Module, factor: float) -> list[WeightRecord]:
    blocks = outermost(list(blocks_of(model)))
    records = []
    for name, _, weight in linear_layers(model):
        if not any(name.startswith(f"{block}.") for block in blocks):
            continue
        ratios = weight_outlier_ratios(weight)
        rows, columns = (
            {
                int(index): float(ratio[index])
                for index in (ratio > factor * ratio.median()).nonzero().flatten()
            }
            for ratio in (ratios.row, ratios.column)
        )
        median = float(torch.cat([ratios.row, ratios.column]).median())
        records.append(WeightRecord(name, ratios.largest, median, rows, columns))
    return records
