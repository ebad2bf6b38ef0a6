"""The record of L2R-GNN: training graphs weighted until features are independent."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="reweight-gnn",
    title="Learning to Reweight for Generalizable Graph Neural Network",
    arxiv="2312.12475",
    date="2023-12-19",
    venue="AAAI 2024",
    purpose=(
        "For graph classification when test graphs differ from training graphs in size, scaffold "
        "or accidental motifs. Every training graph gets a weight such that groups of features of "
        "the embedding become independent, and the network is trained with the weighted loss. "
        "Prediction is that of the plain network."
    ),
    claim=(
        "Learned weights that remove dependence between clusters of features generalise to shifted "
        "graphs better than plain networks and earlier reweighting methods."
    ),
    figures=(
        Figure(
            "accuracy under shifts of motif, size and scaffold, against 10 baselines",
            "best everywhere; tables not at hand",
            "paper",
        ),
        Figure("without the bilevel step, or without the grouping", "worse", "paper"),
    ),
    extension_points=(
        "any PyG network or pooled embedding [batch, dim]",
        "a weighted training loss",
    ),
    planned_symbols=("attending.losses.graph_reweighting.GraphReweighter",),
    status="planned",
)
