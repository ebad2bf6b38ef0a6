"""The record of AttenCraft: several new concepts from one image, with masks of attention."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="attencraft",
    title=(
        "AttenCraft: Attention-guided Disentanglement of Multiple Concepts for Text-to-Image "
        "Customization"
    ),
    arxiv="2405.17965",
    date="2024-05-28",
    venue=None,
    purpose=(
        "For fine-tuning a text-to-image model on one image that holds several new concepts, so "
        "that each gets a token of its own. The model's own self- and cross-attention yield a mask "
        "for each concept, and the masks then supervise the cross-attention during training. No "
        "masks from people or from another model are needed."
    ),
    claim=(
        "Masks from attention separate the concepts well enough that their images are more "
        "faithful than those of earlier methods, at the same faithfulness to the prompt."
    ),
    figures=(
        Figure(
            "image fidelity over 16 data sets",
            "state of the art; the table is not at hand",
            "paper",
        ),
        Figure(
            "prompt fidelity against the baselines", "comparable; the table is not at hand", "paper"
        ),
    ),
    extension_points=(
        "diffusers attention processors, during training",
        "a term of the training loss",
    ),
    planned_symbols=(
        "attending.diffusion.attention_masks.AttentionMaskBuilder",
        "attending.losses.attention_js.attention_js_loss",
    ),
    status="planned",
)
