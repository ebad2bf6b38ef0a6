"""Looking things up in a source for a long time: a causal LM, a prefix-LM, and PALM.

The source is 16 random words of 24. Each target token says which of them is asked for, a random
number from 0 to 15, and the answer is that word in another language (a fixed permutation of the
24). Answers are not fed back, so nothing in the target helps: whatever is right comes from the
source, and attention to the target is attention lost. Trained on targets of 24 tokens, the models
answer 96, since generation goes on for longer than in training where attention fades most.

Three decoders of about the same number of parameters, trained on the same batches:

- "lm": causal, positions go on from the source to the target;
- "prefix": the source sees all of itself, the target's positions start at 0 again;
- "palm": the same and partial attention; the others get its parameters in their feed-forward
  layers.

Measured on new samples: accuracy by step, the mass of self-attention on the source by step, and the
sensitivity of the final states to the source by step.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attending.models.partial_attention_lm import PartialAttentionLM
from attending.nn.source_target_layout import SourceTargetLayout, source_target_layout
from attending.probes.source_attention import source_attention_curve, source_sensitivity

WORDS = 24
KINDS = ("lm", "prefix", "palm")


class Found(NamedTuple):
    """What became of one model: curves over the steps, and the loss in training."""

    accuracy: Tensor
    mass: Tensor  # mean over the layers
    ratio: Tensor
    sensitivity: Tensor
    curve: Sequence[tuple[int, float]]
    parameters: int


def run(kind: str, seed: int, settings: Mapping[str, Any]) -> Found:
    """Train one model and measure it."""
    source, target = settings["source"], settings["target"]
    layout = layout_of(kind, settings["rows"], source, target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(kind, source, settings)
    generator = torch.Generator().manual_seed(seed)
    language = torch.randperm(WORDS, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"], weight_decay=0.0)
    steps = settings["steps"]
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1)),
    )
    curve = []
    for step in range(steps):
        tokens, answers = batch(settings["rows"], source, target, language, generator)
        loss = cross_entropy(model(tokens, layout)[:, source:].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % settings["measure_every"] == 0 or step + 1 == steps:
            curve.append((step + 1, float(loss.detach())))
    return _measure(model.eval(), kind, language, curve, settings)


def build(kind: str, source: int, settings: Mapping[str, Any]) -> PartialAttentionLM:
    """A model of about the same number of parameters for every kind."""
    dim = settings["dim"]
    partial = kind == "palm"
    return PartialAttentionLM(
        WORDS + source,
        embed_dim=dim,
        depth=settings["depth"],
        num_heads=settings["heads"],
        partial=partial,
        mlp_dim=4 * dim if partial else 7 * dim,
    )


def layout_of(kind: str, rows: int, source: int, target: int) -> SourceTargetLayout:
    """Who sees what, and where it is."""
    return source_target_layout(
        [source] * rows,
        source + target,
        bidirectional_source=kind != "lm",
        restart_positions=kind != "lm",
    )


def batch(
    rows: int, source: int, target: int, language: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens `[rows, source + target]`, and the answers `[rows, target]`."""
    words = torch.randint(WORDS, (rows, source), generator=generator)
    asked = torch.randint(source, (rows, target), generator=generator)
    return torch.cat([words, WORDS + asked], 1), language[words.gather(1, asked)]


def _measure(
    model: PartialAttentionLM,
    kind: str,
    language: Tensor,
    curve: Sequence[tuple[int, float]],
    settings: Mapping[str, Any],
) -> Found:
    source, target = settings["source"], settings["long_target"]
    generator = torch.Generator().manual_seed(0)
    tokens, answers = batch(settings["test_rows"], source, target, language, generator)
    layout = layout_of(kind, len(tokens), source, target)
    with torch.no_grad():
        right = model(tokens, layout)[:, source:].argmax(-1) == answers
    mass = source_attention_curve(model, (tokens, layout), layout.source_mask)
    few = tokens[: settings["sensitive_rows"]]
    layout = layout_of(kind, len(few), source, target)
    exact = model.double()
    sensitivity = source_sensitivity(
        lambda states: exact.run(states, layout),
        exact.embed(few, layout).detach(),
        layout.source_mask,
        generator=generator,
    )
    return Found(
        accuracy=right.float().mean(0),
        mass=mass.mass.mean(0),
        ratio=mass.ratio.mean(0),
        sensitivity=sensitivity,
        curve=curve,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
