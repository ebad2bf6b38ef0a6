"""The record of HeadHunter and SoftPAG: which heads to perturb for guidance, and how much."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="headhunter-softpag",
    title=(
        "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow "
        "Models"
    ),
    arxiv="2506.10978",
    date="2025-06-12",
    venue="NeurIPS 2025",
    purpose=(
        "For users of attention-perturbation guidance on transformers such as SD3 and FLUX, where "
        "nobody knows which layer to perturb. Single heads are perturbed instead, chosen one after "
        "another by any score of the resulting images. A mixture of the map and its perturbed form "
        "sets the strength."
    ),
    claim=(
        "A few chosen heads guide as well as a whole layer, and can be chosen for a style or a "
        "quality; a strength below the full identity is often best."
    ),
    figures=(
        Figure("heads that match the FID of the best layer of 24 heads", "6", "paper"),
        Figure(
            "PickScore, style prompts, no guidance / CFG 3 / HeadHunter 3",
            "19.66 / 20.87 / 20.70",
            "paper",
        ),
        Figure("aesthetic score, same", "5.37 / 5.71 / 5.92", "paper"),
        Figure(
            "FID of the best layers, uniform / query mean / identity",
            "53.37 / 53.33 / 56.15",
            "paper",
        ),
        Figure(
            "PickScore of the best layers, uniform / query mean / identity",
            "21.90 / 21.89 / 22.19",
            "paper",
        ),
    ),
    extension_points=(
        "diffusers attention processors, or attending.tap with a handler",
        "a function from prompt, seed and heads to an image, for the search",
    ),
    planned_symbols=(
        "attending.diffusion.attention_perturbation.AttentionPerturbation",
        "attending.diffusion.headhunter.headhunter",
    ),
    status="planned",
)
