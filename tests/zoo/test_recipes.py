"""The recipe of llama-stdlib on a configuration small enough to train in a second."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from attending import zoo
from attending.zoo import llama_stdlib
from attending.zoo.recipes.bits_per_byte import compression_baselines, total_nats
from attending.zoo.recipes.byte_bpe import train_tokenizer
from attending.zoo.recipes.llama_stdlib import (
    LlamaStdlibRecipe,
    backward,
    build_model,
    train,
)
from attending.zoo.recipes.llama_stdlib_export import export
from attending.zoo.recipes.packing import PackedTokens
from attending.zoo.recipes.stdlib_text import is_held_out, read_documents, split
from attending.zoo.recipes.training_loop import CHECKPOINT

TINY = LlamaStdlibRecipe(
    vocabulary=300,
    hidden=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    intermediate=32,
    context=32,
    short_context=16,
    tokens_per_step=64,
    steps=9,
    warmup_steps=2,
    held_out_per_mille=250,
    bfloat16=False,
    evaluate_every=3,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of twenty tiny modules, and things that a corpus must leave out."""
    root: Path = tmp_path_factory.mktemp("library")
    for number in range(20):
        body = "".join(f"def f{number}_{i}(x):\n    return x + {number * i}\n\n" for i in range(9))
        (root / f"module_{number}.py").write_text(body, encoding="utf-8")
    for folder in ("test", "site-packages", "package/tests"):
        (root / folder).mkdir(parents=True)
        (root / folder / "left_out.py").write_text("left = 'out'\n", encoding="utf-8")
    (root / "_sysconfigdata__linux.py").write_text("left = 'out'\n", encoding="utf-8")
    (root / "latin.py").write_bytes(b"name = '\xe9'\n")
    return root


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    tokenizer = train_tokenizer(["def f(x): return x"], TINY.vocabulary, TINY.context)
    model = build_model(replace(TINY, layers=2), tokenizer)
    for parameter in model.parameters():  # as it is made, a model this small predicts nothing
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


def test_corpus_leaves_out_what_it_says(corpus: Path) -> None:
    paths = [document.path for document in read_documents(corpus)]
    assert paths == sorted(f"module_{number}.py" for number in range(20))


def test_split_depends_on_the_path_alone(corpus: Path) -> None:
    documents = read_documents(corpus)
    training, held_out = split(documents, 250)
    assert {d.path for d in training}.isdisjoint(d.path for d in held_out)
    assert len(training) + len(held_out) == len(documents)
    assert split(documents[::-1], 250)[1] == held_out[::-1]
    # Pinned, since another split would make the shipped figures measure training text.
    assert is_held_out("textwrap.py", 40)
    assert not is_held_out("pydoc_data/topics.py", 40)
    with pytest.raises(ValueError, match="both sides"):
        split(documents, 0)


def test_corpus_without_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found none.*`root`"):
        read_documents(tmp_path)


def test_packing_shows_each_token_once_an_epoch() -> None:
    data = PackedTokens(torch.arange(1, 1001), bos=0, seed=3)
    windows = data.windows(16)
    batches = [data.batch(i, 1, 16) for i in range(2 * windows)]
    assert all(batch[0, 0] == 0 for batch in batches)
    for epoch in (batches[:windows], batches[windows:]):
        seen = torch.cat([batch[0, 1:] for batch in epoch])
        assert len(seen) == len(seen.unique()) > 1000 - 2 * 16
    assert not all(map(torch.equal, batches[:windows], batches[windows:]))
    # Rows of one batch are the batches of one row, so a step is where it stands in the order.
    assert torch.equal(data.batch(2, 3, 16), torch.cat(batches[6:9]))
    with pytest.raises(ValueError, match="at least 1200 tokens"):
        data.batch(0, 1, 600)


