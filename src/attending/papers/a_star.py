"""The record of A-STAR: keeping the objects of a prompt apart while an image is sampled."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="a-star",
    title="A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis",
    arxiv="2306.14544",
    date="2023-06-26",
    venue="ICCV 2023",
    purpose=(
        "For text-to-image prompts with several objects, of which a frozen diffusion model forgets "
        "some or merges them. At every denoising step the latent moves along the gradient of two "
        "losses on the cross-attention maps: those of two objects should not overlap, and each "
        "should stay where it was one step before. Nothing is trained, and the user may supply the "
        "regions instead."
    ),
    claim=(
        "Both losses together keep all objects of the prompt more often than either alone, than "
        "Attend-and-Excite and than plain sampling."
    ),
    figures=(
        Figure(
            ("BLIP text similarity, animal-animal prompts, SD / Attend-and-Excite / A-STAR"),
            "0.76 / 0.80 / 0.82",
            "paper",
        ),
        Figure("same, animal-object prompts", "0.78 / 0.82 / 0.84", "paper"),
        Figure("same, object-object prompts", "0.77 / 0.81 / 0.82", "paper"),
        Figure(
            "ablation on the three sets: retention / segregation / both",
            ".78 .83 .79 / .79 .82 .80 / .82 .84 .82",
            "paper",
        ),
        Figure(
            "preferred by 26 people, animal-animal, SD / Attend-and-Excite / A-STAR, %",
            "2.2 / 3.0 / 94.8",
            "paper",
        ),
    ),
    extension_points=(
        "attending.tap on the cross-attention of a diffusers UNet, to read its maps",
        "a denoising loop that takes a gradient step on the latent before each step",
    ),
    planned_symbols=(
        "attending.diffusion.latent_guidance.LatentGuidance",
        "attending.losses.attention_segregation.attention_segregation",
        "attending.losses.attention_segregation.attention_retention",
    ),
    status="planned",
)
