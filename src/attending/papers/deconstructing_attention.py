"""The record of Deconstructing attention: which of its properties does a language model need?"""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="deconstructing-attention",
    title=(
        "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling"
    ),
    arxiv="2510.11602",
    date="2025-10-13",
    venue=None,
    purpose=(
        "A test bench for language-model researchers. It takes attention apart into the mixing of "
        "tokens, the softmax form, the dependence on the sequence, and queries and keys from the "
        "current layer, and replaces one at a time by something cheaper. Layouts that keep softmax "
        "in some layers can be tried too."
    ),
    claim=(
        "In every layer, each relaxation costs much, and mixing of tokens cannot be missed; "
        "alternating with standard layers, most relaxations do about as well as standard "
        "attention."
    ),
    figures=(
        Figure("WikiText perplexity, 500M, standard", "38.1", "paper"),
        Figure(
            "same, all layers: MLP / approximate / random embeddings",
            "993.5 / 47.9 / 84.8",
            "paper",
        ),
        Figure(
            "same, every second layer: MLP / approximate / random embeddings",
            "45.8 / 39.4 / 39.3",
            "paper",
        ),
        Figure(
            ("mean of 7 NLU tasks, standard / best mixture (non-approximate, every second layer)"),
            "51.9 / 52.9",
            "paper",
        ),
    ),
    extension_points=(
        "transformers.AttentionInterface, for the forms of the score",
        "replacement of attention modules, for the others",
    ),
    planned_symbols=(
        "attending.conversion.mixers.convert_mixers",
        "attending.nn.taylor_attention.taylor_attention",
    ),
    status="planned",
)
