"""The record of differential information: what preference data can teach a policy."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="differential-information-dpo",
    title=(
        "Differential Information: An Information-Theoretic Perspective on Preference Optimization"
    ),
    arxiv="2505.23761",
    date="2025-05-29",
    venue=None,
    purpose=(
        "For users of DPO who want to know which policy their data teaches, to choose rejected "
        "answers that make DPO's optimum a wanted policy, and to judge a finished run by one "
        "number: the entropy of what it learned beyond the reference. It is theory with estimators "
        "and works on log-probabilities of sequences."
    ),
    claim=(
        "DPO's log-ratio reward is the one that recovers the target policy when the preferences "
        "carry exactly the information between reference and target; the entropy of that "
        "information tells apart data for open-ended answers and for knowledge."
    ),
    figures=(
        Figure(
            ("synthetic policies, distance of the optimum from the target, log-ratio reward"),
            "converges to 0; other rewards do not",
            "3rd",
        ),
        Figure(
            "entropy of common preference sets, and the likelihood of chosen answers",
            "high, and it falls",
            "paper",
        ),
        Figure(
            "high entropy helps instruction following, low entropy helps knowledge",
            "direction only",
            "paper",
        ),
    ),
    extension_points=(
        "TRL's DPOTrainer, through a callback",
        "sequence log-probabilities of any two models",
    ),
    planned_symbols=(
        "attending.losses.differential_information.did_entropy",
        "attending.losses.differential_information.rejected_log_probs",
    ),
    status="planned",
)
