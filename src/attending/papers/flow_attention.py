"""The record of Flow-Attention: linear attention with conserved flow and competing keys."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def below(other: str) -> bool:
        pairs = zip(ours["loss_flow"], ours[f"loss_{other}"], strict=True)
        return all(flow < theirs for flow, theirs in pairs)

    if not below("linear"):
        return "did not hold"
    others = ("no_competition", "no_allocation", "softmax")
    return "held" if all(below(other) for other in others) else "held in direction"


RULE = Rule(
    words=(
        "Held-out loss of small language models over bytes. Held if in every seed that with "
        "Flow-Attention is below that with plain linear attention (the same kernel), below those "
        "with competition or allocation left out, and below that with softmax. Held in direction "
        "if it is below plain linear attention's in every seed. Did not hold otherwise."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="flow-attention",
    title="Flowformer: Linearizing Transformers with Conservation Flows",
    arxiv="2202.06258",
    date="2022-02",
    venue="ICML 2022",
    purpose=(
        "Replaces softmax attention by one that is linear in the length, without a bias towards "
        "neighbours. Attention is seen as a flow from values to results whose in- and outflow are "
        "conserved, so that keys compete and the maps do not become flat. It serves encoders, "
        "cross-attention and causal models, trained from scratch."
    ),
    claim=(
        "Conserving flow gives linear attention the selectivity it lacks: it beats other linear "
        "attentions and reaches or passes softmax on text, images, time series and control."
    ),
    figures=(
        Figure(
            "Long Range Arena mean, softmax / linear / Flowformer", "54.39 / 50.55 / 56.48", "code"
        ),
        Figure("LRA mean, without competition / without allocation", "55.25 / 55.58", "code"),
        Figure(
            "WikiText-103 perplexity, softmax / linear / Flowformer", "33.0 / 38.4 / 30.8", "code"
        ),
        Figure("ImageNet-1K top-1 in DeiT-S, softmax / Flowformer, %", "79.8 / 80.0", "code"),
        Figure("same, without competition / without allocation", "31.2 / 32.2", "code"),
        Figure(
            "gain over linear attention in the loss, nats per token (ours: per byte, of our text)",
            "0.22",
            "inferred",
            measurement="gain_over_linear",
        ),
        Figure("D4RL mean reward, Decision Transformer / Flowformer", "72.2 / 73.5", "code"),
    ),
    extension_points=(
        "transformers.AttentionInterface",
        "an attention module to train with",
    ),
    symbols=(
        "attending.nn.flow_attention.flow_attention",
        "attending.nn.flow_attention.flow_attention_with_state",
        "attending.nn.flow_attention.unclamped_flow_attention",
        "attending.nn.linear_attention.linear_attention",
        "attending.nn.operator_attention.OperatorAttention",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "files": 60,
    "context": 64,
    "dim": 48,
    "heads": 2,
    "layers": 2,
    "rows": 16,
    "steps": 500,
    "rate": 3e-3,
    "held_out_rows": 256,
    "measure_every": 125,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {**_SMALL, "files": 4, "steps": 6, "held_out_rows": 8, "measure_every": 3},
        "small": _SMALL,
        "full": {
            **_SMALL,
            "files": 2000,
            "context": 512,
            "dim": 512,
            "heads": 8,
            "layers": 6,
            "rows": 64,
            "steps": 50_000,
            "rate": 1e-3,
            "measure_every": 1000,
        },
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Train a language model over bytes for each kind of attention.

    See `attending.papers._flow_attention_training`.
    """
    from attending.papers._flow_attention_training import run

    settings_here = settings(scale)
    found = run(seed, settings_here)
    numbers: dict[str, float] = {}
    series = []
    for name, one in found.items():
        numbers |= {f"loss_{name}": one.loss, f"flatness_{name}": one.flatness}
        steps, losses = zip(*one.curve, strict=True)
        series.append(
            Series(name.replace("_", " "), steps, losses, "held-out loss", "step", "nats per byte")
        )
    numbers["gain_over_linear"] = numbers["loss_linear"] - numbers["loss_flow"]
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )
