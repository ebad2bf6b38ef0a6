"""The record of ACT: damping attention sinks that are not the first token's."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="attention-calibration-act",
    title=(
        "Unveiling and Harnessing Hidden Attention Sinks (Attention Calibration Technique, ACT)"
    ),
    arxiv="2406.15765",
    date="2024-06",
    venue="ICML 2024",
    purpose=(
        "For a frozen language model that should do better on classification and multiple choice "
        "without training. In a set of heads chosen beforehand, keys that draw too much attention, "
        "except the first sink, keep a part of it, and the rest goes to the other keys of the row. "
        "The same edit moves mass off any columns."
    ),
    claim=(
        "Calibrating sinks beyond the first token, in the right heads and at inference only, "
        "raises accuracy."
    ),
    figures=(
        Figure("Llama-30B, mean accuracy over data sets", "up to +7.30 %", "paper"),
        Figure("Hellaswag, one model", "up to +13.26 %", "3rd"),
        Figure("MMLU", "up to +7.3 %", "3rd"),
    ),
    extension_points=(
        "attending.tap with a handler, around scaled_dot_product_attention",
        "transformers.AttentionInterface",
    ),
    planned_symbols=(
        "attending.interventions.attention_calibration.AttentionCalibration",
        "attending.interventions.attention_calibration.select_heads",
    ),
    status="planned",
)
