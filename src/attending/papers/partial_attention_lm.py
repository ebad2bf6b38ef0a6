"""The record of PALM: a path of attention that sees the source only."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="partial-attention-lm",
    title=(
        "Decoder-Only or Encoder-Decoder? Interpreting Language Model as a Regularized "
        "Encoder-Decoder"
    ),
    arxiv="2304.04052",
    date="2023-04-08",
    venue=None,
    purpose=(
        "For translation, summaries or answers over documents with decoder-only models, where "
        "attention to the source fades as the answer grows. A second attention has only the source "
        "as keys, so its mass cannot be diluted. A curve of the mass on the source shows the "
        "fading in any model."
    ),
    claim=(
        "Attention to the source falls with each generated token in a decoder-only model and stays "
        "level in an encoder-decoder; the added path keeps it level and improves the output."
    ),
    figures=(
        Figure(
            "against a decoder-only model, translation, summaries, data to text",
            "better throughout; no table at hand",
            "paper",
        ),
        Figure("against an encoder-decoder with more parameters", "close or better", "paper"),
        Figure(
            ("attention to the source over generated tokens, decoder-only / with the path"),
            "falls / stays level",
            "paper",
        ),
    ),
    extension_points=(
        "replacement of decoder layers in transformers",
        "attending.tap, for the curve in any model",
    ),
    planned_symbols=(
        "attending.nn.partial_attention.PartialAttention",
        "attending.probes.source_attention.source_attention_curve",
    ),
    status="planned",
)
