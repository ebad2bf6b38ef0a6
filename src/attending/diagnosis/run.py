"""The diagnosis of a model: inputs in, statistics as it runs, findings drawn from them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attending import __version__
from attending.diagnosis.collect import Collector
from attending.diagnosis.findings import find
from attending.diagnosis.inputs import Forward, as_batches
from attending.diagnosis.record import STATISTICS, Diagnosis
from attending.diagnosis.thresholds import Thresholds
from attending.diagnosis.tokens import TokenClasses, TokenReader
from attending.taps.running import device_of, evaluating, run_model, to_device

# `max_probability` has no fused form and costs as much as an eager map, so it is only on request.
DEFAULT_STATISTICS = tuple(name for name in STATISTICS if name != "max_probability")


def diagnose(
    model: nn.Module,
    inputs: Any,
    *,
    tokenizer: Any = None,
    token_classes: TokenClasses | None = None,
    statistics: Iterable[str] | None = None,
    max_batches: int | None = None,
    thresholds: Thresholds | None = None,
    forward: Forward | None = None,
    map_size: int = 32,
    name: str | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Run a model and say what its attention does, layer by layer and head by head.

    The statistics are exact, and no map of queries by keys is ever built: memory grows with the
    number of tokens. The model runs in evaluation mode without gradients and is afterwards what it
    was. Padding is left out everywhere: a key that no query may see is padding.

    Args:
        model: any PyTorch model whose attention ends in `scaled_dot_product_attention`: encoders,
            decoders and both, of transformers, diffusers, timm, or your own. Sharded over devices
            (`device_map`) is fine.
        inputs: one batch or an iterable of batches, such as a `DataLoader`. A batch is a mapping of
            keyword arguments, a tensor, or a tuple or list of positional arguments; its tensors are
            moved to the model's device. Also a text or a list of texts, if there is a tokenizer.
        tokenizer: names the tokens in findings and pages, and sorts them into the default classes
            `special`, `whitespace`, `punctuation` and `words`.
        token_classes: classes of tokens whose share of the attention is reported, instead of the
            default ones: a mapping of class names to token ids, or a function from a token's text
            to its class.
        statistics: names out of `attending.diagnosis.record.STATISTICS`; all but `max_probability`
            by default.
        max_batches: take only the first ones.
        thresholds: what makes a statistic a finding.
        forward: `forward(model, batch)` runs one batch, where calling the model is not enough.
        map_size: buckets per side of the pooled maps.
        name: what to call the model; by default where it was loaded from, or its class.
        progress: show a progress bar; by default in a terminal only.

    Returns:
        The diagnosis: print it, or see `to_frame`, `to_html` and `to_json`.

    Raises:
        ValueError: for inputs that are none, unknown statistics, or a model that is compiled or set
            to attention that bypasses `scaled_dot_product_attention`; says what to set.
        TapError: if the model ran but never called that function; says why.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}. Of a pipeline, take "
            "the model inside (pipe.unet, pipe.transformer)."
        )
    if map_size < 1:
        raise ValueError(f"map_size: expected at least 1, got {map_size}.")
    thresholds = Thresholds() if thresholds is None else thresholds
    reader = TokenReader(tokenizer, token_classes)
    batches, count = as_batches(inputs, tokenizer, max_batches)
    wanted, device = _wanted(statistics), device_of(model)
    ran = False
    with _progress_bar(count, progress) as bar, evaluating(model), torch.no_grad():
        collector = Collector(model, reader, wanted, map_size, bar.set_postfix_str)
        with collector.watching():
            for batch in batches:
                ran = True
                batch = to_device(batch, device)
                with collector.batch(batch):
                    run_model(model, batch) if forward is None else forward(model, batch)
                bar.update()
            if not ran:
                raise ValueError("inputs: expected at least one batch, got none.")
    layers, hidden = collector.layers(), collector.hidden()
    return Diagnosis(
        model=name or name_of(model),
        model_class=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        attention_implementation=_implementation(model),
        sequences=collector.sequences,
        tokens=collector.tokens,
        preview=collector.preview,
        layers=layers,
        hidden=hidden,
        findings=find(layers, hidden, thresholds),
        thresholds=dataclasses.asdict(thresholds),
        version=__version__,
    )


def _wanted(statistics: Iterable[str] | None) -> frozenset[str]:
    if statistics is None:
        return frozenset(DEFAULT_STATISTICS)
    wanted = frozenset([statistics] if isinstance(statistics, str) else statistics)
    unknown = sorted(wanted - set(STATISTICS))
    if unknown or not wanted:
        raise ValueError(
            f"statistics: expected some of {', '.join(STATISTICS)}; got "
            f"{', '.join(map(repr, unknown)) or 'none'}."
        )
    return wanted


def _progress_bar(count: int | None, progress: bool | None) -> Any:
    from tqdm.auto import tqdm

    # None leaves it to tqdm, which shows a bar in terminals and notebooks only.
    return tqdm(
        total=count,
        desc="diagnose",
        unit="batch",
        disable=None if progress is None else not progress,
        leave=False,
    )


def name_of(model: nn.Module) -> str:
    """Where a model was loaded from, or its class."""
    where = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if where and Path(where).exists():
        where = Path(where).resolve().name
    return where or type(model).__name__


def _implementation(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", None) or "scaled_dot_product_attention")
