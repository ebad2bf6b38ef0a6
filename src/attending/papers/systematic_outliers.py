"""The record of systematic outliers: where they come from, and attention that needs none."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="systematic-outliers",
    title="Systematic Outliers in Large Language Models",
    arxiv="2502.06415",
    date="2025-02",
    venue="ICLR 2025",
    purpose=(
        "For anyone who quantises, prunes or debugs a language model and meets a few weights, "
        "activations or attention columns that are orders of magnitude too large. Detectors find "
        "the three kinds and show where they coincide. For training a model without them, "
        "attention gets an explicit scale that depends on the input, one gate for each head and "
        "token."
    ),
    claim=(
        "Outliers in weights, activations and attention share their positions and act as an "
        "implicit, context-aware scale of attention's output; give attention such a scale "
        "explicitly and they do not form, while a fixed or additive bias does not help."
    ),
    figures=(
        Figure(
            "GPT-2 perplexity after AbsMax W8 quantisation, default -> with context-aware scale",
            "93.44 -> 29.22",
            "3rd",
        ),
        Figure(
            "GPT-2 perplexity at 50 % sparsity, default -> with context-aware scale",
            "7235 -> 39",
            "3rd",
        ),
        Figure("feature dimensions shared by weight and activation outliers", "100 %", "3rd"),
        Figure("positions shared by activation and attention outliers", "95 %", "3rd"),
        Figure(
            "largest activations of LLaMA2-7B, channels 1415 and 2533, first delimiter",
            "about 2500 and -1500",
            "code",
        ),
    ),
    extension_points=(
        "forward hooks on the layers of any transformers model, for the detectors",
        "a module around attention's output before its projection, for the scale",
        "transformers.AttentionInterface, for the variants with a bias",
    ),
    planned_symbols=(
        "attending.probes.outliers.find_outliers",
        "attending.nn.context_scale.ContextScale",
    ),
    status="planned",
)
