"""The record of Efficient-DLM: from an autoregressive model to one that decodes blocks."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="efficient-dlm",
    title=("Efficient-DLM: From Autoregressive to Diffusion Language Models, and Beyond in Speed"),
    arxiv="2512.14067",
    date="2025-12-16",
    venue="ICML 2026",
    purpose=(
        "Converts a pretrained causal language model into one that fills in several tokens of a "
        "block at once, by continued training with a block-wise mask. Earlier blocks stay clean "
        "and are never looked at anew, so an ordinary KV cache works. Masking that favours later "
        "positions makes training resemble decoding."
    ),
    claim=(
        "Block-wise attention with clean context keeps most of the autoregressive model's accuracy "
        "where fully bidirectional training loses it, and decoding is several times faster."
    ),
    figures=(
        Figure("Efficient-DLM 8B against Dream 7B", "+5.4 % accuracy, 4.5x throughput", "paper"),
        Figure("against Qwen3 4B", "+2.7 % accuracy, 2.7x throughput", "paper"),
        Figure(
            (
                "mean accuracy, Qwen2.5-1.5B: bidirectional / block, noisy context / block, clean "
                "context"
            ),
            "19.29 / 28.23 / 38.41",
            "3rd",
        ),
        Figure("same, original autoregressive model", "41.79", "3rd"),
        Figure(
            "gain by masking that depends on position, 5.6 tokens per pass", "up to 4.38 %", "3rd"
        ),
    ),
    extension_points=(
        "transformers AttentionMaskInterface",
        "transformers generate, with custom_generate",
        "a data collator for the masks",
    ),
    planned_symbols=(
        "attending.conversion.block_diffusion.block_diffusion_mask",
        "attending.decoding.block_diffusion.BlockDecoder",
    ),
    status="planned",
)
