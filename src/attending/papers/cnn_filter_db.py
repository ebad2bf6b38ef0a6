"""The record of CNN Filter DB: is a layer's set of filters sparse, poor or still random?"""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="cnn-filter-db",
    title="CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
    arxiv="2203.15331",
    date="2022-03-29",
    venue="CVPR 2022",
    purpose=(
        "Tells from the weights alone, without data, whether the 3x3 filters of a convolution are "
        "sparse, low in diversity or still as random as at the start, and how far two collections "
        "of filters are apart. Useful to compare models, to follow training, and to spot layers "
        "that do nothing. The same measures may be taken of attention's weight matrices."
    ),
    claim=(
        "Filter distributions differ little between tasks and kinds of images; what makes them "
        "differ is degeneration, which sparsity and the entropy of the filters' spectrum detect."
    ),
    figures=(
        Figure("3x3 filters examined", "more than 1.4 billion, from hundreds of models", "paper"),
        Figure("ImageNet ResNet-18, layer1.0.conv1: sparsity, entropy", "0.125, 0.824", "code"),
        Figure("ImageNet ResNet-18, layer4.1.conv2: sparsity, entropy", "0.0018, 0.219", "code"),
        Figure(
            "shift between robust and normal models, CIFAR-10 / CIFAR-100 / ImageNet",
            "0.622 / 0.174 / 0.018",
            "code",
        ),
    ),
    extension_points=(
        "any torch.nn.Module or state dict with nn.Conv2d weights",
        "transformers.TrainerCallback, to log it each epoch",
    ),
    planned_symbols=(
        "attending.probes.filters.measure_filters",
        "attending.probes.filters.FilterShift",
    ),
    status="planned",
)
