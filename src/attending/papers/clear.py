"""The record of CLEAR: attention within a radius, for pretrained diffusion transformers."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="clear",
    title="CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
    arxiv="2412.16112",
    date="2024-12-20",
    venue="NeurIPS 2025",
    purpose=(
        "For owners of a text-to-image transformer such as FLUX who want images of 2K to 8K at a "
        "cost that grows linearly with the number of pixels. Each image token attends only to "
        "tokens within a circle, and to all text tokens. A short distillation of the attention "
        "weights makes up for the loss; the radius trades quality for speed."
    ),
    claim=(
        "A pretrained diffusion transformer keeps its quality with attention limited to a small "
        "circle, after a short distillation, and becomes several times faster at high resolution."
    ),
    figures=(
        Figure("attention FLOPs saved at 8192 x 8192, radius 8", "99.5 %", "paper"),
        Figure("speed-up of 8K generation", "6.3x", "paper"),
        Figure(
            "GFLOPs of an attention layer at 1024 x 1024, full -> radius 8 / 16 / 32",
            "260.9 -> 63.5 / 86.6 / 154.1",
            "ran",
        ),
        Figure("fine-tuning", "10K self-generated samples, 10K iterations", "paper"),
    ),
    extension_points=(
        "diffusers set_attn_processor, or attending.tap with a handler",
        "a training loop for the distillation",
    ),
    planned_symbols=(
        "attending.sparse.circle_window.clear_attention",
        "attending.conversion.clear.apply_clear",
    ),
    status="planned",
)
