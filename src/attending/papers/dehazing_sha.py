"""The record of SHA and density encoding: dehazing where haze is uneven."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="dehazing-sha",
    title="Perceiving and Modeling Density is All You Need for Image Dehazing",
    arxiv="2111.09733",
    date="2021-11",
    venue="ECCV 2022",
    purpose=(
        "Removes haze of uneven density from a single image. Its reusable parts are Separable "
        "Hybrid Attention, a cheap attention that pools along the two axes, and a learned "
        "one-channel gate that compares the hazy image with a first estimate of the clear one. A "
        "model of haze makes training pairs from any clear images."
    ),
    claim=(
        "The hybrid attention beats other cheap attentions in the same small network, and an "
        "encoded density guides dehazing better than an estimated transmission does."
    ),
    figures=(
        Figure("Haze4K PSNR, PMNet / DMT-Net / FFA", "33.49 / 28.53 / 26.96", "paper"),
        Figure(
            "Haze4K PSNR, small network: none / SE / CBAM / SHA",
            "24.40 / 24.71 / 25.36 / 26.39",
            "paper",
        ),
        Figure(
            "PSNR by form of density: identity / estimated transmission / encoding",
            "30.33 / 31.17 / 33.49",
            "paper",
        ),
        Figure("SOTS indoor PSNR, PMNet / AECR-Net", "38.41 / 37.17", "paper"),
    ),
    extension_points=("torch.nn.Module for convolutional networks",),
    planned_symbols=(
        "attending.nn.separable_hybrid_attention.SeparableHybridAttention",
        "attending.models.dehazing.PMNet",
    ),
    status="planned",
)
