"""The record of PAROAttention: order the tokens so that attention becomes blocks."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="paro-attention",
    title=(
        "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in "
        "Visual Generation Models"
    ),
    arxiv="2506.16054",
    date="2025-06-19",
    venue="NeurIPS 2025",
    purpose=(
        "For serving image and video transformers with sparse or quantised attention and next to "
        "no prediction at run time. Each head gets one of six orders of frames, rows and columns, "
        "the one that makes its map blockiest. Then fixed block masks and integers for each block "
        "work well."
    ),
    claim=(
        "With the right order for each head, fixed block masks at 20 to 50 % density and INT8 or "
        "INT4 stay far closer to full attention than other sparse methods do."
    ),
    figures=(
        Figure(
            (
                "PSNR to full attention, CogVideoX-5B, density 0.5: SparseVideoGen / SpargeAttn / "
                "PARO"
            ),
            "18.50 / 16.80 / 29.14",
            "3rd",
        ),
        Figure("same, density 0.3: SpargeAttn / PARO", "15.22 / 22.89", "3rd"),
        Figure("same, density 0.5 without reordering", "26.25", "3rd"),
        Figure("speed-up of attention, A100, density 0.5 / 0.3", "1.73x / 2.71x", "3rd"),
        Figure("end to end", "1.9x to 2.7x", "paper"),
    ),
    extension_points=("diffusers attention processors, or attending.tap with a handler",),
    planned_symbols=(
        "attending.sparse.paro.PAROPlan",
        "attending.sparse.paro.paro_attention",
    ),
    status="planned",
)
