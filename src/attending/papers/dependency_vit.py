"""The record of DependencyViT: tokens send instead of gather, and a tree comes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def above(first: str, second: str, margin: float = 0.0) -> bool:
        return all(a > b + margin for a, b in zip(ours[first], ours[second], strict=True))

    tree = above("ari_tree_reversed", "ari_tree_forward")
    accurate = above("accuracy_reversed", "accuracy_forward")
    better_than_means = above("ari_tree_reversed", "ari_kmeans")
    prunable = above("accuracy_pruned_message", "accuracy_pruned_random")
    if tree and accurate and better_than_means and prunable:
        return "held"
    close = sum(ours["accuracy_reversed"]) > sum(ours["accuracy_forward"]) - len(
        ours["accuracy_forward"]
    )
    return "held in direction" if tree and close else "did not hold"


RULE = Rule(
    words=(
        "Held if in every seed the model with reversed attention classifies more held-out digits "
        "correctly than the plain vision transformer of its size; its trees on the images of "
        "shapes have a higher adjusted Rand index than those from the rollout of forward "
        "attention, and than k-means on its own hidden states; and it loses less accuracy if "
        "tokens are pruned by their message than at random. Held in direction if the trees are "
        "better than rollout's in every seed and the mean accuracy is no more than one point below "
        "the plain one's. Did not hold otherwise."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="dependency-vit",
    title="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    arxiv="2304.03282",
    date="2023-04-06",
    venue="CVPR 2023",
    purpose=(
        "A vision transformer in which each token sends its information to the tokens it attends "
        "to. The maps, summed over the heads, are a soft graph of which part depends on which, and "
        "a tree of image parts is read from it without labels. Tokens that send hardly anything "
        "can be pruned."
    ),
    claim=(
        "Reversed attention lets a part-whole tree emerge without supervision, at an accuracy "
        "above that of a plain vision transformer of the same size."
    ),
    figures=(
        Figure(
            "ImageNet top-1, DependencyViT-T, % (ours, here and below: scikit-learn's digits)",
            "75.4",
            "recall",
            measurement="accuracy_reversed",
        ),
        Figure("ImageNet top-1, DeiT-T, %", "72.2", "recall", measurement="accuracy_forward"),
        Figure(
            "ImageNet top-1, DependencyViT-Lite-T, % (ours: pruned without further training)",
            "73.7",
            "recall",
            measurement="accuracy_pruned_message",
        ),
        Figure(
            "the same, tokens pruned by the mass they receive (not in the paper)",
            "-",
            "inferred",
            measurement="accuracy_pruned_received",
        ),
        Figure(
            "the same, random tokens pruned (not in the paper)",
            "-",
            "inferred",
            measurement="accuracy_pruned_random",
        ),
        Figure(
            "unsupervised part segmentation (ours: adjusted Rand index of trees with shapes)",
            "better than ViTs of its size",
            "paper",
            measurement="ari_tree_reversed",
        ),
        Figure(
            "the same from the rollout of forward attention",
            "worse",
            "inferred",
            measurement="ari_tree_forward",
        ),
        Figure(
            "the same by k-means on hidden states (not in the paper)",
            "-",
            "inferred",
            measurement="ari_kmeans",
        ),
        Figure("ImageNet top-1, DeiT-S -> DependencyViT-S, %", "79.8 -> 82.1", "recall"),
        Figure("FLOPs of the tiny model, whole -> pruned", "1.3G -> 0.8G", "recall"),
        Figure("tiny model in a third-party port, top-1, %", "about 73", "3rd"),
    ),
    extension_points=("replacement of attention modules in vision transformers",),
    symbols=(
        "attending.nn.reversed_attention.reversed_attention",
        "attending.nn.reversed_attention.dependency_mask",
        "attending.nn.reversed_attention.ReversedAttention",
        "attending.nn.message_pruning.prune_by_message",
        "attending.models.dependency_vit.DependencyViT",
        "attending.probes.dependency_tree.dependency_tree",
        "attending.probes.dependency_tree.accumulated_dependency",
        "attending.probes.dependency_tree.pruned_tree",
        "attending.probes.dependency_tree.tree_segments",
    ),
    rule=RULE,
    status="built",
)

_SMALL: dict[str, Any] = {
    "dim": 48,
    "depth": 4,
    "heads": 4,
    "batch": 64,
    "rate": 3e-3,
    "epochs": 15,
    "shape_batch": 64,
    "shape_sets": 40,
    "shape_steps": 150,
    "parsed": 40,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    smoke = {"dim": 16, "depth": 3, "heads": 2, "batch": 256, "epochs": 1}
    smoke |= {"shape_batch": 8, "shape_sets": 2, "shape_steps": 2, "parsed": 2}
    return {
        "smoke": _SMALL | smoke,
        "small": _SMALL,
        "full": _SMALL
        | {"dim": 192, "depth": 12, "heads": 12, "epochs": 200, "rate": 1e-3}
        | {"shape_sets": 2000, "shape_steps": 20_000, "parsed": 1000},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Classify digits, prune, and parse coloured shapes.

    See `attending.papers._dependency_vit_training`. Both models have no layer scale, and the
    controllers start at c = 0.98, unlike the port's.
    """
    from attending.papers._dependency_vit_training import parse_shapes, train_digits

    settings_here = settings(scale)
    numbers: dict[str, float] = {}
    series = []
    plain = train_digits("forward", settings_here, seed)
    reverse = train_digits("reversed", settings_here, seed)
    for name, found in (("forward", plain), ("reversed", reverse)):
        numbers[f"accuracy_{name}"] = found.accuracy
        epochs, accuracies = zip(*found.curve, strict=True)
        series.append(Series(name, epochs, accuracies, "digits, held out", "epoch", "accuracy, %"))
    numbers |= {f"accuracy_pruned_{name}": one for name, one in reverse.pruned.items()}
    numbers["accuracy_forward_pruned_random"] = plain.pruned["random"]
    numbers |= parse_shapes(settings_here, seed)
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )
