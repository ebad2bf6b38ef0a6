"""The record of ProfilingDiT: cache the blocks that look at the background."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="profiling-dit",
    title=("Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models"),
    arxiv="2504.03140",
    date="2025-04-04",
    venue=None,
    purpose=(
        "Makes video diffusion transformers about twice as fast without training. Some blocks "
        "attend to the foreground and some to the background, and which is which hardly changes "
        "over steps and prompts. Blocks of the background reuse their last change for several "
        "steps; the others are computed anew."
    ),
    claim=(
        "Caching background blocks, and computing them more often towards the end, is about as "
        "fast as TeaCache and much closer to the video without a cache."
    ),
    figures=(
        Figure(
            "LPIPS, HunyuanVideo, TeaCache slow / fast / ProfilingDiT",
            "0.1720 / 0.1830 / 0.1203",
            "paper",
        ),
        Figure("PSNR, same", "21.91 / 21.60 / 26.44", "paper"),
        Figure("speed-up, same", "1.66x / 2.31x / 1.87x", "paper"),
        Figure(
            "LPIPS and speed-up, Wan2.1, TeaCache / ProfilingDiT",
            "0.2913, 2.00x / 0.1256, 2.01x",
            "paper",
        ),
        Figure("LPIPS when caching foreground / background blocks", "0.1449 / 0.1203", "paper"),
    ),
    extension_points=("diffusers ModelHook on transformer blocks, as cache configurations do",),
    planned_symbols=(
        "attending.diffusion.block_cache.BlockDeltaCacheConfig",
        "attending.probes.block_profile.profile_blocks",
    ),
    status="planned",
)
