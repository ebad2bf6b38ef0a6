"""The record of Flow-Attention: linear attention with conserved flow and competing keys."""

from attending.papers._record import Figure, Paper

PAPER = Paper(
    slug="flow-attention",
    title="Flowformer: Linearizing Transformers with Conservation Flows",
    arxiv="2202.06258",
    date="2022-02",
    venue="ICML 2022",
    purpose=(
        "Replaces softmax attention by one that is linear in the length, without a bias towards "
        "neighbours. Attention is seen as a flow from values to results whose in- and outflow are "
        "conserved, so that keys compete and the maps do not become flat. It serves encoders, "
        "cross-attention and causal models, trained from scratch."
    ),
    claim=(
        "Conserving flow gives linear attention the selectivity it lacks: it beats other linear "
        "attentions and reaches or passes softmax on text, images, time series and control."
    ),
    figures=(
        Figure(
            "Long Range Arena mean, softmax / linear / Flowformer", "54.39 / 50.55 / 56.48", "code"
        ),
        Figure("same, without competition / without allocation", "55.25 / 55.58", "code"),
        Figure(
            "WikiText-103 perplexity, softmax / linear / Flowformer", "33.0 / 38.4 / 30.8", "code"
        ),
        Figure("ImageNet-1K top-1 in DeiT-S, softmax / Flowformer, %", "79.8 / 80.0", "code"),
        Figure("D4RL mean reward, Decision Transformer / Flowformer", "72.2 / 73.5", "code"),
    ),
    extension_points=(
        "transformers.AttentionInterface",
        "an attention module to train with",
    ),
    planned_symbols=("attending.nn.flow_attention.flow_attention",),
    status="planned",
)
