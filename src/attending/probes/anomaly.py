"""Anomaly maps against the truth: AUROC of images and pixels, and AUPRO of regions.

    auroc(scores.amax((1, 2)), masks.any(2).any(1))      # images: is there anything at all?
    auroc(scores, masks)                                 # pixels of all images together
    aupro(scores, masks)                                 # regions, large and small ones alike

A high AUROC of pixels may miss every small defect, since a large one has most of the pixels. AUPRO
gives each connected region the same weight. Smooth the maps before, if you do: the order matters.

Source: Bergmann et al. 2021 (MVTec AD). Exact, where others use a grid of thresholds: each distinct
score is one.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def auroc(scores: Float[Tensor, "*places"], labels: Bool[Tensor, "*places"]) -> float:
    """The area under the ROC curve: how often a positive scores higher than a negative.

    Ties count one half.

    Args:
        scores: the higher, the more anomalous; all dimensions are pooled.
        labels: True for anomalous.

    Raises:
        ValueError: for shapes that differ, labels that are not booleans, scores that are nan, or
            if there is no positive or no negative.
    """
    _check(scores, labels)
    flat, truth = scores.flatten().double(), labels.flatten()
    positives = int(truth.sum())
    negatives = truth.numel() - positives
    if not positives or not negatives:
        raise ValueError(
            f"labels: expected some of each kind, got {positives} positive and {negatives} "
            "negative ones."
        )
    _, place, counts = flat.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    rank = (2 * last - counts + 1).double() / 2  # mean rank of what is tied
    above = float(rank[place][truth].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def aupro(
    scores: Float[Tensor, "images height width"],
    masks: Bool[Tensor, "images height width"],
    *,
    fpr_limit: float = 0.3,
) -> float:
    """The area under the per-region overlap curve, up to a false positive rate.

        PRO(threshold) = mean over regions of |region above the threshold| / |region|
        FPR(threshold) = normal pixels above the threshold / all normal pixels
        AUPRO = 1 / fpr_limit * integral of PRO over FPR from 0 to fpr_limit

    The curve starts in (0, 0), has a point for each distinct score, and is linear in between.

    Args:
        scores: the higher, the more anomalous.
        masks: True for anomalous pixels; a region is what is connected, diagonally too, in one
            image.
        fpr_limit: above 0, up to 1. MVTec AD has 0.3, its successors 0.05.

    Returns:
        0 to 1; a map that puts all anomalous pixels above all others has 1.

    Raises:
        ValueError: for shapes that differ or are not [images, height, width], masks that are not
            booleans, scores that are nan, a limit out of range, or if there is no anomalous or no
            normal pixel.
    """
    _check(scores, masks)
    if scores.dim() != 3:
        raise ValueError(f"scores: expected [images, height, width], got {list(scores.shape)}.")
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit: expected a number above 0, up to 1, got {fpr_limit!r}.")
    region = connected_regions(masks).flatten()
    anomalous = region > 0
    normal = int((~anomalous).sum())
    if not normal or not bool(anomalous.any()):
        raise ValueError(
            f"masks: expected anomalous and normal pixels, got {int(anomalous.sum())} and {normal}."
        )
    sizes = region.bincount()[1:]
    # What a pixel adds to the mean overlap, or to the false positive rate, when it is passed.
    weight = torch.zeros(region.shape, dtype=torch.float64, device=region.device)
    weight[anomalous] = 1 / (sizes[region[anomalous] - 1].double() * len(sizes))
    order = scores.flatten().argsort(descending=True)
    ordered = scores.flatten()[order]
    ends = torch.ones_like(ordered, dtype=torch.bool)
    ends[:-1] = ordered[1:] != ordered[:-1]  # pixels of one score pass a threshold together
    start = weight.new_zeros(1)
    overlap = torch.cat([start, weight[order].cumsum(0)[ends]])
    rate = torch.cat([start, (~anomalous[order]).double().cumsum(0)[ends] / normal])
    inside = int((rate <= fpr_limit).sum())
    if inside < len(rate):  # the curve leaves the range between two points
        left, right = rate[inside - 1], rate[inside]
        share = (fpr_limit - left) / (right - left)
        at_limit = overlap[inside - 1] + share * (overlap[inside] - overlap[inside - 1])
        overlap = torch.cat([overlap[:inside], at_limit[None]])
        rate = torch.cat([rate[:inside], rate.new_tensor([fpr_limit])])
    return float(torch.trapezoid(overlap, rate)) / fpr_limit


def connected_regions(
    masks: Bool[Tensor, "images height width"],
) -> Int[Tensor, "images height width"]:
    """Numbers from 1 for the regions that are connected, diagonally too; 0 for the rest.

    No number is used in two images.
    """
    # The largest index among neighbours spreads until nothing changes. Float64 holds each exactly.
    index = torch.arange(1, masks.numel() + 1, device=masks.device).reshape(masks.shape)
    label = torch.where(masks, index, 0).double()
    while True:
        pooled = torch.nn.functional.max_pool2d(label[:, None], 3, stride=1, padding=1)[:, 0]
        spread = torch.where(masks, pooled, 0.0)
        if torch.equal(spread, label):
            break
        label = spread
    numbers, place = label.unique(return_inverse=True)
    regions: Tensor = place + int(bool(numbers[0] > 0))  # no 0 among them if there is no rest
    return regions


def _check(scores: Tensor, labels: Tensor) -> None:
    if scores.shape != labels.shape or labels.dtype != torch.bool or not labels.numel():
        raise ValueError(
            "scores, labels: expected the same shape, and booleans for labels, got "
            f"{list(scores.shape)} and {labels.dtype} {list(labels.shape)}."
        )
    if bool(scores.isnan().any()):
        raise ValueError("scores: expected numbers, got nan among them.")
