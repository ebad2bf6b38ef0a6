"""The record of AgilePruner: choosing visual tokens by attention and by diversity."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="agile-pruner",
    title=(
        "AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual Token "
        "Pruning in LVLMs"
    ),
    arxiv="2603.01236",
    date="2026-03-01",
    venue="ICLR 2026",
    purpose=(
        "For vision-language models that spend most of their time on image tokens. It keeps T of N "
        "tokens between the projector and the language model, without training: tokens are taken "
        "in the order of their attention, and each removes those too like it. How alike is too "
        "alike follows from the effective rank of the image, so simple images are pruned by "
        "attention and complex ones by diversity."
    ),
    claim=(
        "A threshold that adapts to each image's effective rank keeps more of the model's accuracy "
        "at the same number of tokens than pruning by attention alone or by diversity alone."
    ),
    figures=(
        Figure(
            "mean over 9 tasks at 64 of 576 tokens, LLaVA-1.5-7B, % of the full model",
            "96.76",
            "paper",
        ),
        Figure("same, DivPrune / VisPruner / FastV", "95.02 / 95.07 / 76.86", "paper"),
        Figure("same at 32 tokens, AgilePruner / DivPrune", "94.02 / 92.16", "paper"),
        Figure(
            "hallucination CHAIR C_S at 64 tokens, FasterVLM / DivPrune / AgilePruner",
            "45.4 / 57.4 / 52.2",
            "paper",
        ),
        Figure(
            "latency per sample at 64 tokens, full -> pruned, ms on an RTX 4090",
            "172 -> 115",
            "3rd",
        ),
    ),
    extension_points=("between get_image_features and the language model of a transformers LLaVA",),
    planned_symbols=("attending.interventions.token_pruning.select_tokens",),
    status="planned",
)
