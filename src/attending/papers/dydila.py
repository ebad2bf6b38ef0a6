"""The record of DyDiLA: linear attention with routed projections and a subtracted second map."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="dydila",
    title="Dynamic Differential Linear Attention (DyDiLA)",
    arxiv="2601.13683",
    date="2026-01-20",
    venue=None,
    purpose=(
        "For building diffusion transformers with linear attention, whose maps come out too "
        "smooth. Tokens are routed to one of several projections and kernels, and a second set of "
        "queries and keys, weighted token by token, is subtracted from the first. It is trained "
        "from scratch."
    ),
    claim=(
        "The three parts make linear attention less smooth and the images better than those of "
        "earlier linear and softmax diffusion transformers."
    ),
    figures=(
        Figure(
            "ImageNet-1K generation against LiT and DiT",
            "better on several metrics; the tables are not at hand",
            "paper",
        ),
        Figure(
            "smoothness of the maps against plain linear attention", "less over-smoothed", "paper"
        ),
    ),
    extension_points=("replacement of attention modules in diffusers transformers",),
    planned_symbols=("attending.nn.dydila.DyDiLA",),
    status="planned",
)
