"""The record of FOD: anomalies as a gap between two kinds of correlation."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="focus-the-discrepancy",
    title=(
        "Focus the Discrepancy: Intra- and Inter-Correlation Learning for Image Anomaly Detection"
    ),
    arxiv="2308.02983",
    date="2023-08-06",
    venue="ICCV 2023",
    purpose=(
        "Industrial inspection with normal images only: it gives a score for the image and a map "
        "of where the defect is. Each row of attention within an image is compared with a learned "
        "Gaussian around the patch, and attention to reference images with a learned target. "
        "Normal patches and defects differ in how far the two are apart."
    ),
    claim=(
        "Learning the discrepancy within an image and across images finds defects as well as or "
        "better than reconstruction and embedding methods."
    ),
    figures=(
        Figure("MVTec AD, mean AUROC of image / pixel, %", "99.2 / 98.3", "recall"),
        Figure(
            "BTAD and MVTec 3D-AD (RGB) against others",
            "best or on par; cells not at hand",
            "paper",
        ),
        Figure("backbone wide_resnet50 against EfficientNet-b6", "slightly better", "code"),
    ),
    extension_points=("torch.nn.Module over features of a timm backbone",),
    planned_symbols=(
        "attending.nn.gaussian_target_correlation.GaussianTargetCorrelation",
        "attending.losses.correlation_minimax.correlation_minimax",
    ),
    status="planned",
)
