"""The record of Combiner: every position at sparse cost, through summaries of regions."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="combiner",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    arxiv="2107.05768",
    date="2021-07",
    venue="NeurIPS 2021",
    purpose=(
        "For training a transformer on long sequences at less than quadratic cost while every head "
        "can still reach every position. A query attends directly to some keys, and to the others "
        "through one summary for each region, as a conditional expectation. Several layouts of "
        "regions exist: fixed, logarithmic, axial. It is made for training from scratch."
    ),
    claim=(
        "With the same sparse layout, adding the regions through their summaries improves on plain "
        "sparse attention, at the same order of cost."
    ),
    figures=(
        Figure(
            "CIFAR-10 bits per dimension, 6 layers, Axial -> Combiner-Axial",
            "3.666 -> 3.050",
            "paper",
        ),
        Figure("same, Logsparse -> Combiner-Logsparse", "4.253 -> 3.366", "paper"),
        Figure("same, Fixed -> Combiner-Fixed", "3.408 -> 3.321", "paper"),
        Figure(
            "Wiki-40B perplexity at 2k tokens, Transformer / Combiner-Axial",
            "17.26 / 17.56",
            "paper",
        ),
        Figure("Long Range Arena mean, Transformer / Combiner-Fixed", "57.87 / 58.34", "paper"),
    ),
    extension_points=(
        "transformers.AttentionInterface, for models with a fixed length",
        "an attention module to train with",
    ),
    planned_symbols=("attending.nn.combiner.combiner_attention",),
    status="planned",
)
