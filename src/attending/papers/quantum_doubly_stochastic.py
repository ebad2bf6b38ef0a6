"""The record of QDSFormer: attention whose rows and columns both sum to one."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="quantum-doubly-stochastic",
    title="Quantum Doubly Stochastic Transformers",
    arxiv="2504.16275",
    date="2025-04",
    venue="NeurIPS 2025",
    purpose=(
        "For small bidirectional encoders, such as vision transformers over a dozen patches, whose "
        "attention should neither ignore a key nor flood it. Rows and columns of the map sum to "
        "one, by Sinkhorn, by squares of an orthogonal matrix, by projection, or by a quantum "
        "circuit that is simulated. All are differentiable and interchangeable."
    ),
    claim=(
        "Doubly stochastic attention trains more stably than softmax in small models, and the "
        "circuit's map is more expressive than Sinkhorn's and does best on several tasks."
    ),
    figures=(
        Figure(
            "FashionMNIST, 2 layers: softmax / QR / circuit / Sinkhorn, %",
            "88.9 / 89.3 / 90.0 / 89.1",
            "paper",
        ),
        Figure("MNIST, 1 layer, same", "89.1 / 96.6 / 93.9 / 94.3", "paper"),
        Figure("mean of 7 MedMNIST sets, 2 layers, same", "73.0 / 72.5 / 74.3 / 70.8", "paper"),
        Figure(
            "runs that learn the Eureka task within 100 epochs, of 5, same",
            "1 / 2 / 5 / 0",
            "paper",
        ),
    ),
    extension_points=(
        "the normaliser of scores in an attention module",
        "transformers.AttentionInterface, for encoders",
        "PennyLane's qml.qnn.TorchLayer, for hardware",
    ),
    planned_symbols=(
        "attending.nn.doubly_stochastic.doubly_stochastic",
        "attending.nn.doubly_stochastic.CircuitDSM",
    ),
    status="planned",
)
