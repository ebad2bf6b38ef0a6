"""The record of diffusion models in low-level vision: restoring images with a diffusion prior."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="low-level-vision-diffusion",
    title="Diffusion Models in Low-Level Vision: A Survey",
    arxiv="2406.11138",
    date="2024-06-16",
    venue="IEEE TPAMI 2025",
    purpose=(
        "A survey, of which the library takes the frameworks and the solvers that need no "
        "training. With a pretrained unconditional diffusion model and a known degradation they "
        "denoise, sharpen, fill in, colour or enlarge an image. The solvers project onto the "
        "measurement, work in its singular vectors, or follow the gradient of the misfit."
    ),
    claim=(
        "Diffusion priors restore images that look better than those of networks trained for one "
        "task, at lower fidelity in PSNR and at the cost of many evaluations."
    ),
    figures=(
        Figure(
            "LPIPS on face super-resolution against convolutional networks",
            "about 25 % lower",
            "3rd",
        ),
        Figure("PSNR and SSIM, same comparison", "lower", "3rd"),
        Figure("evaluations of the network for each image", "50 to 1000", "3rd"),
    ),
    extension_points=("diffusers schedulers, or any eps_model(x, t)",),
    planned_symbols=(
        "attending.diffusion.restoration.restore",
        "attending.diffusion.linear_operator.LinearOperator",
    ),
    status="planned",
)
