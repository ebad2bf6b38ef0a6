"""Masks and positions of sources and targets: golden vectors, and padding on either side."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.nn.source_target_layout import source_target_layout

GOLDEN = Path(__file__).parents[1] / "golden" / "partial-attention-lm"


def test_golden() -> None:
    with np.load(GOLDEN / "layout_case1.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    tokens = data["attend_mask"].shape[-1]
    for lengths in (data["source_len"], data["source_len"].tolist()):
        layout = source_target_layout(lengths, tokens)
        assert torch.equal(layout.attend_mask, data["attend_mask"].bool())
        assert torch.equal(layout.position_ids, data["position_ids"])
        assert torch.equal(layout.segment_ids, data["language_ids"])
        assert torch.equal(layout.source_mask, data["partial_key_mask"].bool())
        assert torch.equal(layout.target_mask, ~data["partial_key_mask"].bool())


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_padding_on_either_side(
    sizes: list[tuple[int, int]], left: bool, bidirectional: bool, restart: bool
) -> None:
    options = {"bidirectional_source": bidirectional, "restart_positions": restart}
    width = max(source + target for source, target in sizes)
    mask = torch.zeros(len(sizes), width, dtype=torch.long)
    for row, (source, target) in enumerate(sizes):
        total = source + target
        mask[row, width - total if left else 0 : width if left else total] = 1
    lengths = [source for source, _ in sizes]
    layout = source_target_layout(lengths, attention_mask=mask, **options)
    for row, (source, target) in enumerate(sizes):
        alone = source_target_layout([source], source + target, **options)
        real = mask[row].bool()
        assert torch.equal(layout.attend_mask[row][real][:, real], alone.attend_mask[0])
        assert not bool(layout.attend_mask[row][real][:, ~real].any())
        padding = layout.attend_mask[row][~real]
        assert torch.equal(padding.sum(1), torch.ones(len(padding), dtype=torch.long))
        for name in ("position_ids", "segment_ids", "source_mask", "target_mask"):
            assert torch.equal(getattr(layout, name)[row][real], getattr(alone, name)[0])
            assert not bool(getattr(layout, name)[row][~real].any())
        expected = torch.ones(source + target, source + target, dtype=torch.bool).tril()
        if bidirectional:
            expected[:source, :source] = True
        assert torch.equal(alone.attend_mask[0], expected)
        assert int(alone.position_ids.amax() if source + target else 0) == max(
            0, (max(source, target) if restart else source + target) - 1
        )


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"num_tokens, attention_mask: .* got neither"):
        source_target_layout([1])
    with pytest.raises(ValueError, match=r"num_tokens, attention_mask: .* got both"):
        source_target_layout([1], 2, attention_mask=torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"source_lengths: expected from 0 .* \[2\], got \[3\]"):
        source_target_layout([3], 2)
    with pytest.raises(ValueError, match=r"source_lengths: expected whole numbers .*float32"):
        source_target_layout(torch.tensor([1.0]), 2)  # not typed
    with pytest.raises(ValueError, match=r"attention_mask: expected \[batch, tokens\] with 2"):
        source_target_layout([1, 1], attention_mask=torch.ones(1, 2, dtype=torch.long))
