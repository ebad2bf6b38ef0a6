"""The record of grouped differential attention: few noise heads for many signal heads."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="grouped-differential-attention",
    title="Grouped Differential Attention",
    arxiv="2510.06949",
    date="2025-10-08",
    venue=None,
    purpose=(
        "For training a decoder whose attention subtracts a noise map from each signal map. Few "
        "noise heads serve many signal heads, so most heads carry signal. A trained model grows by "
        "copying signal heads only."
    ),
    claim=(
        "Ratios of 3:1 or 4:1 of signal to noise heads do better, and train more stably, than the "
        "1:1 of the Differential Transformer at the same cost."
    ),
    figures=(
        Figure(
            "best ratios of signal to noise heads, of 1:1 to 5:1",
            "3:1 and 4:1; numbers not at hand",
            "3rd",
        ),
        Figure(
            ("tokens for training loss 3.2, grouped differential latent attention against MLA"),
            "9.2 % fewer",
            "3rd",
        ),
        Figure(
            "Differential Transformer: parameters or tokens for the same loss",
            "about 65 %",
            "recall",
        ),
    ),
    extension_points=(
        "replacement of attention modules in transformers decoders",
        "four calls of any transformers.AttentionInterface function",
    ),
    planned_symbols=(
        "attending.nn.grouped_differential_attention.GroupedDifferentialAttention",
        "attending.conversion.grow_heads.grow_signal_heads",
    ),
    status="planned",
)
