"""The cost model against every entry of the paper's tables, and its scaling."""

import pytest

from attending.conversion.private_inference_cost import private_inference_cost

# layers, tokens, vocabulary: GB of SM+LN+G, SM+LN+R, SM (arXiv 2501.03489), and the tolerance.
TABLE = {
    (12, 128, 50257): ((25.32, 9.44, 6.43), 1e-3),
    (12, 256, 50257): ((58.51, 26.73, 20.72), 1e-3),
    (18, 128, 50257): ((37.17, 13.34, 8.83), 1e-3),
    (12, 512, 16384): ((145.24, 81.71, 69.68), 2e-2),  # another vocabulary than that of the fit
}
ARCHITECTURES = ("SM+LN+G", "SM+LN+R", "SM")


@pytest.mark.parametrize("setting", TABLE)
def test_the_tables_of_the_paper(setting: tuple[int, int, int]) -> None:
    layers, tokens, vocabulary = setting
    published, tolerance = TABLE[setting]
    for architecture, expected in zip(ARCHITECTURES, published, strict=True):
        cost = private_inference_cost(
            layers, 12, 768, tokens, architecture=architecture, vocabulary=vocabulary
        )
        assert cost.communication_gb == pytest.approx(expected, rel=tolerance)


def test_latency_and_operations_of_the_table() -> None:
    baseline = private_inference_cost(architecture="SM+LN+G")
    reduced = private_inference_cost()
    assert (baseline.latency_minutes, reduced.latency_minutes) == (8.21, 4.76)
    assert private_inference_cost(architecture="SM+LN+R").latency_minutes == 6.06
    assert private_inference_cost(context=256).latency_minutes is None
    assert private_inference_cost(fused_feed_forward=False).latency_minutes is None
    assert baseline.communication_gb / reduced.communication_gb == pytest.approx(3.94, abs=5e-3)
    assert baseline.feed_forward_flops == pytest.approx(14.5e9, rel=1e-3)
    assert reduced.feed_forward_flops * 8 == baseline.feed_forward_flops
    assert baseline.attention_flops == pytest.approx(7.7e9, rel=0.025)  # counted otherwise there


def test_parts_scale_as_they_say() -> None:
    one = private_inference_cost(2, 4, 64, 32, architecture="SM+LN+G", vocabulary=100)
    longer = private_inference_cost(2, 4, 64, 64, architecture="SM+LN+G", vocabulary=100)
    assert longer.softmax_gb == pytest.approx(4 * one.softmax_gb)
    for part in ("linear_gb", "vocabulary_gb", "norm_and_relu_gb", "gelu_gb"):
        assert getattr(longer, part) == pytest.approx(2 * getattr(one, part))
    wider = private_inference_cost(2, 4, 128, 32, architecture="SM+LN+G", vocabulary=100)
    assert wider.softmax_gb == one.softmax_gb
    assert wider.gelu_gb == pytest.approx(2 * one.gelu_gb)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"context": -1}, "context"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"architecture": "SM+G"}, "architecture"),
        ({"architecture": "SM+LN+R", "fused_feed_forward": True}, "fused_feed_forward"),
    ],
)
def test_bad_sizes_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private_inference_cost(**settings)
