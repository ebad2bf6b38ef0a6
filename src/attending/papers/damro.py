"""The record of DAMRO: decoding against the image tokens that everything looks at."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="damro",
    title="DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
    arxiv="2410.04514",
    date="2024-10-06",
    venue="EMNLP 2024",
    purpose=(
        "For vision-language models that name objects which are not in the image. The image "
        "encoder's class token attends to a handful of background patches, and the language model "
        "inherits that. A second branch sees only these patches, and its logits are subtracted "
        "from those of the first. No training, one more forward pass."
    ),
    claim=(
        "Contrasting with the outlier tokens reduces object hallucination on LLaVA-1.5, LLaVA-NeXT "
        "and InstructBLIP."
    ),
    figures=(
        Figure("POPE accuracy, LLaVA-1.5-7B, base / VCD / DAMRO", "82.08 / 84.98 / 85.31", "paper"),
        Figure(
            "POPE accuracy, LLaVA-NeXT-7B, base / VCD / DAMRO", "84.57 / 87.50 / 87.87", "paper"
        ),
        Figure(
            "POPE accuracy, InstructBLIP-7B, base / VCD / DAMRO", "78.85 / 82.56 / 81.77", "paper"
        ),
        Figure("CHAIR C_S, LLaVA-1.5-7B, base / VCD / DAMRO", "12.4 / 7.6 / 6.0", "paper"),
    ),
    extension_points=(
        "transformers generate, through a LogitsProcessor with a second forward pass",
    ),
    planned_symbols=(
        "attending.decoding.damro.damro_generate",
        "attending.decoding.contrastive.contrastive_logits",
    ),
    status="planned",
)
