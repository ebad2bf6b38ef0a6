"""What a GPT-2 costs under two-party encrypted inference, by a formula fitted to published numbers.

Under such a protocol (here SecretFlow, two parties) nothing is measured by multiplications alone:
every nonlinear operation is traffic between the parties. `private_inference_cost` says how much of
it each part of a model makes, and so what leaving parts out would save.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Architecture = Literal["SM+LN+G", "SM+LN+R", "SM"]
"""Which nonlinearities a block has: softmax, layer norms, and GELU or ReLU."""

PUBLISHED_WIDTH = 768
PUBLISHED_VOCABULARY = 50257

# Gigabytes per element; fitted at width 768 and a vocabulary of 50257. See the docstring below.
_SOFTMAX = 1.666e-6
_LINEAR = 5.66e-4 / PUBLISHED_WIDTH
_VOCABULARY = 1.273e-2 / PUBLISHED_VOCABULARY
_NORM_AND_RELU = 1.96e-3 / PUBLISHED_WIDTH
_GELU_OVER_RELU = 3.365e-6

# Minutes, by architecture and whether its feed-forward part is fused.
_PUBLISHED_SIZES = (12, 12, PUBLISHED_WIDTH, 128)  # layers, heads, width, tokens
_PUBLISHED_LATENCY = {("SM+LN+G", False): 8.21, ("SM+LN+R", False): 6.06, ("SM", True): 4.76}


@dataclass(frozen=True)
class PrivateInferenceCost:
    """Cost of one forward over one sequence.

    Attributes:
        softmax_gb, linear_gb, vocabulary_gb, norm_and_relu_gb, gelu_gb: traffic between the two
            parties by what causes it, in gigabytes: softmax of attention; matrices of the blocks;
            embedding and output layer; layer norms and ReLU together; what GELU takes beyond ReLU.
        feed_forward_flops, attention_flops: floating point operations, a multiply-add being two;
            attention counts its four matrices and the full square of scores and of their product
            with the values. The paper's 7.7e9 for 12 layers and 128 tokens is 7.85e9 here.
        latency_minutes: the paper's measurement at 100 Mbps and 80 ms of round trip, for the three
            models that it gives one for; else None. It is not proportional to the traffic, so there
            is no formula for it.
    """

    softmax_gb: float
    linear_gb: float
    vocabulary_gb: float
    norm_and_relu_gb: float
    gelu_gb: float
    feed_forward_flops: float
    attention_flops: float
    latency_minutes: float | None

    @property
    def communication_gb(self) -> float:
        """All traffic, in gigabytes."""
        return (
            self.softmax_gb
            + self.linear_gb
            + self.vocabulary_gb
            + self.norm_and_relu_gb
            + self.gelu_gb
        )


def private_inference_cost(
    num_layers: int = 12,
    num_heads: int = 12,
    hidden: int = 768,
    context: int = 128,
    *,
    architecture: Architecture = "SM",
    fused_feed_forward: bool | None = None,
    vocabulary: int = PUBLISHED_VOCABULARY,
) -> PrivateInferenceCost:
    """Traffic and operations of a GPT-2 under two-party encrypted inference.

        GB =   1.666e-6 L H T^2                  softmax, per element
             + 5.66e-4  L T (hidden / 768)       matrices of the blocks
             + 1.273e-2 T   (vocabulary / 50257) embedding and output layer
             + 1.96e-3  L T (hidden / 768)       with layer norms and an activation
             + 3.365e-6 L T 4 hidden             with GELU in place of ReLU

    **This is our fit, not the paper's.** The coefficients come from five numbers of its tables
    (12 layers, T = 128 and others; SecretFlow over a wide area network). It reproduces the other
    entries for the same vocabulary, 18 layers and T = 256, to 0.1 %, and those for T = 512 with a
    vocabulary of 16384 to 2 %. All published models have 12 heads and width 768: that traffic
    grows with `hidden` as written is plausible (it counts elements) and rests on no measurement.

    Args:
        num_layers, num_heads, hidden, context: of the model; `context` is the number of tokens T.
        architecture: `"SM+LN+G"` (an ordinary GPT-2), `"SM+LN+R"` (ReLU), or `"SM"` (softmax
            alone). For those in between the tables give no traffic, and so this gives none.
        fused_feed_forward: one matrix in place of two; only without an activation, and there the
            default. It saves operations, but no traffic: that depends on what goes in and out.
        vocabulary: number of tokens.

    Raises:
        ValueError: for sizes below 1, an unknown architecture, or a fused part with an activation.
    """
    sizes = {
        "num_layers": num_layers,
        "num_heads": num_heads,
        "hidden": hidden,
        "context": context,
        "vocabulary": vocabulary,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}.")
    if architecture not in get_args(Architecture):
        raise ValueError(
            f"architecture: expected one of {get_args(Architecture)}, for which the paper gives "
            f"numbers, got {architecture!r}."
        )
    if fused_feed_forward is None:
        fused_feed_forward = architecture == "SM"
    if fused_feed_forward and architecture != "SM":
        raise ValueError(
            f'fused_feed_forward: expected False with "{architecture}", got True: two matrices '
            "with an activation between them are not one."
        )
    tokens = num_layers * context
    latency = None
    if (sizes["num_layers"], sizes["num_heads"], hidden, context) == _PUBLISHED_SIZES:
        latency = _PUBLISHED_LATENCY.get((architecture, fused_feed_forward))
    return PrivateInferenceCost(
        softmax_gb=_SOFTMAX * num_heads * tokens * context,
        linear_gb=_LINEAR * tokens * hidden,
        vocabulary_gb=_VOCABULARY * vocabulary * context,
        norm_and_relu_gb=_NORM_AND_RELU * tokens * hidden if architecture != "SM" else 0.0,
        gelu_gb=_GELU_OVER_RELU * tokens * 4 * hidden if architecture == "SM+LN+G" else 0.0,
        feed_forward_flops=2.0 * tokens * hidden**2 * (1 if fused_feed_forward else 8),
        attention_flops=8.0 * tokens * hidden**2 + 4.0 * tokens * context * hidden,
        latency_minutes=latency,
    )
