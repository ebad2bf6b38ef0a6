"""The record of OptiPrune: a better first noise, and fewer tokens to pay for it."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="optiprune",
    title=(
        "OptiPrune: Boosting Prompt-Image Consistency with Attention-Guided Noise and Dynamic "
        "Token Selection"
    ),
    arxiv="2507.00789",
    date="2025-07",
    venue=None,
    purpose=(
        "For text-to-image sampling on small GPUs when objects of the prompt go missing. The first "
        "noise is optimised until every object has a region of its own in the cross-attention, "
        "while it stays Gaussian. Then similar tokens are pruned in self-attention, which pays for "
        "it. Nothing is trained."
    ),
    claim=(
        "Optimised noise and pruned tokens together give images closer to the prompt at a lower "
        "cost than optimising the noise alone."
    ),
    figures=(
        Figure(
            "consistency with the prompt, and cost, against noise optimisation",
            "better, and lower; no table at hand",
            "3rd",
        ),
        Figure(
            "SiTo, its pruning half: speed-up and FID, SD v1.5, COCO-30k",
            "1.90x, FID -1.33",
            "paper",
        ),
        Figure("SiTo, ImageNet", "1.75x, FID -1.15", "paper"),
    ),
    extension_points=(
        "diffusers attention processors and latents=",
        "a hook on self-attention of BasicTransformerBlock",
    ),
    planned_symbols=(
        "attending.diffusion.noise_optimization.optimise_noise",
        "attending.sparse.similarity_prune.similarity_prune",
    ),
    status="planned",
)
