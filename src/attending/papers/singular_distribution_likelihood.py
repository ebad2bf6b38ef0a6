"""The record of instance noise for data on a thin set: likelihood that stays finite."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="singular-distribution-likelihood",
    title=(
        "A Likelihood Approach to Nonparametric Estimation of a Singular Distribution Using Deep "
        "Generative Models"
    ),
    arxiv="2105.04046",
    date="2021-05",
    venue="JMLR 24 (2023)",
    purpose=(
        "For fitting a generative model by likelihood to data that lie on or near a surface of low "
        "dimension, where the likelihood has no bound. Gaussian noise of a calibrated size is "
        "added to the training data once; the usual model is fitted; the decoder without noise is "
        "the estimate. It wraps the data of any such model."
    ),
    claim=(
        "Perturbing the data makes maximum likelihood consistent for nearly singular distributions "
        "and improves the estimate considerably."
    ),
    figures=(
        Figure(
            "simulations and real data, with against without perturbation",
            "significantly better; tables not at hand",
            "paper",
        ),
        Figure(
            "rate with perturbation, n samples, smoothness beta, dimension t",
            "n^(-beta / (2 (beta + t))), or the noise if larger",
            "recall",
        ),
    ),
    extension_points=("a data-set wrapper or collate function for any generative model",),
    planned_symbols=("attending.losses.instance_noise.InstanceNoise",),
    status="planned",
)
