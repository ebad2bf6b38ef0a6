"""The record of entropy-guided attention: keeping each head's entropy in a learned band."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="entropy-guided-attention",
    title="Entropy-Guided Attention for Private LLMs",
    arxiv="2501.03489",
    date="2025-01",
    venue="AAAI-25 workshop PPAI",
    purpose=(
        "For holding the attention entropy of every head near a learned target while a model "
        "trains, with no penalty inside a band. It was made for language models without layer norm "
        "and without activations in the feed-forward part, which are cheap under encryption but "
        "whose heads otherwise spread over all keys or collapse on one. Learned temperatures and "
        "learned scales of the feed-forward part complete it."
    ),
    claim=(
        "In a language model whose only nonlinearity is softmax, scaling the feed-forward part "
        "keeps training stable, and the entropy regulariser lowers perplexity further and leaves "
        "few heads in the top quarter of entropies."
    ),
    figures=(
        Figure(
            "evaluation perplexity, 12-layer GPT-2, CodeParrot, 128 tokens, without -> with "
            "regulariser and temperatures",
            "3.48 -> 3.21",
            "paper",
        ),
        Figure("evaluation perplexity of the baseline with LN and GELU, same", "2.69", "paper"),
        Figure("communication of the baseline -> regularised model, GB", "25.32 -> 6.43", "paper"),
        Figure("latency of the baseline -> regularised model, minutes", "8.21 -> 4.76", "paper"),
        Figure("heads in the top entropy quartile, band 0.20 of the maximum", "2.08 %", "paper"),
    ),
    extension_points=(
        "the training loss: a term added to it, from row entropies of attending.tap",
        "transformers.AttentionInterface, for temperatures per head and position",
        "torch.nn.utils.parametrizations, for the static norms of the feed-forward part",
    ),
    planned_symbols=("attending.losses.entropy_regularizer.EntropyRegularizer",),
    status="planned",
)
