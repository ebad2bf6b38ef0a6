"""The record of DHA: fewer key and value heads, fused from those of a checkpoint."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="dha",
    title=(
        "DHA: Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads "
        "Fusion"
    ),
    arxiv="2406.06567",
    date="2024-06-03",
    venue="NeurIPS 2024",
    purpose=(
        "Turns a trained model with multi-head attention into one with fewer key heads and fewer "
        "value heads, counted separately and layer by layer, so that the KV cache shrinks. Similar "
        "heads are fused by learned weights in a short training. It starts from a better point "
        "than averaging heads into groups."
    ),
    claim=(
        "Learned fusion of similar heads keeps more of the model than grouped-query attention does "
        "at the same cache and the same small training budget."
    ),
    figures=(
        Figure(
            "performance kept with 75 % of the cache saved, 0.25 % of pre-training",
            "97.6 %",
            "paper",
        ),
        Figure("training against grouped-query attention", "5x faster", "paper"),
        Figure(
            "gain over grouped-query attention at 0.01 % of pre-training", "up to 13.93 %", "paper"
        ),
    ),
    extension_points=(
        "torch.nn.utils.parametrize on k_proj and v_proj of transformers models",
        "transformers.TrainerCallback, for the schedule",
    ),
    planned_symbols=("attending.conversion.dha.convert_to_dha",),
    status="planned",
)
