"""The record of DARE: one embedding table for attention, another for what is attended to."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="dare",
    title="Long-Sequence Recommendation Models Need Decoupled Embeddings (DARE)",
    arxiv="2410.02604",
    date="2024-10-03",
    venue="ICLR 2025",
    purpose=(
        "For click-through models over very long histories, where attention first finds the "
        "relevant events and then pools them. One embedding table in both roles gets gradients "
        "that pull against each other. Here queries and keys have a table of their own, and values "
        "another; the first may be smaller, which makes the search faster."
    ),
    claim=(
        "Separate embeddings for attention and representation remove the conflict of gradients, "
        "raise AUC, and find the relevant events better."
    ),
    figures=(
        Figure("AUC, Taobao, dimension 16, TWIN -> DARE", "0.91688 -> 0.92568", "paper"),
        Figure("AUC, Tmall, dimension 16, TWIN -> DARE", "0.95812 -> 0.96800", "paper"),
        Figure("retrieval NDCG, Taobao, TWIN -> DARE", "0.5545 -> 0.8124", "paper"),
        Figure(
            "steps to 90 % validation accuracy, Tmall, TWIN -> DARE", "1300 -> about 450", "paper"
        ),
        Figure("gross merchandise value, online test", "+1.47 %", "paper"),
    ),
    extension_points=("torch.nn.Module for recommendation models, two groups of nn.Embedding",),
    planned_symbols=(
        "attending.nn.decoupled_target_attention.DecoupledTargetAttention",
        "attending.probes.gradient_conflict.GradientConflictProbe",
    ),
    status="planned",
)
