"""The record of PAG: guidance away from a model whose attention sees nothing."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="perturbed-attention-guidance",
    title="Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance",
    arxiv="2403.17377",
    date="2024-03-26",
    venue="ECCV 2024",
    purpose=(
        "For sampling from a pretrained diffusion model whose images lack structure, above all "
        "where classifier-free guidance cannot help: without a condition, or when restoring "
        "images. In one more forward pass at each step, chosen self-attention maps become the "
        "identity, and the prediction moves away from that weaker one. Nothing is trained; it adds "
        "to classifier-free guidance."
    ),
    claim=(
        "Guidance by perturbed attention raises sample quality and precision, and lowers "
        "diversity, with and without a condition."
    ),
    figures=(
        Figure(
            "FID, unconditional ADM 256, baseline / SAG / PAG", "26.21 / 20.08 / 16.23", "recall"
        ),
        Figure("Inception score, same", "39.70 / 45.56 / 88.53", "recall"),
        Figure("precision, recall, same, baseline -> PAG", "0.61, 0.63 -> 0.81, 0.51", "recall"),
        Figure("FID, unconditional Stable Diffusion, baseline -> PAG", "53.13 -> 47.52", "recall"),
    ),
    extension_points=(
        "diffusers attention processors and guiders, or attending.tap with a handler",
    ),
    planned_symbols=(
        "attending.diffusion.perturbed_attention.perturb_attention",
        "attending.diffusion.guidance.guide",
    ),
    status="planned",
)
