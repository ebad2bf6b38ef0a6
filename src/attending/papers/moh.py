"""The record of MoH: each token chooses its attention heads."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="moh",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    arxiv="2410.11842",
    date="2024-10-15",
    venue="ICML 2025",
    purpose=(
        "Each token uses a few shared heads that are always on and the best of the others, with a "
        "learned weight for each. For training image and language models with fewer active heads, "
        "or for converting a trained one by continued training. A balance loss keeps all heads in "
        "use."
    ),
    claim=("With 50 to 90 % of the heads active, models match or beat full multi-head attention."),
    figures=(
        Figure(
            "ImageNet-1K top-1, TransNeXt-S, all heads -> 80 % / 75 %",
            "84.7 -> 84.7 / 84.6",
            "code",
        ),
        Figure("FID, DiT-XL/2 with guidance, all heads -> 90 %", "3.22 -> 2.94", "code"),
        Figure("mean of 6 tasks, LLM-S, all heads -> 75 % / 50 %", "43.9 -> 44.6 / 45.4", "code"),
        Figure(
            "mean of 14 benchmarks, LLaMA3-8B, with 400B more tokens, -> 75 %",
            "61.6 -> 64.0",
            "code",
        ),
    ),
    extension_points=(
        "a forward pre-hook on the output projection of attention",
        "the training loss, for the balance term",
    ),
    planned_symbols=(
        "attending.nn.mixture_of_heads.MoHGate",
        "attending.nn.mixture_of_heads.apply_moh",
    ),
    status="planned",
)
