"""The record of momentum decoding: text as a walk that may not go round in circles."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="momentum-decoding",
    title="Momentum Decoding: Open-ended Text Generation As Graph Exploration",
    arxiv="2212.02175",
    date="2022-12-05",
    venue=None,
    purpose=(
        "Deterministic decoding for any causal language model that must not repeat itself. It "
        "takes the greedy token unless that would walk an earlier path again; then a resistance "
        "that grows with the length of the loop lets another of the top candidates pass. One "
        "forward pass for each token, as with greedy search."
    ),
    claim=(
        "Text is as good and as diverse as that of contrastive search, at about the cost of greedy "
        "search."
    ),
    figures=(
        Figure(
            "preferred by people to contrastive decoding / equal / not, Wikinews, %",
            "57.0 / 3.0 / 40.0",
            "ran",
        ),
        Figure(
            "preferred by people to contrastive search / equal / not, Wikinews, %",
            "40.7 / 8.0 / 51.3",
            "ran",
        ),
        Figure(
            "diversity x100, GPT2-XL, momentum / contrastive search / nucleus",
            "97.2 / 92.4 / 95.3",
            "ran",
        ),
        Figure("seconds for a continuation, momentum / contrastive search", "8.18 / 12.13", "ran"),
    ),
    extension_points=("transformers generate, through a LogitsProcessor",),
    planned_symbols=(
        "attending.decoding.momentum.MomentumLogitsProcessor",
        "attending.decoding.momentum.circular_depth",
    ),
    status="planned",
)
