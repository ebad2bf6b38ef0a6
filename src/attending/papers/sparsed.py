"""The record of SparseD: one sparse pattern for each head, reused over denoising steps."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="sparsed",
    title="SparseD: Sparse Attention for Diffusion Language Models",
    arxiv="2509.24014",
    date="2025-09-28",
    venue="ICLR 2026",
    purpose=(
        "For long contexts in diffusion language models, where every denoising step attends over "
        "prompt and answer. Patterns differ between heads but hardly between steps, so each head's "
        "blocks are chosen once and reused. The first steps use full attention, because they "
        "matter most, and prompt and answer are chosen from separately."
    ),
    claim=(
        "With full attention in the first fifth of the steps and one pattern afterwards, quality "
        "is that of full attention, and long contexts run faster."
    ),
    figures=(
        Figure("speed-up end to end, 64k tokens, 1024 steps", "1.50x", "code"),
        Figure("speed-up end to end, 64k tokens, 128 steps", "1.23x to 1.25x", "3rd"),
        Figure(
            "MMLU, GSM8K, HumanEval and RULER against full attention",
            "within about 0.3 points",
            "3rd",
        ),
        Figure("RULER-4k, full / sliding window", "above 90 / about 40", "3rd"),
    ),
    extension_points=(
        "transformers.AttentionInterface, with a state for each layer",
        "the loop over denoising steps, which gives the step",
    ),
    planned_symbols=(
        "attending.sparse.sparsed.sparsed_mask",
        "attending.sparse.sparsed.SparseDState",
    ),
    status="planned",
)
