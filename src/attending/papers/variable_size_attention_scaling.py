"""The record of entropy-aware scaling: attention for images of another size than in training."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="variable-size-attention-scaling",
    title=("Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis"),
    arxiv="2306.08645",
    date="2023-06-14",
    venue="NeurIPS 2023",
    purpose=(
        "For sampling a text-to-image model at another size or shape than it was trained for. With "
        "fewer tokens attention's entropy falls and objects are cut off, with more it rises and "
        "they repeat. One number, the scale of the scores, is changed so that entropy stays as in "
        "training. It fits wherever the number of keys has changed."
    ),
    claim=(
        "Scaling the scores by the root of the ratio of log token numbers, now to training, keeps "
        "normalised entropy as in training and improves images at sizes above and below it."
    ),
    figures=(
        Figure(
            "FID and CLIP at sizes below and above training",
            "better at nearly all sizes; no table at hand",
            "recall",
        ),
        Figure(
            "FID at 4 times the pixels, without -> with, measured by others",
            "29.89 -> 29.95",
            "3rd",
        ),
        Figure("time", "1x", "3rd"),
    ),
    extension_points=(
        "diffusers attention processors, or attending.tap with a handler",
        "the scaling argument of transformers.AttentionInterface functions",
    ),
    planned_symbols=(
        "attending.interventions.entropy_scaling.entropy_scale",
        "attending.interventions.entropy_scaling.EntropyScaling",
    ),
    status="planned",
)
