"""Diagnoses of models that do not exist, with numbers from real (small) attention maps."""

import math
from typing import Literal

import numpy as np

from attending.diagnosis.record import (
    Diagnosis,
    Evidence,
    Finding,
    HiddenRecord,
    LayerRecord,
    TopKey,
)

SCRIPT = "</script><script>window.__pwned=1</script>"
IMAGE = "<img src=x onerror=window.__pwned=2>"
MARKUP = "[red]"
TOKENS = [
    "[CLS]", SCRIPT, MARKUP, "[/]", "The", " cat", " sat", "\n", " on", " the", " mat", ".", "\n\n",
    IMAGE, "&amp;", " <b>", "\t", " Schrödinger", "’s", " 猫", " was", "\u202eevil", " asleep",
    "]]>", " again", ",", " and", " no", " one", " looked", "\x1b[31m", "[SEP]",
]  # fmt: skip
Kind = Literal["self", "cross"]
Array = np.ndarray


def attention_map(rng: np.random.Generator, style: str, tokens: int, causal: bool) -> Array:
    """A map of a familiar kind: sink, local, previous, uniform, blocks or content."""
    at = np.arange(tokens)
    distance = np.abs(at[:, None] - at[None, :])
    logits = rng.normal(0, 0.6, (tokens, tokens))
    if style == "sink":
        logits[:, 0] += 6
    elif style == "local":
        logits -= distance / 2.5
    elif style == "previous":
        logits += np.where(at[:, None] - at[None, :] == 1, 7, 0)
    elif style == "uniform":
        logits *= 0.05
    elif style == "blocks":
        logits += np.where(at[:, None] // 8 == at[None, :] // 8, 3, 0)
    else:
        logits += rng.normal(0, 2.2, (1, tokens))
    if causal:
        logits = np.where(at[:, None] >= at[None, :], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def measured(probabilities: Array, causal: bool) -> dict[str, float]:
    """The statistics of a record, from the dense map."""
    tokens = len(probabilities)
    at = np.arange(tokens)
    seen = at + 1 if causal else np.full(tokens, tokens)
    entropy = -np.where(probabilities > 0, probabilities * np.log(probabilities + 1e-300), 0).sum(1)
    distance = np.abs(at[:, None] - at[None, :])
    received = probabilities.sum(0) / (tokens - at if causal else tokens)
    order = np.sort(probabilities.ravel())[::-1]
    normalized = entropy[seen > 1] / np.log(seen[seen > 1])
    return {
        "entropy": float(entropy.mean()),
        "normalized_entropy": float(normalized.mean()),
        "effective_keys": float((1 / (probabilities**2).sum(1)).mean()),
        "sink": float(received[: tokens * 3 // 4].max()),
        "first_token": float(probabilities[:, 0].mean()),
        "mean_distance": float((probabilities * distance).sum(1).mean()),
        "local_mass": float(np.where(distance <= 3, probabilities, 0).sum(1).mean()),
        "block_density": float((np.cumsum(order) < 0.95 * tokens).sum() / seen.sum()),
        "similarity": 0.0,  # set by `layer`
        "max_probability": float(probabilities.max(1).mean()),
    }


def layer(
    rng: np.random.Generator,
    name: str,
    number: int | None,
    heads: int,
    depth: float,
    *,
    kind: Kind = "self",
    causal: bool = False,
    size: int = 32,
    tokens: int = 64,
) -> LayerRecord:
    """A layer whose heads are local near the input and sinks further up."""
    styles = ["local", "previous", "blocks", "content", "uniform", "sink"]
    tilt = np.array([2 * (1 - depth), 1 - depth, 0.7, 1.0, 0.25, 2.5 * depth])
    chosen = [str(rng.choice(styles, p=tilt / tilt.sum())) for _ in range(heads)]
    maps = [attention_map(rng, style, tokens, causal) for style in chosen]
    statistics: dict[str, list[float]] = {}
    for one in maps:
        for key, value in measured(one, causal).items():
            statistics.setdefault(key, []).append(value)
    outputs = np.stack([m.ravel() for m in maps]) + rng.normal(0, 0.02, (heads, tokens**2))
    outputs = outputs - outputs.mean(1, keepdims=True)
    outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
    similarity = np.clip(outputs @ outputs.T, 0, 1)
    statistics["similarity"] = [
        float(max(np.delete(row, i), default=0.0)) for i, row in enumerate(similarity)
    ]
    step = tokens // size
    pooled = [m.reshape(size, step, size, step).sum(3).mean(1) for m in maps]
    keys = []
    for one in maps:
        received = one.sum(0) / ((tokens - np.arange(tokens)) if causal else tokens)
        received[tokens * 3 // 4 :] *= 0.5
        best = np.argsort(-received)[:8]
        keys.append(
            [TopKey(TOKENS[p % len(TOKENS)], int(p), int(p) % 3, float(received[p])) for p in best]
        )
    special = [float(m[:, [0, tokens - 1]].sum(1).mean()) for m in maps]
    stops = [float(m[:, 11::12].sum(1).mean()) for m in maps]
    return LayerRecord(
        name=name,
        layer=number,
        kind=kind,
        is_causal=causal,
        head_dim=64,
        statistics=statistics,
        class_mass={"special": special, "punctuation": stops},
        top_keys=keys,
        pooled=[p.tolist() for p in pooled],
        similarity=similarity.tolist(),
    )


def hidden(name: str, number: int, depth: float) -> HiddenRecord:
    """A block's output: tokens grow alike, one activation explodes in the middle."""
    massive = 40 + 2400 * math.exp(-(((depth - 0.5) / 0.25) ** 2))
    return HiddenRecord(
        name=name,
        layer=number,
        token_similarity=0.12 + 0.7 * depth**1.5,
        effective_rank=180 * (1 - 0.75 * depth),
        max_abs=massive,
        median_abs=0.3 + 0.5 * depth,
        mean_abs=0.4 + 0.6 * depth,
        max_token=SCRIPT if number == 3 else "[CLS]",
        max_position=0,
        max_channel=421,
    )


def diagnosis_of(layers: list[LayerRecord], blocks: list[HiddenRecord], name: str) -> Diagnosis:
    return Diagnosis(
        model=name,
        model_class="SyntheticModel",
        parameters=22_713_216,
        attention_implementation="sdpa",
        sequences=3,
        tokens=482,
        preview=TOKENS,
        layers=layers,
        hidden=blocks,
        findings=findings(layers),
        thresholds={"collapsed_entropy": 0.5, "sink_importance": 0.3, "duplicate_cka": 0.95},
        version="0.1.0",
    )


def findings(layers: list[LayerRecord]) -> list[Finding]:
    """Findings as `diagnose` words them, from the statistics."""

    def above(statistic: str, least: float, text: str, below: bool = False) -> tuple[Evidence, ...]:
        found = []
        for one in layers:
            for head, value in enumerate(one.statistics[statistic]):
                if (value < least) if below else (value > least):
                    found.append(Evidence(one.name, head, value, text.format(value=value)))
        return tuple(sorted(found, key=lambda e: e.value if below else -e.value))

    sinks = above("sink", 0.3, "{value:.0%} of the attention on [CLS]")
    collapsed = above("normalized_entropy", 0.45, "entropy is {value:.2f} of the largest", True)
    alike = above("similarity", 0.97, f"CKA {{value:.3f}}; strongest key {MARKUP}")
    return [
        Finding(
            "duplicates",
            "Duplicate heads",
            "info",
            f"{len(alike)} heads compute nearly what a neighbour computes; merging them costs "
            "little.",
            "linear CKA of head outputs > 0.97",
            "DHA (Chen et al. 2024), section 3",
            alike,
            ("dha",),
        ),
        Finding(
            "sinks",
            "Attention sink on the first token",
            "critical",
            f"{len(sinks)} heads give more than 30 % of their attention to [CLS], whatever the "
            "query asks. Such heads do little work, and cutting the token from a cache breaks "
            "them.",
            "mean attention to one key > 0.3",
            "Gu et al., ICLR 2025 (arXiv 2410.10781)",
            sinks,
            ("attention-calibration-act", "systematic-outliers"),
        ),
        Finding(
            "collapsed",
            "Collapsed heads",
            "warning",
            f"{len(collapsed)} heads look at very few keys. In training this goes along with "
            "instability.",
            "normalized entropy < 0.45",
            "Zhai et al., ICML 2023 (sigma-reparam)",
            collapsed,
            ("sigma-reparam", "entropy-guided-attention"),
        ),
        Finding(
            "massive",
            "Massive activations in the middle blocks",
            "warning",
            f"Channel 421 of the token {SCRIPT} is 4,000 times the median.",
            "|x| > 100 and > 1000 × the median of the block",
            "Sun et al. 2024 (arXiv 2402.17762)",
            (
                Evidence("model.layers.3", None, 2440.0, f"2,440 at {SCRIPT}, channel 421"),
                Evidence("model", None, 0.0, "3 blocks, always the same channel"),
            ),
            ("systematic-outliers",),
        ),
    ]


def encoder_decoder(size: int = 32) -> Diagnosis:
    """Encoder, decoder and cross attention, one layer pruned to 5 heads, tokens that bite."""
    rng = np.random.default_rng(0)
    layers = [
        layer(rng, f"model.encoder.layers.{i}.self_attn", i, 8, i / 5, size=size) for i in range(6)
    ]
    for i in range(6):
        heads = 5 if i == 2 else 8
        stem = f"model.decoder.layers.{i}"
        layers.append(layer(rng, f"{stem}.self_attn", i, heads, i / 5, causal=True, size=size))
        layers.append(layer(rng, f"{stem}.encoder_attn", i, 8, i / 5, kind="cross", size=size))
    blocks = [hidden(f"model.encoder.layers.{i}", i, i / 5) for i in range(6)]
    blocks += [hidden(f"model.decoder.layers.{i}", i, i / 6) for i in range(6)]
    return diagnosis_of(layers, blocks, "synthetic/speech-<tiny>")


def encoder(layers: int = 12, heads: int = 12, size: int = 32) -> Diagnosis:
    """One stack, like BERT."""
    rng = np.random.default_rng(1)
    made = [
        layer(rng, f"encoder.layer.{i}.attention.self", i, heads, i / layers, size=size)
        for i in range(layers)
    ]
    blocks = [hidden(f"encoder.layer.{i}", i, i / layers) for i in range(layers)]
    return diagnosis_of(made, blocks, "synthetic-encoder")


def large() -> Diagnosis:
    """80 layers of 64 heads, causal, with smaller maps."""
    rng = np.random.default_rng(2)
    made = [
        layer(rng, f"model.layers.{i}.self_attn", i, 64, i / 80, causal=True, size=16, tokens=32)
        for i in range(80)
    ]
    blocks = [hidden(f"model.layers.{i}", i, i / 80) for i in range(80)]
    return diagnosis_of(made, blocks, "synthetic-70b")


def healthy() -> Diagnosis:
    """Nothing to find."""
    diagnosis = encoder(layers=4, heads=4, size=16)
    diagnosis.findings = []
    diagnosis.model = "synthetic-healthy"
    return diagnosis
