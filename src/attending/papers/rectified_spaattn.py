"""The record of Rectified SpaAttn: sparse attention that accounts for what it drops."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="rectified-spaattn",
    title="Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
    arxiv="2511.19835",
    date="2025-11-25",
    venue=None,
    purpose=(
        "For image and video transformers that already use block-sparse attention and should come "
        "closer to full attention at the same density. Two errors are corrected: kept keys get too "
        "much weight, because softmax is normalised over them alone, and dropped keys get none. "
        "Pooled blocks estimate what is missing."
    ),
    claim=(
        "Correcting both errors keeps the quality of full attention at sparsity where plain "
        "block-sparse attention loses it, at several times the speed."
    ),
    figures=(
        Figure("seconds end to end, HunyuanVideo 720p, full -> rectified", "2430 -> 729", "code"),
        Figure(
            "seconds end to end, Wan2.1 text to video, full -> rectified", "2731 -> 1515", "code"
        ),
        Figure("seconds end to end, FLUX at 4096 x 4096, full -> rectified", "912 -> 570", "code"),
        Figure("quality at these speeds", "kept; tables not at hand", "paper"),
    ),
    extension_points=("diffusers set_attn_processor, or attending.tap with a handler",),
    planned_symbols=("attending.sparse.rectified.rectified_block_sparse_attention",),
    status="planned",
)
