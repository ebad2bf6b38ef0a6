"""The record of sigmaReparam: spectrally normalised weights with one learned scale."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="sigma-reparam",
    title=(
        "Stabilizing Transformer Training by Preventing Attention Entropy Collapse (sigmaReparam)"
    ),
    arxiv="2303.06296",
    date="2023-03",
    venue="ICML 2023",
    purpose=(
        "For training a transformer whose loss oscillates or diverges while its attention rows "
        "shrink to a single key. Every linear weight is divided by its largest singular value and "
        "multiplied by one learned scalar, which bounds how fast the logits can grow. Layer norm, "
        "warm-up and weight decay may then be left out. It also gives a lower bound on attention "
        "entropy that can be monitored in any model."
    ),
    claim=(
        "With the reparametrisation the entropy of attention does not collapse, and training stays "
        "stable in settings (no layer norm, no warm-up, high learning rate) where plain "
        "transformers diverge, at the same quality."
    ),
    figures=(
        Figure(
            "ImageNet-1k top-1, ViT-B/16, DeiT recipe -> without LN, warm-up and weight decay, %",
            "81.8 -> about 81.8 to 82.2",
            "recall",
        ),
        Figure("training time saved", "up to 16 %", "3rd"),
        Figure(
            "machine translation, 100 + 100 layers, post-LN",
            "plain diverges or is unstable -> trains, competitive BLEU",
            "3rd",
        ),
        Figure("time per step, speech, post-LN -> with sigmaReparam, ms", "450 -> 510", "3rd"),
        Figure(
            "lower bound on the entropy of a row (Theorem 3.1)",
            "never violated; exact on the worst row",
            "ran",
        ),
    ),
    extension_points=(
        "torch.nn.utils.parametrize.register_parametrization on nn.Linear and nn.Conv2d",
        "torch.nn.utils.parametrize.remove_parametrizations, to fold into plain weights",
    ),
    planned_symbols=(
        "attending.nn.sigma_reparam.sigma_reparam",
        "attending.nn.sigma_reparam.fold_sigma_reparam",
    ),
    status="planned",
)
