"""The record of the interaction basis: features that interact as little as possible."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="interaction-basis",
    title="Using Degeneracy in the Loss Landscape for Mechanistic Interpretability",
    arxiv="2405.10927",
    date="2024-05-17",
    venue=None,
    purpose=(
        "For taking a small trained network apart. Activations of each layer are written in a "
        "basis without unused directions, in which the interactions between layers are as sparse "
        "as can be; the result is a graph of features that can be pruned, clustered and ablated. "
        "It also counts the effective parameters at a minimum."
    ),
    claim=(
        "The local interaction basis finds fewer and sparser interactions than principal "
        "components in small networks; in language models it brings no substantial gain."
    ),
    figures=(
        Figure(
            ("edges needed, modular addition, ln1 to ln2, PCA -> interaction basis, of 8321"),
            "117 -> 87",
            "code",
        ),
        Figure("edges needed, same, ln2 to unembedding", "85 -> 74", "code"),
        Figure("nodes needed, same, PCA and interaction basis", "the same", "code"),
        Figure("GPT-2 small and TinyStories-1M", "no substantial gain", "paper"),
    ),
    extension_points=("forward hooks between the layers of any torch.nn.Module",),
    planned_symbols=("attending.probes.interaction_basis.InteractionBasis",),
    status="planned",
)
