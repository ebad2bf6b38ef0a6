"""The record of dynamic mask attention: keys chosen by their values, learned end to end."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="dynamic-mask-attention",
    title="Trainable Dynamic Mask Sparse Attention",
    arxiv="2508.02124",
    date="2025-08-04",
    venue=None,
    purpose=(
        "For training decoders with long context. Each head learns which keys to keep, from the "
        "values alone, so choosing costs little and does not depend on the query. The kept scores "
        "also bias the attention, which makes the choice trainable, and kernels may skip blocks of "
        "which nothing is kept."
    ),
    claim=(
        "Learned selection of a fixed number of keys matches or beats full attention and other "
        "sparse attentions in quality, and is many times faster at long context."
    ),
    figures=(
        Figure("zero-shot LAMBADA perplexity, full / NSA / DMA", "15.22 / 14.91 / 14.42", "paper"),
        Figure("zero-shot mean of 9 tasks, full / NSA / DMA", "45.7 / 45.5 / 46.5", "paper"),
        Figure("mean after fine-tuning at 16K, full / NSA / DMA", "39.0 / 38.6 / 39.2", "paper"),
        Figure(
            "forward speed-up, A100, window 1024, 8K / 16K / 32K tokens",
            "26.1x / 10.2x / 21.5x",
            "paper",
        ),
    ),
    extension_points=(
        "replacement of attention modules in transformers decoders",
        "a KV cache that stores the scores of the values",
    ),
    planned_symbols=(
        "attending.nn.dynamic_mask_attention.DynamicMaskAttention",
        "attending.nn.dynamic_mask_attention.dynamic_mask",
    ),
    status="planned",
)
