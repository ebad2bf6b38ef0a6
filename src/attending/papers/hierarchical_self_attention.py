"""The record of hierarchical self-attention: softmax that respects a tree of parts."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="hierarchical-self-attention",
    title=(
        "Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale "
        "Problems"
    ),
    arxiv="2509.15448",
    date="2025-09-18",
    venue="NeurIPS 2025",
    purpose=(
        "For nested data, such as documents of paragraphs of sentences, or an image beside several "
        "texts. Attention is tied along a tree: a query treats the tokens of a distant branch as "
        "one. It has no new parameters, trains with less data, and replaces softmax in some layers "
        "of a pretrained encoder to save operations."
    ),
    claim=(
        "Trained from scratch it beats softmax attention on nested text, and without training it "
        "replaces some layers of RoBERTa at a small loss and a fraction of the attention cost."
    ),
    figures=(
        Figure(
            "IMDB accuracy, from scratch, word2vec, softmax -> hierarchical",
            ".6739 -> .7469",
            "3rd",
        ),
        Figure(
            "Elec accuracy, from scratch, word2vec, softmax -> hierarchical",
            ".7182 -> .7549",
            "3rd",
        ),
        Figure(
            "IMDB accuracy, RoBERTa without training, softmax -> hierarchical",
            ".9558 -> .9494",
            "3rd",
        ),
        Figure("MFLOPs of attention, same", "214.94 -> 4.32", "3rd"),
        Figure(
            "QNLI accuracy, RoBERTa without training, softmax -> hierarchical",
            ".9267 -> .5072",
            "3rd",
        ),
    ),
    extension_points=(
        "transformers.AttentionInterface, for encoders",
        "an attention module to train with",
    ),
    planned_symbols=(
        "attending.nn.hierarchical_self_attention.hsa_attention",
        "attending.conversion.hsa.inject_hsa",
    ),
    status="planned",
)
