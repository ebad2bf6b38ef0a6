"""The record of EMO: a loss that forgives tokens that mean nearly the same."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="emo",
    title="EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling",
    arxiv="2310.04691",
    date="2023-10-07",
    venue="ICLR 2024",
    purpose=(
        "Replaces next-token cross-entropy when a language model is fine-tuned. It adds a bound on "
        "the earth mover's distance between prediction and truth, whose costs come from the "
        "similarity of token embeddings, so probability on a near synonym costs less than on an "
        "unrelated word. The cost is one product with the embedding matrix."
    ),
    claim=(
        "Fine-tuning with the added term gives samples closer to human text and better scores than "
        "cross-entropy does, with the same data."
    ),
    figures=(
        Figure(
            "MMLU / BBH, CoT+UI mixture, cross-entropy -> EMO", "46.3 / 36.7 -> 47.7 / 37.3", "code"
        ),
        Figure(
            "MMLU / BBH, Tulu v2 mixture, cross-entropy -> EMO",
            "50.4 / 41.1 -> 51.4 / 43.1",
            "code",
        ),
        Figure("GSM, Tulu v2 mixture, cross-entropy -> EMO", "29.0 -> 33.0", "code"),
        Figure(
            "MAUVE of unbiased samples, GPT-2 and OPT-125M",
            "higher on all corpora; cells not at hand",
            "paper",
        ),
    ),
    extension_points=("compute_loss_func of transformers.Trainer and TRL's SFTTrainer",),
    planned_symbols=("attending.losses.emo.emo_loss",),
    status="planned",
)
