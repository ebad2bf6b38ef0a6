"""Perplexity and drift, against their definitions in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BartConfig, BartForConditionalGeneration, BertForMaskedLM

from attending.trials.quality import IGNORED, Outputs, outputs_of, score, scored
from tests.trials import models


def scores(model: Any, batch: Any, other: Tensor | None = None, **settings: Any) -> dict[str, Any]:
    """Of the model's outputs, or of others, against the model's."""
    with torch.no_grad():
        plain = outputs_of(model(**batch) if isinstance(batch, dict) else model(batch))
    assert plain is not None
    ours = plain if other is None else Outputs(other, plain.are_logits)
    return score(ours, plain, scored(model, batch, plain, **settings))


def padded(side: str) -> dict[str, Tensor]:
    batch, lengths = models.ids(3, 10), [10, 7, 4]
    mask = torch.stack([(torch.arange(10) < n).long() for n in lengths])
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": batch * mask, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_perplexity_of_padded_batches(side: str) -> None:
    model, batch = models.llama(), padded(side)
    found, weights = scores(model, batch)["perplexity"]
    assert weights == [9.0, 6.0, 3.0]
    with torch.no_grad():
        logits = model(**batch).logits.double()
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        loss = cross_entropy(logits[row][real][:-1], batch["input_ids"][row][real][1:])
        assert found[row] == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_drift_over_real_tokens(side: str) -> None:
    model, batch = models.llama(), padded(side)
    with torch.no_grad():
        logits = model(**batch).logits
    other = logits + 0.3 * torch.randn_like(logits)
    found = scores(model, batch, other)
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        p = logits[row][real].double().log_softmax(-1)
        q = other[row][real].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        assert found["drift_kl"][0][row] == pytest.approx(float(kl), rel=1e-4)
        gap = (other[row][real] - logits[row][real]).double().norm()
        l2 = gap / logits[row][real].double().norm()
        assert found["drift_l2"][0][row] == pytest.approx(float(l2), rel=1e-5)
        same = (p.argmax(-1) == q.argmax(-1)).double().mean()
        assert found["agreement"][0][row] == pytest.approx(float(same))
    assert found["drift_kl"][1] == [10.0, 7.0, 4.0]


def test_many_pieces_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.llama(), models.ids()
    with torch.no_grad():
        other = model(batch).logits * 1.1
    whole = scores(model, batch, other)
    monkeypatch.setattr("attending.trials.quality._CHUNK", 3 * models.VOCAB)
    for name, (values, weights) in scores(model, batch, other).items():
        assert values == pytest.approx(whole[name][0], rel=1e-6)
        assert weights == whole[name][1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_after_a_prompt(side: str) -> None:
    model, batch = models.llama(), padded(side)
    found, weights = scores(model, batch, prompt_length=3)["perplexity"]
    assert weights == [7.0, 4.0, 1.0]
    with torch.no_grad():
        logits = model(**batch).logits.double()
    real = batch["attention_mask"][1].bool()
    loss = cross_entropy(logits[1][real][2:-1], batch["input_ids"][1][real][3:])
    assert found[1] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_prompt_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="prompt_length: expected less than the 12 tokens"):
        scores(models.llama(), models.ids(), prompt_length=12)


def test_labels_decide_what_is_predicted() -> None:
    model, ids = models.llama(), models.ids()
    labels = ids.clone()
    labels[:, :6] = IGNORED
    batch = {"input_ids": ids, "labels": labels}
    with torch.no_grad():
        loss = float(model(**batch).loss)
    values, weights = scores(model, batch)["perplexity"]
    total = sum(w * float(torch.tensor(v).log()) for v, w in zip(values, weights, strict=True))
    assert total / sum(weights) == pytest.approx(loss, rel=1e-5)


def test_a_masked_language_model_needs_labels() -> None:
    config = models.bert().config
    model = BertForMaskedLM(config).eval()
    ids = models.ids()
    assert "perplexity" not in scores(model, {"input_ids": ids})
    labels = torch.full_like(ids, IGNORED)
    labels[:, 3] = ids[:, 3]
    batch = {"input_ids": ids, "labels": labels}
    with torch.no_grad():
        loss = model(**batch).loss
    values, _ = scores(model, batch)["perplexity"]
    assert float(torch.tensor(values).log().mean()) == pytest.approx(float(loss), rel=1e-5)


def test_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=models.VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    model = BartForConditionalGeneration(config).eval()
    batch = {"input_ids": models.ids(2, 9), "decoder_input_ids": models.ids(2, 5, seed=1)}
    found, weights = scores(model, batch)["perplexity"]
    with torch.no_grad():
        logits = model(**batch).logits.double()
    loss = cross_entropy(logits[0, :-1], batch["decoder_input_ids"][0, 1:])
    assert found[0] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert weights == [4.0, 4.0]


def test_an_encoder_has_drift_only() -> None:
    found = scores(models.bert(), padded("right"))
    assert set(found) == {"drift_l2"}
    assert found["drift_l2"][0] == [0.0, 0.0, 0.0]


class Sees(torch.nn.Module):
    """Outputs of as many rows as it is told, of a model whose images are token 49."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.config = type("Config", (), {"image_token_id": 49, "is_encoder_decoder": False})()

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits}


def test_only_the_text_after_an_image_counts_and_pruned_images_do_not_shift_it() -> None:
    ids = torch.tensor([[5, 49, 49, 49, 7, 8, 9], [49, 49, 49, 7, 8, 9, 6]])
    model = Sees(torch.randn(2, 7, models.VOCAB))
    found, weights = scores(model, {"input_ids": ids})["perplexity"]
    assert weights == [2.0, 3.0]  # 8 9, and 8 9 6
    loss = cross_entropy(model.logits[0, 4:6].double(), ids[0, 5:])
    assert found[0] == pytest.approx(float(loss.exp()), rel=1e-5)
    pruned = torch.cat([model.logits[:, :1], model.logits[:, 3:]], 1)  # two rows fewer
    assert scores(model, {"input_ids": ids}, pruned)["perplexity"][0] == pytest.approx(found)
    with pytest.raises(ValueError, match="there is nothing to compare"):
        scores(model, {"input_ids": ids}, pruned[:, 3:])


@pytest.mark.parametrize(
    ("found", "shape"),
    [
        (torch.zeros(2, 3, 4), (2, 3, 4)),
        ((torch.zeros(2, 3, 4, 5), None), (2, 1, 60)),
        ({"sample": torch.zeros(2, 8)}, (2, 1, 8)),
    ],
)
def test_outputs_of_other_models(found: Any, shape: tuple[int, ...]) -> None:
    outputs = outputs_of(found)
    assert outputs is not None
    assert outputs.values.shape == shape


def test_what_is_no_output() -> None:
    assert outputs_of(None) is None
    assert outputs_of(torch.tensor([1, 2])) is None
