"""The record of amortised sliced Wasserstein: attention proposes the directions to slice along."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="amortized-sliced-wasserstein",
    title=(
        "Self-Attention Amortized Distributional Projection Optimization for Sliced Wasserstein "
        "Point-Cloud Reconstruction"
    ),
    arxiv="2301.04791",
    date="2023-01-12",
    venue="ICML 2023",
    purpose=(
        "A loss between two point clouds. Sliced Wasserstein averages over random directions, most "
        "of which tell little; finding the best direction needs an inner optimisation for each "
        "pair. Here a small attention network over the points predicts the centre of a "
        "distribution of directions, so informative slices come at the price of one forward pass."
    ),
    claim=(
        "Amortising the distribution of directions reconstructs point clouds as well as optimising "
        "it, at a fraction of the time, while amortising a single direction does not constrain the "
        "cloud."
    ),
    figures=(
        Figure(
            "reconstruction of ModelNet40 after training on ShapeNet55",
            "A-v-DSW best; SW and Max-SW worst",
            "recall",
        ),
        Figure(
            "time per epoch, amortised against optimised directions (T >= 10)",
            "several times faster",
            "recall",
        ),
        Figure(
            ("amortised single direction on synthetic clouds, W2 x100 (distribution: 15.9)"),
            "45.1, the autoencoder collapses",
            "ran",
        ),
        Figure(
            "permutation invariance of the attention amortiser / of its Linformer form",
            "exact / broken",
            "ran",
        ),
    ),
    extension_points=(
        "any training loop over point clouds [batch, points, dim]",
        "torch.distributions, for the von Mises-Fisher distribution",
    ),
    planned_symbols=(
        "attending.losses.sliced_wasserstein.SlicedWasserstein",
        "attending.losses.sliced_wasserstein.DirectionAmortizer",
    ),
    status="planned",
)
