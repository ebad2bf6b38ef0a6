"""The record of VAR: attention moved from sinks to the image."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="visual-attention-redistribution",
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    arxiv="2503.03321",
    date="2025-03-05",
    venue="ICLR 2025",
    purpose=(
        "For vision-language models that should look closer, without training and without more "
        "passes. Some image tokens draw attention whatever the text says; they are known by huge "
        "activations in a few channels of the language model. In heads that look at the image, a "
        "part of the attention on such sinks goes to the other image tokens."
    ),
    claim=(
        "Redistributing attention from sinks to image tokens, in heads that look at the image, "
        "improves answers and reduces hallucination; doing it in all heads destroys the model."
    ),
    figures=(
        Figure("VizWiz, LLaVA-1.5-7B, base -> redistributed", "50.0 -> 53.7", "3rd"),
        Figure("GQA, same", "62.0 -> 63.5", "3rd"),
        Figure("MM-Vet, same", "31.1 -> 33.7", "3rd"),
        Figure("VQAv2, same", "78.5 -> 78.6", "3rd"),
        Figure("redistribution in all heads", "collapses to 0", "3rd"),
    ),
    extension_points=(
        "attending.tap with a handler, around scaled_dot_product_attention",
        "a forward pre-hook on decoder layers, to find the sinks",
    ),
    planned_symbols=(
        "attending.interventions.visual_attention_redistribution.VisualAttentionRedistribution",
        "attending.interventions.visual_attention_redistribution.find_sink_dims",
    ),
    status="planned",
)
