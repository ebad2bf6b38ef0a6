"""Peak memory, against allocations whose sizes are known."""

import gc
import weakref

import pytest
import torch
from torch import nn

from attending.trials import memory
from attending.trials.memory import peak_memory
from tests.trials import models

MB = 1_000_000


def floats(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * MB // 4)


def test_what_is_held_at_once_counts_and_no_more() -> None:
    def run() -> None:
        for _ in range(5):
            floats(8)  # one after the other
        kept = [floats(2), floats(3)]
        floats(4)
        del kept

    assert peak_memory(nn.Identity(), run) == 9 * MB


def test_what_was_held_before_does_not_count() -> None:
    before = floats(50)
    assert peak_memory(nn.Identity(), lambda: floats(1)) == MB
    assert before.numel()


def test_buffers_inside_of_operators_count() -> None:
    """The map of eager attention, which no tensor of the caller holds when it is done."""
    x = torch.randn(1, 1, 500, 8)

    def eager() -> torch.Tensor:
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x

    assert 2 * MB <= (peak_memory(nn.Identity(), eager) or 0) < 2.2 * MB


def test_it_is_the_same_every_time() -> None:
    model, batch = models.llama(), models.ids()
    with torch.no_grad():
        model(batch)
        peaks = {peak_memory(model, lambda: model(batch)) for _ in range(3)}
    assert len(peaks) == 1


def test_pieces_of_a_profile_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one forward holds until after the next counts for both."""
    model, batch = models.llama(), models.ids()

    def run() -> None:
        outputs = [model(batch).logits for _ in range(4)]
        floats(8)
        del outputs

    with torch.no_grad():
        model(batch)
        whole = peak_memory(model, run)
        monkeypatch.setattr(memory, "LONGEST_PIECE", 0.0)
        assert peak_memory(model, run) == whole
    assert whole is not None
    assert whole >= 8 * MB + 3 * 4 * models.ids().numel() * models.VOCAB


def test_it_is_quiet_and_leaves_no_hook(capfd: pytest.CaptureFixture[str]) -> None:
    model, batch = models.llama(), models.ids()
    reference = weakref.ref(model)
    peak_memory(model, lambda: model(batch))
    assert not model._forward_pre_hooks
    with pytest.raises(KeyError):
        peak_memory(model, lambda: {}["no"])
    assert not model._forward_pre_hooks
    assert peak_memory(model, lambda: floats(1)) == MB  # the profiler is not left on
    assert capfd.readouterr().err == ""
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.gpu
def test_on_cuda() -> None:
    model = nn.Linear(2, 2).cuda()
    held = torch.empty(MB, device="cuda")
    peak = peak_memory(model, lambda: torch.empty(1024 * 1024, device="cuda"))
    assert peak == 4 * 1024 * 1024
    assert held.numel()
