"""The loss of CLEAR: golden values, and flow matching alone where there is nothing to learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.losses.linearization import linearization_loss, official_layers

GOLDEN = Path(__file__).parent.parent / "golden" / "clear" / "text_parallel_and_losses.npz"


def test_golden() -> None:
    with np.load(GOLDEN) as stored:
        found = {key: torch.from_numpy(stored[key]) for key in stored.files}
    mine, theirs = (
        {str(layer): one for layer, one in enumerate(found[f"{who}_attn"])}
        for who in ("student", "teacher")
    )
    loss = linearization_loss(
        found["student_pred"], found["noise"] - found["x0"], found["teacher_pred"], mine, theirs
    )
    wanted = [found[f"loss_{name}"] for name in ("total", "fm", "distill", "attn")]
    torch.testing.assert_close(list(loss), wanted, rtol=1e-12, atol=1e-12)
    single = [one.float() for one in (found["student_pred"], found["teacher_pred"])]
    loss = linearization_loss(single[0], (found["noise"] - found["x0"]).float(), single[1])
    assert float(loss.total) == pytest.approx(
        float(found["loss_fm"] + 0.5 * found["loss_distill"]), rel=3e-5
    )


@given(st.integers(0, 1000), st.floats(0, 3), st.floats(0, 3))
def test_equals_flow_matching_where_the_student_is_the_teacher(
    seed: int, alpha: float, beta: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, target = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = linearization_loss(
        one, target, one, {"a": target}, {"a": target},
        prediction_weight=alpha, attention_weight=beta,
    )  # fmt: skip
    assert loss.total == loss.flow_matching == (one - target).square().mean()


def test_errors() -> None:
    with pytest.raises(ValueError, match="target"):
        linearization_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="names"):
        official_layers(["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"])
