"""MAUVE: how far a model's texts are, as a distribution, from those of people.

Two ways for a model to fail: it writes what people would not, or it does not write what they would.
MAUVE (Pillutla et al. 2102.01454) weighs both: texts become features, features become histograms P
and Q over clusters, and the area under the curve of

    (exp(-c KL(Q || R)), exp(-c KL(P || R)))        R = w P + (1 - w) Q,   0 < w < 1

is the score: 1 for equal histograms, near 0 for disjoint ones.

No feature extractor is here, as nothing is downloaded: pass hidden states of a model of yours. The
usual choice is the last layer of gpt2-large at the last token of each text. Values compare only at
the same number of texts (1000 or more), length of texts, model, number of clusters, scaling and
seed. The package mauve-text has the same histogram part, to which this one agrees to 1e-12; its
k-means is that of faiss, so scores from features are not the same to the digit. Written from the
definition; mauve-text is GPL.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor

_EDGE = 1e-6  # how near the weights come to 0 and 1


class MauveScore(NamedTuple):
    """What `mauve_from_features` gives.

    Attributes:
        mauve: the area under the divergence curve, 0 to 1, higher is nearer.
        frontier_integral: see there; 0 to 1, lower is nearer.
        p: the histogram of the first features.
        q: the histogram of the second.
    """

    mauve: float
    frontier_integral: float
    p: Float[Tensor, " clusters"]
    q: Float[Tensor, " clusters"]


def divergence_curve(
    p: Num[Tensor, " clusters"],
    q: Num[Tensor, " clusters"],
    *,
    scaling: float = 5.0,
    points: int = 25,
) -> Float[Tensor, "points_and_ends 2"]:
    """The points `(exp(-c KL(q || r)), exp(-c KL(p || r)))` for mixtures `r = w p + (1 - w) q`.

    Args:
        p: a histogram; it is normalised, so counts are welcome.
        q: another, over the same clusters.
        scaling: c.
        points: how many weights w, equally spaced from 1e-6 to 1 - 1e-6.

    Returns:
        The end point (1, 0), the points by growing w, the end point (0, 1); float64.

    Raises:
        ValueError: for histograms of different or no size, negative or all zero, a scaling that is
            not positive, or no points.
    """
    p, q = _normalized("p", p), _normalized("q", q)
    if p.shape != q.shape:
        raise ValueError(
            f"q: expected the clusters of p, {p.shape[0]}, got {q.shape[0]}. Cluster both together."
        )
    if not scaling > 0 or points < 1:
        raise ValueError(
            f"scaling, points: expected a positive number and at least 1, got {scaling}, {points}."
        )
    weight = torch.linspace(_EDGE, 1 - _EDGE, points, dtype=torch.float64, device=p.device)[:, None]
    mixture = weight * p + (1 - weight) * q
    curve = torch.stack([_kl(q, mixture), _kl(p, mixture)], -1).mul(-scaling).exp()
    ends = curve.new_tensor([[1.0, 0.0], [0.0, 1.0]])
    return torch.cat([ends[:1], curve, ends[1:]])


def mauve_from_histograms(
    p: Num[Tensor, " clusters"],
    q: Num[Tensor, " clusters"],
    *,
    scaling: float = 5.0,
    points: int = 25,
) -> float:
    """The area under the divergence curve: 1 for equal histograms, about 0.004 for disjoint ones.

    By trapezoids, the mean of the area seen along either axis, so that it is symmetric in p and q.
    It does not reach 0, as the curve is drawn through few points.

    Args:
        p: a histogram; it is normalised, so counts are welcome.
        q: another, over the same clusters.
        scaling: c of the curve.
        points: of the curve.

    Raises:
        ValueError: as `divergence_curve`.
    """
    curve = divergence_curve(p, q, scaling=scaling, points=points)
    return 0.5 * (_area(curve) + _area(curve.flip(-1)))


def frontier_integral(p: Num[Tensor, " clusters"], q: Num[Tensor, " clusters"]) -> float:
    """The mean divergence along the frontier, without a scaling: 0 if equal, 1 if disjoint.

        2 * sum over clusters of  (p + q) / 4 - p q (ln p - ln q) / (2 (p - q))

    The integral over w in (0, 1) of `2 (w KL(p || r) + (1 - w) KL(q || r))`, in closed form.
    (Liu et al. 2106.07898.)

    Args:
        p: a histogram; it is normalised, so counts are welcome.
        q: another, over the same clusters.

    Raises:
        ValueError: for histograms of different or no size, negative or all zero.
    """
    p, q = _normalized("p", p), _normalized("q", q)
    if p.shape != q.shape:
        raise ValueError(f"q: expected the clusters of p, {p.shape[0]}, got {q.shape[0]}.")
    total = 0.0
    for one, other in zip(p.tolist(), q.tolist(), strict=True):
        total += (one + other) / 4 - one * other / (2 * _logarithmic_mean(one, other))
    return max(0.0, 2 * total)


def mauve_from_features(
    p_features: Float[Tensor, "p_texts features"],
    q_features: Float[Tensor, "q_texts features"],
    *,
    num_clusters: int | None = None,
    scaling: float = 5.0,
    points: int = 25,
    explained_variance: float = 0.9,
    smoothing: float = 0.0,
    seed: int = 25,
    restarts: int = 5,
    iterations: int = 500,
) -> MauveScore:
    """MAUVE of two sets of texts, given one feature vector for each text.

    Rows are scaled to length 1; PCA of both sets together keeps the first components that explain
    the given share of the variance; k-means makes clusters; their histograms are compared.

    Args:
        p_features: of the texts of people.
        q_features: of the texts of the model, by the same extractor.
        num_clusters: a tenth of the smaller set, at least 2, if None.
        scaling: c of the curve.
        points: of the curve.
        explained_variance: 0 to 1.
        smoothing: added to each count; 0.5 gives the variant MAUVE*, for few texts.
        seed: of k-means.
        restarts: of k-means; the best is kept.
        iterations: of k-means, at most.

    Raises:
        ValueError: for features that are not two tables of equal width, or are not finite; or more
            clusters than texts.
        ImportError: without scikit-learn; it comes with the extra `attending[mauve]`.
    """
    kmeans = _kmeans()
    features = _checked_features(p_features, q_features)
    p_texts, q_texts = len(p_features), len(q_features)
    if num_clusters is None:
        num_clusters = max(2, round(min(p_texts, q_texts) / 10))
    if not 1 <= num_clusters <= p_texts + q_texts:
        raise ValueError(
            f"num_clusters: expected from 1 to the number of texts, {p_texts + q_texts}, got "
            f"{num_clusters}."
        )
    if not 0 < explained_variance <= 1 or not 0 <= smoothing < math.inf:
        raise ValueError(
            "explained_variance, smoothing: expected above 0 up to 1, and from 0, got "
            f"{explained_variance}, {smoothing}."
        )
    clusters = kmeans(
        n_clusters=num_clusters, n_init=restarts, max_iter=iterations, random_state=seed
    )
    reduced = _principal(features, explained_variance)
    labels = torch.from_numpy(clusters.fit_predict(reduced.numpy())).long()
    counts = [
        torch.bincount(some, minlength=num_clusters).double() + smoothing
        for some in (labels[:p_texts], labels[p_texts:])
    ]
    p, q = (count / count.sum() for count in counts)
    score = mauve_from_histograms(p, q, scaling=scaling, points=points)
    return MauveScore(score, frontier_integral(p, q), p, q)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def _area(curve: Tensor) -> float:
    """Under the points, from left to right; of points above each other the highest comes first."""
    by_height = curve[curve[:, 1].argsort(descending=True, stable=True)]
    ordered = by_height[by_height[:, 0].argsort(stable=True)]
    return float(torch.trapezoid(ordered[:, 1], ordered[:, 0]))


def _logarithmic_mean(one: float, other: float) -> float:
    """`(p - q) / (ln p - ln q)`, and its limits: p if they are equal, anything if one is 0."""
    if not one or not other:
        return 1.0  # the product that is divided by it is 0
    ratio = (one - other) / other
    # log1p keeps the digits that ln p - ln q loses when the two are close.
    return one if abs(ratio) < 1e-12 else (one - other) / math.log1p(ratio)


def _normalized(name: str, histogram: Tensor) -> Tensor:
    histogram = histogram.double()
    if histogram.dim() != 1 or not bool((histogram >= 0).all()) or not float(histogram.sum()) > 0:
        raise ValueError(
            f"{name}: expected a histogram [clusters] of numbers from 0, some above, got "
            f"{list(histogram.shape)}: {histogram.flatten()[:8].tolist()}."
        )
    return histogram / histogram.sum()


def _checked_features(p_features: Tensor, q_features: Tensor) -> Tensor:
    for name, some in (("p_features", p_features), ("q_features", q_features)):
        if some.dim() != 2 or not some.numel() or some.shape[1] != p_features.shape[-1]:
            raise ValueError(
                f"{name}: expected [texts, features], the same features for both, got "
                f"{list(p_features.shape)} and {list(q_features.shape)}."
            )
        if not bool(some.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got some that are not.")
    return torch.cat([p_features.detach().double().cpu(), q_features.detach().double().cpu()])


def _principal(features: Tensor, explained_variance: float) -> Tensor:
    """Rows of length 1, in the fewest principal components that explain so much."""
    features = torch.nn.functional.normalize(features, dim=-1)
    left, singular, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    variance = singular.square().cumsum(0)
    if float(variance[-1]) < 1e-24 * len(features):  # all rows are the same: nothing but rounding
        return torch.zeros_like(features[:, :1])
    enough = variance >= explained_variance * variance[-1] * (1 - 1e-12)
    keep = int(enough.to(torch.uint8).argmax()) + 1
    reduced: Tensor = left[:, :keep] * singular[:keep]
    return reduced


def _kmeans() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "mauve_from_features clusters with scikit-learn, which is not installed: "
            'pip install "attending[mauve]". mauve_from_histograms needs nothing.'
        ) from error
    return KMeans
