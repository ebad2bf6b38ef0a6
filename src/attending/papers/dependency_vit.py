"""The record of DependencyViT: tokens send instead of gather, and a tree comes of it."""

from attending.papers._record import Figure, Paper

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
        Figure("ImageNet top-1, DeiT-T -> DependencyViT-T, %", "72.2 -> 75.4", "recall"),
        Figure("ImageNet top-1, DeiT-S -> DependencyViT-S, %", "79.8 -> 82.1", "recall"),
        Figure("FLOPs and top-1 of the pruned tiny model", "0.8G, 73.7 %", "recall"),
        Figure("tiny model in a third-party port, top-1, %", "about 73", "3rd"),
    ),
    extension_points=("replacement of attention modules in vision transformers",),
    planned_symbols=(
        "attending.nn.reversed_attention.ReversedAttention",
        "attending.probes.dependency_tree.dependency_tree",
    ),
    status="planned",
)
