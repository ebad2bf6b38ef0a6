"""The decoder with a partial path: who sees what, decoding, batches, and its losses."""

from typing import Any

import pytest
import torch
from torch import Tensor

import attending as at
from attending.models.partial_attention_lm import (
    PartialAttentionLM,
    following_tokens,
    source_target_loss,
)
from attending.models.regularized_encoder_decoder import RegularizedEncoderDecoder
from attending.nn.source_target_layout import SourceTargetLayout, source_target_layout

VOCAB = 11


def model_of(**options: Any) -> PartialAttentionLM:
    torch.manual_seed(0)
    model = PartialAttentionLM(VOCAB, embed_dim=8, depth=2, num_heads=2, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model.eval()


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


LAYOUTS = [
    {"bidirectional_source": False, "restart_positions": False},
    {"bidirectional_source": True, "restart_positions": True},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("partial", [False, True])
@torch.no_grad()
def test_padded_batches_and_no_look_ahead(partial: bool, norm: str, layout: dict) -> None:
    model = model_of(partial=partial, norm=norm)
    sizes = ((3, 4), (5, 2), (0, 3))
    rows = [tokens_of(source + target) for source, target in sizes]
    for side in ("left", "right"):
        tokens, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
        for row, ids in enumerate(rows):
            place = slice(9 - len(ids), None) if side == "left" else slice(0, len(ids))
            tokens[row, place], mask[row, place] = ids, 1
        whole = source_target_layout([s for s, _ in sizes], attention_mask=mask, **layout)
        found = model(tokens, whole)
        for row, (source, _) in enumerate(sizes):
            ids = rows[row][None]
            alone = model(ids, source_target_layout([source], ids.shape[1], **layout))[0]
            torch.testing.assert_close(found[row][mask[row] > 0], alone, rtol=1e-9, atol=1e-9)
    ids = tokens_of(2, 9)
    whole = source_target_layout([4, 4], 9, **layout)
    before = model(ids, whole)
    ids[:, 7:] = (ids[:, 7:] + 1) % VOCAB
    torch.testing.assert_close(model(ids, whole)[:, :7], before[:, :7], rtol=1e-9, atol=1e-9)
    ids[:, 0] = (ids[:, 0] + 1) % VOCAB
    assert not torch.allclose(model(ids, whole)[:, 4:], before[:, 4:], atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("partial", [False, True])
@torch.no_grad()
def test_decoding_with_a_cache(partial: bool, norm: str, layout: dict) -> None:
    model = model_of(partial=partial, norm=norm)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    tokens = tokens_of(2, 5)
    prompt = source_target_layout([2, 4], attention_mask=mask, **layout)
    made = model.generate(tokens, prompt, max_new_tokens=6)
    assert made.shape == (2, 6)
    joined = torch.cat([tokens, made], 1)
    real = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
    whole = source_target_layout([2, 4], attention_mask=real, **layout)
    logits = model(joined, whole)
    assert torch.equal(logits[:, 4:-1].argmax(-1), made)
    first, state = model.prefill(tokens, prompt)
    torch.testing.assert_close(first, logits[:, 4], rtol=1e-9, atol=1e-9)
    for number in range(5):
        step = model.step(made[:, number], state)
        torch.testing.assert_close(step, logits[:, 5 + number], rtol=1e-9, atol=1e-9)
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    moved = torch.where(right > 0, tokens.roll(-2, 1), 0)
    moved[1] = tokens[1]
    other = model.generate(moved, source_target_layout([2, 4], attention_mask=right, **layout), 6)
    assert torch.equal(other, made)
    stopped = model.generate(tokens, prompt, 6, stop_token=int(made[0, 0]))
    assert bool((stopped[0] == made[0, 0]).all())
    assert model.generate(tokens, prompt, 0).shape == (2, 0)


@torch.no_grad()
def test_a_tap_sees_both_paths() -> None:
    model = model_of()
    with at.tap(model) as calls:
        model(tokens_of(2, 9), source_target_layout([4, 3], 9))
    assert [call.is_cross for call in calls] == [False, True] * 2
    assert calls[1].key_length == 4
    assert calls[1].name == "blocks.0.partial"


def test_losses() -> None:
    model = model_of()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    tokens = tokens_of(2, 5)
    layout = source_target_layout([2, 3], attention_mask=mask, bidirectional_source=False)
    logits = model(tokens, layout)
    log = logits.log_softmax(-1)

    def nats(pairs: list[tuple[int, int, int]]) -> Tensor:
        return -torch.stack([log[b, at_, tokens[b, of]] for b, at_, of in pairs]).mean()

    target = nats([(0, 1, 2), (0, 2, 3), (1, 2, 3), (1, 3, 4)])
    torch.testing.assert_close(source_target_loss(logits, tokens, layout), target)
    own = nats([(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1), (1, 2, 2)])
    found = source_target_loss(logits, tokens, layout, 0.5)
    torch.testing.assert_close(found, target + 0.5 * own)
    following = nats([(0, 0, 1), (1, 0, 1), (1, 1, 2)])
    found = source_target_loss(logits, tokens, layout, 0.5, "next")
    torch.testing.assert_close(found, target + 0.5 * following)
    assert following_tokens(layout).tolist()[0] == [True, True, True, False]
    found.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    both_ways = source_target_layout([2, 3], attention_mask=mask)
    with pytest.raises(ValueError, match=r"source_objective: .*bidirectional"):
        source_target_loss(logits, tokens, both_ways, 0.5, "next")
    with pytest.raises(ValueError, match='source_objective: expected "own" or "next"'):
        source_target_loss(logits, tokens, layout, 0.5, "shift")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout: expected target tokens"):
        source_target_loss(logits, tokens, source_target_layout([5, 5], 5))


def layout_of(
    red: RegularizedEncoderDecoder, lengths: list[int], mask: Tensor
) -> SourceTargetLayout:
    return source_target_layout(
        lengths,
        attention_mask=mask,
        bidirectional_source=not red.causal_source,
        restart_positions=not red.consecutive_positions,
    )


@pytest.mark.parametrize("causal_source", [True, False])
@pytest.mark.parametrize("consecutive_positions", [True, False])
@torch.no_grad()
def test_the_regularized_encoder_decoder_is_a_language_model(
    causal_source: bool, consecutive_positions: bool
) -> None:
    lm = model_of(partial=False)
    red = RegularizedEncoderDecoder(
        VOCAB,
        embed_dim=8,
        causal_source=causal_source,
        consecutive_positions=consecutive_positions,
    ).double()
    red.load_state_dict(lm.state_dict())
    lengths, target = [4, 2], 5
    source, following = tokens_of(2, 4), tokens_of(2, target)
    source_mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    found = red(source, following, source_mask)
    for row, length in enumerate(lengths):
        ids = torch.cat([source[row, :length], following[row]])[None]
        layout = layout_of(red, [length], torch.ones_like(ids))
        logits = lm(ids, layout)[0]
        torch.testing.assert_close(found.source[row, :length], logits[:length])
        torch.testing.assert_close(found.target[row], logits[length:])


@pytest.mark.parametrize(
    "switch", ["joint_attention", "share_parameters", "layer_wise", "consecutive_positions"]
)
def test_without_a_regulariser_it_is_another_model(switch: str) -> None:
    torch.manual_seed(0)
    model = RegularizedEncoderDecoder(VOCAB, embed_dim=8, **{switch: False}).double()
    lm = PartialAttentionLM(VOCAB, embed_dim=8, partial=False).double()
    shared = {name: model.state_dict()[name] for name in lm.state_dict()}
    lm.load_state_dict(shared)
    with torch.no_grad():
        for parameter in {*model.parameters(), *lm.parameters()}:
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    source, target = tokens_of(2, 4), tokens_of(2, 5)
    read = model(source, target)
    found = read.target
    layout = source_target_layout([4, 4], 9, bidirectional_source=False, restart_positions=False)
    assert not torch.allclose(found, lm(torch.cat([source, target], 1), layout)[:, 4:], atol=1e-3)
    changed = target.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % VOCAB
    torch.testing.assert_close(model(source, changed).target[:, :3], found[:, :3])
    (found.sum() + read.source.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_refusals_and_half_precision() -> None:
    with pytest.raises(ValueError, match='norm: expected "pre" or "post"'):
        PartialAttentionLM(VOCAB, norm="both")  # type: ignore[arg-type]
    model = model_of()
    layout = source_target_layout([2], 5)
    with pytest.raises(ValueError, match=r"layout: expected that of tokens \[1, 4\]"):
        model(tokens_of(1, 4), layout)
    red = RegularizedEncoderDecoder(VOCAB, embed_dim=8)
    with pytest.raises(ValueError, match=r"source_mask: .*padding before a token"):
        red(tokens_of(1, 3), tokens_of(1, 2), torch.tensor([[False, True, True]]))
    tokens = tokens_of(1, 5)
    exact = model(tokens, layout).detach()
    half = model.bfloat16()(tokens, layout)
    assert half.dtype == torch.bfloat16
    assert float((half.detach().double() - exact).abs().max()) < 0.1 * float(exact.abs().max())
