"""The record of dynamic mask attention: keys chosen by their values, learned end to end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def better(quantity: str, peer: str, at_most_behind: float = 0.0) -> bool:
        sign = -1.0 if quantity == "text_loss" else 1.0
        pairs = zip(ours[f"{quantity}_dynamic"], ours[f"{quantity}_{peer}"], strict=True)
        return all(sign * (one - other) > -at_most_behind for one, other in pairs)

    if not better("recall", "window"):
        return "did not hold"
    beats = better("text_loss", "window") and better("text_loss", "nsa_like")
    matches = better("text_loss", "full", 0.02) and better("recall", "full", 0.02)
    return "held" if beats and matches else "held in direction"


RULE = Rule(
    words=(
        "Recall of small models (share of right answers) and their loss on held-out text (nats per "
        "byte), after the same steps, with the same number of keys for a query. Held if in every "
        "seed dynamic mask attention has the lower loss of text than a sliding window and than an "
        "NSA-like attention, the higher recall than the window, and is at most 0.02 behind full "
        "attention in both loss and recall. Held in direction if in every seed its recall is above "
        "the window's. Did not hold otherwise. Speed is measured in benchmarks/operators.py and "
        "does not count."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="dynamic-mask-attention",
    title="Trainable Dynamic Mask Sparse Attention",
    arxiv="2508.02124",
    date="2025-08-04",
    venue=None,
    purpose=(
        "For training decoders with long context. Each head learns which keys to keep, from the "
        "values alone, so choosing costs little and does not depend on the query. The kept scores "
        "also bias the attention, which makes the choice trainable, and kernels may skip blocks of "
        "which nothing is kept."
    ),
    claim=(
        "Learned selection of a fixed number of keys matches or beats full attention and other "
        "sparse attentions in quality, and is many times faster at long context."
    ),
    figures=(
        Figure("zero-shot LAMBADA perplexity, full / NSA / DMA", "15.22 / 14.91 / 14.42", "paper"),
        Figure(
            "synthetic recall over 512 pairs at a window of 512: order of full, DMA, others (ours: "
            "recall of 6 pairs, window 16 of 64 tokens, dynamic less the sliding window)",
            "DMA close to full, far above the window; a figure only",
            "paper",
            measurement="recall_over_window",
        ),
        Figure(
            "loss of text, MHA less DMA (ours: full less dynamic, nats per byte)",
            "above 0 from 80M to 1.7B parameters; a figure only",
            "paper",
            measurement="text_gain_over_full",
        ),
        Figure("zero-shot mean of 9 tasks, full / NSA / DMA", "45.7 / 45.5 / 46.5", "paper"),
        Figure("mean after fine-tuning at 16K, full / NSA / DMA", "39.0 / 38.6 / 39.2", "paper"),
        Figure(
            "forward speed-up, A100, window 1024, 8K / 16K / 32K tokens",
            "26.1x / 10.2x / 21.5x",
            "paper",
        ),
    ),
    extension_points=(
        "replacement of attention modules in transformers decoders",
        "a KV cache that stores the scores of the values",
    ),
    symbols=(
        "attending.nn.dynamic_mask_attention.DynamicMaskAttention",
        "attending.nn.dynamic_mask.dynamic_mask",
        "attending.nn.dynamic_mask.dynamic_mask_attention",
        "attending.nn.dynamic_mask.value_scores",
        "attending.nn.dynamic_mask_cache.DynamicMaskCache",
        "attending.nn.key_selection.key_lifetimes",
        "attending.nn.key_selection.keep_largest",
        "attending.conversion.dynamic_mask.convert_dynamic_mask",
        "attending.conversion.dynamic_mask.convert_doge",
        "attending.conversion.dynamic_mask.dynamic_mask_cache",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "dim": 64,
    "heads": 4,
    "window": 16,
    "block": 4,
    "recall_words": 24,
    "pairs": 6,
    "recall_length": 64,
    "recall_rows": 32,
    "recall_steps": 260,
    "files": 60,
    "text_length": 128,
    "text_rows": 8,
    "text_steps": 300,
    "rate": 3e-3,
    "test_rows": 256,
    "look_every": 50,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {
            **_SMALL,
            "files": 4,
            "recall_rows": 4,
            "recall_steps": 3,
            "text_rows": 2,
            "text_steps": 3,
            "test_rows": 8,
            "look_every": 2,
        },
        "small": _SMALL,
        "full": {
            **_SMALL,
            "dim": 256,
            "window": 512,
            "block": 32,
            "recall_words": 4096,
            "pairs": 512,
            "recall_length": 4096,
            "recall_steps": 100_000,
            "files": 2000,
            "text_length": 4096,
            "text_steps": 50_000,
            "rate": 1e-3,
            "look_every": 1000,
        },
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Train four models on recall and four on text.

    See `attending.papers._dynamic_mask_attention_experiment`.
    """
    from attending.papers._dynamic_mask_attention_experiment import run

    settings_here = settings(scale)
    found = run(seed, settings_here)
    numbers: dict[str, float] = {}
    series = []
    for task, models in found.items():
        for name, one in models.items():
            if task == "recall":
                numbers[f"recall_{name}"] = one.accuracy
            numbers[f"{task}_loss_{name}"] = one.loss
            steps, losses = zip(*one.curve, strict=True)
            panel = "recall: loss of new sequences" if task == "recall" else "text: held-out loss"
            series.append(Series(name.replace("_", " "), steps, losses, panel, "step", "nats"))
    numbers["recall_over_window"] = numbers["recall_dynamic"] - numbers["recall_window"]
    numbers["text_gain_over_full"] = numbers["text_loss_full"] - numbers["text_loss_dynamic"]
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )
