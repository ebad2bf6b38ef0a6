"""The record of Efficient-vDiT: video attention that looks at a few reference frames."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="efficient-vdit",
    title="Efficient-vDiT: Efficient Video Diffusion Transformers with Attention Tile",
    arxiv="2502.06155",
    date="2025-02-10",
    venue=None,
    purpose=(
        "Makes a pretrained video diffusion transformer fast. Its attention maps repeat frame by "
        "frame, so each layer gets a fixed mask: every frame attends to itself and to a few "
        "reference frames. A search picks the sparsest mask of each layer within an error budget, "
        "and distillation reduces the number of steps."
    ),
    claim=(
        "Masks that are linear in the number of frames, found layer by layer, keep the quality of "
        "the video while attention and sampling become several times faster."
    ),
    figures=(
        Figure("VBench, base -> threshold 0.1", "76.12 -> 76.00", "3rd"),
        Figure("speed-up of the kernel / in total, threshold 0.1", "1.85x / 7.05x", "3rd"),
        Figure("sparsity at threshold 0.1", "45.08 %", "3rd"),
        Figure("CD-FVD, base -> threshold 0.1", "172.64 -> 204.13", "3rd"),
    ),
    extension_points=("diffusers attention processors, a mask for each layer",),
    planned_symbols=(
        "attending.sparse.frame_masks.frame_reference_mask",
        "attending.sparse.frame_masks.search_layer_masks",
    ),
    status="planned",
)
