"""The record of DiffUHaul: moving an object in an image without training."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="diffuhaul",
    title="DiffUHaul: A Training-Free Method for Object Dragging in Images",
    arxiv="2406.01594",
    date="2024-06-03",
    venue="SIGGRAPH Asia 2024",
    purpose=(
        "Moves one object of a real or generated image to another place, fills the place it left "
        "and keeps everything else. It needs a diffusion model whose layout is a condition, and "
        "runs two samplings side by side: the second, with the moved layout, borrows keys and "
        "values of the first. Masks keep each object's attention in its own region."
    ),
    claim=(
        "Masked gated attention and shared self-attention move objects better than earlier "
        "dragging and inpainting methods do."
    ),
    figures=(
        Figure(
            "automatic metrics and user study against earlier methods",
            "better; the tables are not at hand",
            "paper",
        ),
    ),
    extension_points=(
        "diffusers GLIGEN pipelines: gated self-attention and self-attention processors",
    ),
    planned_symbols=("attending.diffusion.object_dragging.drag_object",),
    status="planned",
)