@pytest.mark.parametrize(("length", "stride"), [(5, 4), (8, 4), (9, 4), (37, 4), (37, 8), (30, 3)])
def test_total_nats_against_one_token_at_a_time(tiny_model: Any, length: int, stride: int) -> None:
    context, bos = 8, 0
    tokens = torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length))
    expected = 0.0
    for position in range(length):
        window = 0 if position < context else math.ceil((position - context + 1) / stride)
        seen = torch.cat([torch.tensor([bos]), tokens[window * stride : position]])
        with torch.no_grad():
            logits = tiny_model(input_ids=seen[None]).logits[0, -1]
        expected -= logits.log_softmax(-1)[tokens[position]].item()
    nats = total_nats(tiny_model, tokens, bos=bos, context=context, stride=stride, rows=3)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_backward_in_pieces_is_the_whole_gradient(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attending.zoo.recipes.llama_stdlib.LOGIT_ROWS", 7)
    batch = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(0))
    tiny_model.zero_grad()
    loss = tiny_model(input_ids=batch, labels=batch).loss
    loss.backward()
    expected = [parameter.grad.clone() for parameter in tiny_model.parameters()]
    tiny_model.zero_grad()
    assert backward(tiny_model, batch, bfloat16=False) == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(tiny_model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_compression_baselines() -> None:
    text = "import os\n" * 200
    baselines = compression_baselines([text, text], [text])
    assert set(baselines) == {"bz2", "xz", "xz_together", "xz_after_training_text"}
    assert 0 < baselines["xz_after_training_text"] < baselines["xz_together"] < baselines["xz"] < 1


def test_learning_rate() -> None:
    recipe = LlamaStdlibRecipe(steps=1000, warmup_steps=10)
    rates = [recipe.learning_rate_at(step) for step in range(1001)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == rates[10] == recipe.learning_rate
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.final_learning_rate)


def test_training_follows_the_schedule(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step asks for its own rate and uses it: at a rate of zero nothing is learned."""
    asked: list[int] = []

    def rate(self: LlamaStdlibRecipe, step: int) -> float:
        asked.append(step)
        return 0.0

    monkeypatch.setattr(LlamaStdlibRecipe, "learning_rate_at", rate)
    train(tmp_path, TINY, root=corpus)
    assert asked == list(range(TINY.steps))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    checkpoint = load_file(tmp_path / CHECKPOINT)
    for name, parameter in build_model(TINY, tokenizer).named_parameters():
        assert torch.equal(parameter, checkpoint[f"model.{name}"])


def test_short_rows_come_first() -> None:
    data = PackedTokens(torch.arange(1, 1001), bos=0, seed=3)
    short = [TINY.batch_at(data, step) for step in range(6)]  # 0.7 of nine steps, rounded
    long = [TINY.batch_at(data, step) for step in range(6, 9)]
    assert torch.equal(torch.cat(short), data.batch(0, 6 * 4, 16))
    assert torch.equal(torch.cat(long), data.batch(0, 3 * 2, 32))


def test_recipe_refuses_what_cannot_work() -> None:
    with pytest.raises(
        ValueError, match=r"short_context to divide tokens_per_step \(2048\), got 100"
    ):
        LlamaStdlibRecipe(short_context=100)
    with pytest.raises(ValueError, match="steps of at least 1, got 0"):
        LlamaStdlibRecipe(steps=0)


def test_interrupted_training_ends_as_the_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", TINY, root=corpus)

    def interrupt(step: int, loss: float) -> None:
        if step == 5:  # two steps after a checkpoint, in the last step of the short rows
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", TINY, root=corpus, on_step=interrupt)
    torch.manual_seed(12345)  # nothing of the run may hang on the global generator
    resumed_at: list[int] = []
    parts = train(
        tmp_path / "parts", TINY, root=corpus, on_step=lambda step, _: resumed_at.append(step)
    )
    assert resumed_at == [4, 5, 6, 7, 8, 9]
    assert parts["losses"] == whole["losses"]
    assert len(whole["losses"]) == TINY.steps
    assert parts["curve"] == whole["curve"]
    ours, theirs = (load_file(tmp_path / run / CHECKPOINT) for run in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("optimizer.") for name in ours)
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {"tokenizer", CHECKPOINT}


def test_training_learns_and_exports(corpus: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, steps=60, evaluate_every=30, learning_rate=1e-2)
    run, folder = tmp_path / "run", tmp_path / "weights"
    measured = train(run, recipe, root=corpus, export_to=folder)
    assert measured["losses"][-1] < measured["losses"][0] - 1
    assert llama_stdlib.load(path=folder).model.num_parameters() > 0  # a snapshot on the way

    card = export(run, folder, root=corpus)
    loaded = llama_stdlib.load(path=folder)
    assert loaded.card == card
    assert card["finished"]
    assert card["steps"] == recipe.steps
    assert card["tokens_seen"] == recipe.steps * recipe.tokens_per_step
    assert card["parameters"] == loaded.model.num_parameters()
    stored = load_file(folder / "model.safetensors")
    trained = load_file(run / CHECKPOINT)
    for name, value in stored.items():
        assert torch.equal(value, trained[f"model.{name}"].to(torch.float16))
    assert card["held_out"]["all"]["bits_per_byte"] < 8
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("# llama-stdlib")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_resuming_another_run_is_refused(corpus: Path, tmp_path: Path) -> None:
    train(tmp_path, replace(TINY, steps=1), root=corpus)
    with pytest.raises(ValueError, match=r"recipe of the run.*resume=False"):
        train(tmp_path, replace(TINY, steps=2), root=corpus)
    changed = tmp_path / "changed"
    changed.mkdir()
    for document in read_documents(corpus):
        (changed / document.path).write_text(document.text + "x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="corpus of the run"):
        train(tmp_path, replace(TINY, steps=1), root=changed)
    assert train(tmp_path, replace(TINY, steps=2), resume=False, root=corpus)["step"] == 2


def test_zoo_train_passes_settings_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, Any] = {}

    def fake(out_dir: Path, recipe: LlamaStdlibRecipe, resume: bool, **options: Any) -> Any:
        got.update(out_dir=out_dir, recipe=recipe, resume=resume, **options)
        return {"step": recipe.steps}

    monkeypatch.setattr("attending.zoo.recipes.llama_stdlib.train", fake)
    zoo.train("llama-stdlib", str(tmp_path), resume=False, export_to="there", steps=7)
    assert got == {
        "out_dir": tmp_path,
        "recipe": LlamaStdlibRecipe(steps=7),
        "resume": False,
        "export_to": Path("there"),
    }
