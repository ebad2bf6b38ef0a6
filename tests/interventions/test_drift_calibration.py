"""TeaCache set for a model: a polynomial that is known, thresholds for shares, a real model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.interventions.drift_calibration import DriftCalibration, calibrate_drift
from attending.interventions.drift_schedule import DriftSteps
from tests.interventions.denoisers import fingerprint, wan, wan_inputs


class Known(nn.Module):
    """Its output moves by a known polynomial of how far its input moves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])
        self.before: Tensor | None = None
        self.output = torch.ones(1, dtype=torch.float64)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        states = self.blocks[0](hidden_states)
        if self.before is not None:
            drift = (states - self.before).abs().mean() / self.before.abs().mean()
            self.output = self.output * (1 + 2 * drift**2 + 0.5 * drift + 0.1)
        self.before = states
        return self.output


def test_a_known_polynomial_is_found() -> None:
    model = Known().double()
    sizes = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5

    def sample() -> None:
        for step, size in enumerate(sizes):
            model(torch.full((1, 2), float(size), dtype=torch.float64), torch.tensor(12.0 - step))

    found = calibrate_drift(model, sample, signal="input", degree=2)
    assert found.coefficients == pytest.approx((2.0, 0.5, 0.1), abs=1e-9)
    assert found.error < 1e-9
    assert len(found.traces) == 1
    assert len(found.traces[0]) == 11
    with pytest.raises(ValueError, match="run: expected samplings of more than 11 steps"):
        calibrate_drift(Known().double(), sample, signal="input", degree=11)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_threshold_of_a_share(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    traces = tuple(tuple(torch.rand(39, generator=generator).tolist()) for _ in range(3))
    found = DriftCalibration((1.0, 0.0), traces, "modulated", 0.0)
    threshold = found.threshold(share)
    assert found.share(threshold) <= share
    assert found.share(0.999 * threshold) > share
    decide = DriftSteps(threshold, until=39).start()
    computed = sum(decide.decide(s, d) for s, d in enumerate((None, *traces[0])))
    assert abs(computed / 40 - share) < 0.15
    with pytest.raises(ValueError, match="share: expected at least"):
        found.threshold(0.01)


@torch.no_grad()
def test_wan_computes_about_what_it_is_set_to() -> None:
    model = wan()
    before = fingerprint(model)

    def sample() -> None:
        states: dict[str, Any] = {}
        for step in range(16):
            for branch, seed in (("cond", 0), ("uncond", 1)):
                inputs = wan_inputs(1000.0 * (1 - step / 16), seed)
                inputs["hidden_states"] = states.get("x", inputs["hidden_states"])
                with model.cache_context(branch):
                    states[branch] = model(**inputs).sample
                states.setdefault("x", inputs["hidden_states"])
            states["x"] = states["x"] - states["cond"] / 16

    found = calibrate_drift(model, sample)
    assert len(found.traces) == 2
    assert fingerprint(model) == before
    method = found.teacache(0.5)
    assert method.until == 15
    with method(model) as run:
        sample()
    assert abs(run.density - 0.5) <= 0.15
