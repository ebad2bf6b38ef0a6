"""The record of DeBERTa: content and relative position in separate terms of the score."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="deberta",
    title="DeBERTa: Decoding-enhanced BERT with Disentangled Attention",
    arxiv="2006.03654",
    date="2020-06",
    venue="ICLR 2021",
    purpose=(
        "A bidirectional encoder whose attention scores are a sum of content-to-content, "
        "content-to-position and position-to-content terms, with absolute positions only just "
        "before the masked-word head. A regulariser for fine-tuning, SiFT, adds an adversarial "
        "perturbation to normalised embeddings and works with any model."
    ),
    claim=(
        "Disentangled positions and the enhanced mask decoder each improve on RoBERTa with half of "
        "its data, and SiFT improves fine-tuning further."
    ),
    figures=(
        Figure("MNLI, large, RoBERTa -> DeBERTa with half the data", "90.2 -> 91.1", "3rd"),
        Figure("SQuAD 2.0 F1, large, RoBERTa -> DeBERTa", "88.4 -> 90.7", "3rd"),
        Figure("CoLA with V2-XXLarge, without -> with SiFT", "72.0 -> 73.5", "code"),
        Figure(
            ("ablation, base, MNLI-m: full / without mask decoder / without C2P / without P2C"),
            "86.3 / 86.1 / 85.9 / 86.0",
            "recall",
        ),
    ),
    extension_points=(
        "the attn_mask of scaled_dot_product_attention, as an added bias",
        "compute_loss of transformers.Trainer, for SiFT",
    ),
    planned_symbols=(
        "attending.nn.disentangled_attention.disentangled_bias",
        "attending.losses.sift.SiFT",
    ),
    status="planned",
)
