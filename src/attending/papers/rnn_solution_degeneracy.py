"""The record of solution degeneracy: how different are networks that solve the same task?"""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="rnn-solution-degeneracy",
    title=(
        "Measuring and Controlling Solution Degeneracy across Task-Trained Recurrent Neural "
        "Networks"
    ),
    arxiv="2410.03972",
    date="2024-10-04",
    venue="NeurIPS 2025",
    purpose=(
        "Measures how much networks trained on the same task to the same loss differ, in behaviour "
        "on longer trials, in dynamics and in weights, regardless of the order of units. Task "
        "complexity, feature learning, width and regularisation are knobs to control it. The "
        "measures work on any trajectories, also on those of a transformer's hidden states."
    ),
    claim=(
        "Harder tasks make dynamics and behaviour more alike but weights less; stronger feature "
        "learning makes dynamics more alike and weights and behaviour less; width and "
        "regularisation make all three more alike."
    ),
    figures=(
        Figure(
            "degeneracy of dynamics / weights / behaviour as tasks grow harder",
            "down / up / down",
            "paper",
        ),
        Figure("same, as feature learning grows", "down / up / up", "paper"),
        Figure("same, as width grows at fixed feature learning", "down / down / down", "paper"),
        Figure("same, with L1 or nuclear-norm regularisation", "down / down / down", "paper"),
    ),
    extension_points=("any trajectories of hidden states [trials, time, dim]",),
    planned_symbols=(
        "attending.probes.degeneracy.DSA",
        "attending.probes.degeneracy.pif_distance",
    ),
    status="planned",
)
