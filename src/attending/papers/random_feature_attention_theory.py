"""The record of random-feature attention: what a layer with frozen queries and keys can learn."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="random-feature-attention-theory",
    title="What can a Single Attention Layer Learn? A Study Through the Random Features Lens",
    arxiv="2307.11353",
    date="2023-07-21",
    venue="NeurIPS 2023",
    purpose=(
        "A bench for the inductive bias of attention, and a regressor on small sets in closed "
        "form. Many heads have random, frozen query-key matrices, and only the values are fitted, "
        "by ridge regression. It shows which functions of a query and a set of keys are learned "
        "from few samples."
    ),
    claim=(
        "Random-feature attention learns functions that ignore the order of the keys from fewer "
        "samples than a random-feature network, and a query-key matrix with a non-zero mean helps "
        "on natural targets."
    ),
    figures=(
        Figure(
            "samples needed, against a two-layer random-feature network",
            "fewer, in theory and simulation",
            "paper",
        ),
        Figure(
            "effect of a non-zero mean of the query-key matrix on natural targets",
            "fewer samples needed",
            "paper",
        ),
        Figure(
            "test error, mean of squares, 1024 samples, attention / network", "0.05 / 1.03", "ran"
        ),
        Figure(
            "test error, relu target, 1024 samples, zero mean / non-zero mean / network",
            "0.29 / 0.10 / 0.47",
            "ran",
        ),
    ),
    extension_points=(
        "scikit-learn's fit and predict",
        "torch.nn.Module with frozen buffers",
    ),
    planned_symbols=(
        "attending.probes.random_feature_attention.RandomFeatureAttentionRegressor",
        "attending.nn.random_feature_attention.RandomFeatureAttention",
    ),
    status="planned",
)
