"""A text becomes batches: every token once, nothing longer than the model's context."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from attending.cli.errors import CommandError
from attending.cli.loading import LoadedModel, load_model
from attending.cli.source import demo_text, read_text
from attending.cli.text import batches
from tests.cli import models

WORDS = models.WORDS.split()
TINY = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def bert(context: int, **of_tokenizer: object) -> LoadedModel:
    config = BertConfig(**TINY, max_position_embeddings=context)
    return LoadedModel("bert", BertModel(config), models.tokenizer(**of_tokenizer))


def llama(context: int, **of_tokenizer: object) -> LoadedModel:
    config = LlamaConfig(**TINY, max_position_embeddings=context)
    tokens = models.tokenizer(dress=False, **of_tokenizer)
    return LoadedModel("llama", LlamaForCausalLM(config), tokens)


def rows(inputs: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """The windows without their padding."""
    return [
        ids[mask.bool()].tolist()
        for batch in inputs
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@given(words=st.integers(1, 300), context=st.integers(3, 40), max_tokens=st.integers(3, 200))
def test_windows_are_the_text(words: int, context: int, max_tokens: int) -> None:
    loaded = bert(context)
    text = " ".join(WORDS[index % len(WORDS)] for index in range(words))
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    made = batches(loaded, text, max_tokens)
    windows = rows(made.inputs)
    assert all(window[0] == 1 and window[-1] == 2 for window in windows)
    read = [token for window in windows for token in window[1:-1]]
    assert read == ids[: len(read)]
    lengths = [len(window) for window in windows]
    assert max(lengths) <= context
    assert max(lengths) - min(lengths) <= 1
    assert made.tokens == sum(lengths) <= max_tokens
    assert made.whole == (len(read) == len(ids))
    if not made.whole:
        # Another token would not have fitted, or only with special tokens of its own.
        assert made.tokens + 1 + 2 > max_tokens


def test_padding_is_on_the_right_and_masked() -> None:
    made = batches(llama(context=4), " ".join(WORDS[:7]), 100)
    (batch,) = made.inputs
    assert batch["input_ids"].shape == (2, 4)
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [3, 4]
    short = batch["attention_mask"].sum(1).argmin()
    assert batch["attention_mask"][short].tolist() == [1, 1, 1, 0]
    assert batch["input_ids"][short, -1] == 0


def test_tokenizer_without_padding_token() -> None:
    loaded = llama(context=4, padding=False)
    assert loaded.tokenizer.pad_token_id is None
    assert batches(loaded, " ".join(WORDS[:7]), 100).tokens == 7


def test_length_limit_of_the_tokenizer_counts() -> None:
    loaded = llama(context=64, model_max_length=5)
    assert max(map(len, rows(batches(loaded, models.WORDS, 100).inputs))) <= 5


def test_batches_are_bounded() -> None:
    made = batches(llama(context=512), " ".join(WORDS * 100), 4096)
    assert len(made.inputs) > 1
    assert all(batch["input_ids"].numel() <= 2048 for batch in made.inputs)
    assert made.tokens == 4096


def test_long_text_is_not_tokenized_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = llama(context=64)
    seen: list[int] = []
    encode = type(loaded.tokenizer).__call__

    def counting(self: object, text: str, **settings: object) -> object:
        seen.append(len(text))
        return encode(self, text, **settings)

    monkeypatch.setattr(type(loaded.tokenizer), "__call__", counting)
    made = batches(loaded, "ships " * 1_000_000, 100)
    assert made.tokens == 100
    assert not made.whole
    assert max(seen) < 10_000


def test_positions_of_roberta_start_behind_padding(saved: Callable[[str], Path]) -> None:
    """42 positions, of which 2 are not for tokens: 42 tokens at once would fail in the model."""
    loaded = load_model(str(saved("roberta")))
    made = batches(loaded, " ".join(WORDS * 4), 4096)
    assert max(map(len, rows(made.inputs))) <= 40
    with torch.no_grad():
        for batch in made.inputs:
            loaded.model(**batch)


def test_decoder_reads_the_text_shifted_by_one(saved: Callable[[str], Path]) -> None:
    for kind, start in (("bart", 2), ("t5", 0)):
        (batch,) = batches(load_model(str(saved(kind))), models.WORDS, 4096).inputs
        assert (batch["decoder_input_ids"][:, 0] == start).all()
        assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
        assert torch.equal(batch["decoder_attention_mask"], batch["attention_mask"])


def test_nothing_fits() -> None:
    with pytest.raises(CommandError, match=r"--max-tokens 2 leaves no room beside the 2 special"):
        batches(bert(40), models.WORDS, 2)


def test_no_tokens() -> None:
    loaded = llama(64)
    loaded.tokenizer.backend_tokenizer.normalizer = None
    with pytest.raises(CommandError, match="finds no token"):
        batches(loaded, " \n ", 100)


def test_demo_text_has_prose_and_python_for_one_window_of_minilm() -> None:
    text = demo_text()
    assert 30 < len(text.splitlines()) < 60
    start = text.index("class Ledger:")
    end = text.index("The clerk would have liked it")
    compile(text[start:end], "demo.txt", "exec")
    made = batches(load_model("minilm"), text, 4096)
    assert made.whole
    assert len(rows(made.inputs)) == 1


def test_signature_and_line_ends_of_a_file_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(str(tmp_path / "a")) == "one\ntwo"
